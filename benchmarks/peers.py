"""sharpscope and its peers on the same models, data and accuracy: writes results/peers.md and results/peers.json.

    python benchmarks/peers.py                      # under four minutes on two cores
    python benchmarks/peers.py --full               # under thirty
    python benchmarks/peers.py --jobs hvp,ggn --models GPT --scales none --out somewhere

Run it in an environment that holds the peers (see README.md); what is missing is left out. How to add a tool is said
there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).resolve().parent
Item = TypeVar("Item")

# Rounds, processor seconds after which none is begun, and gradients that a run may take, by job.
QUICK = {
    "hvp": (5, 2.5, 200), "hvp-batches": (5, 2.5, 200), "ggn": (5, 2.0, 200), "blocks": (2, 2.0, 500),
    "top1-1e-3": (3, 5.0, 300), "top1-1e-6": (2, 4.0, 300), "top10-1e-3": (1, 4.0, 250),
}  # fmt: skip
FULL = {
    "hvp": (9, 8.0, 200), "hvp-batches": (9, 8.0, 200), "ggn": (9, 8.0, 200), "blocks": (3, 10.0, 500),
    "top1-1e-3": (9, 30.0, 600), "top1-1e-6": (5, 20.0, 600), "top10-1e-3": (3, 30.0, 600),
}  # fmt: skip
# Compiling takes half a minute on a transformer, and many blocks of many layers as long.
COMPILED_WHEN_QUICK = ("MLP",)
LEFT_OUT_WHEN_QUICK = {("blocks", "ResNet-14"), ("blocks", "ViT"), ("blocks", "autoencoder")}


def chosen(text: str, known: dict[str, Item], what: str) -> dict[str, Item]:
    """The items named in a list with commas; "all" and "none" are understood."""
    if text in ("all", "none"):
        return known if text == "all" else {}
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"`--{what}` names {unknown}; choose among {', '.join(known)}")
    return {name: known[name] for name in names}


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="smaller batches, fewer rounds (the default)")
    mode.add_argument("--full", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="with more than one the wall clock counts")
    for what in ("jobs", "models", "tools", "scales"):
        parser.add_argument(f"--{what}", default="all", help="names with commas between them, or none")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peers", help="without ending")
    return parser.parse_args(None if given is None else list(given))


def main() -> None:
    options = arguments()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    import torch
    from peer_jobs import report
    from peer_jobs.cases import RECIPES, cache_folder
    from peer_jobs.jobs import JOBS
    from peer_jobs.measure import Rules, Stopwatch, keep_freed_memory
    from peer_jobs.scaling import SCALES
    from peer_jobs.tools import find_tools

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    began = time.perf_counter()
    found, missing = find_tools()
    tools = list(chosen(options.tools, {tool.name: tool for tool in found}, "tools").values())
    jobs = chosen(options.jobs, JOBS, "jobs")
    recipes = chosen(options.models, RECIPES, "models")
    scales = chosen(options.scales, SCALES, "scales")
    limits, folder, quick = FULL if options.full else QUICK, cache_folder(), not options.full

    models, results, scaled = {}, {key: {} for key in jobs}, {}

    def save() -> str:
        """Write what there is, so that an interruption loses little."""
        facts = report.provenance(options.threads, "quick" if quick else "full", tools, missing)
        facts |= {"seconds": round(time.perf_counter() - began), "processor_seconds": round(time.process_time())}
        text = report.markdown(facts, models, results, scaled, tools)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(report.as_json(facts, models, results, scaled, tools))
        return text

    for name, recipe in recipes.items():
        case = recipe.case(quick)
        case.gradient()
        stopwatch = Stopwatch()
        for _ in range(5):
            case.gradient()
        models[name] = {
            "about": case.about,
            "parameters": case.num_parameters,
            "examples": len(case.batches[0][0]),
            "gradient_seconds": stopwatch.read()[0] / 5,
            "fingerprint": case.fingerprint(),
        }
        say(began, name, "made ready")
        for key, job in jobs.items():
            if quick and (key, name) in LEFT_OUT_WHEN_QUICK:
                continue
            on = case.in_batches(recipe.batch_count) if job.batched else case.part(job.part)
            here = [t for t in tools if "compiled" not in t.name or not quick or name in COMPILED_WHEN_QUICK]
            try:
                results[key][name] = job.run(on, here, Rules(*limits[key]), folder)
            except RuntimeError as error:  # no reference: nothing can be certified
                print(f"{name}, {key}: {error}", file=sys.stderr)
                results[key][name] = {}
            say(began, name, key)
        save()
    for key, scale in scales.items():
        scaled[key] = (scale.title, scale.run([t for t in tools if "compiled" not in t.name], quick, folder))
        say(began, "scaling", key)
        save()

    print(save())
    if problems := {key: "no reference" for key, columns in results.items() if not all(columns.values())}:
        raise SystemExit(json.dumps(problems))


def say(began: float, *what: str) -> None:
    wall, cpu = time.perf_counter() - began, time.process_time()
    print(f"{wall:6.0f} s wall, {cpu:6.0f} s processor: {', '.join(what)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
