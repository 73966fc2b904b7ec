"""Memory of every included optimizer on a transformer of 10M parameters: counted in its state, and seen by the system.

    python benchmarks/optimizer_memory.py [--only NAME ...] [--out results/optimizer_memory]

A process of its own for each optimizer, forked: two real steps on the model, after two on a small one that load all
code.
"State" walks the tensors that the optimizer keeps; "resident" is the growth of the process's resident memory over both
steps, so that tensors kept elsewhere show; "peak" is that growth at its highest during the second step, with what the
step needs for itself. Linux only; four minutes.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import platform
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from sharpscope.dynamics.optimizer_measurements import state_bytes_of
from sharpscope.dynamics.optimizers import make_optimizer, optimizer_names
from sharpscope.dynamics.optimizers.choice import needs_closure, optimizer_class
from sharpscope.dynamics.workloads.models import CharTransformer

# Freed memory goes back to the system, so that the resident set is what is in use. Nothing is compiled.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
LARGE = {"vocabulary": 8000, "length": 256, "width": 320, "num_heads": 5, "num_layers": 6}
SMALL = {"vocabulary": 300, "length": 16, "width": 64, "num_heads": 4, "num_layers": 1}
# What is run besides the defaults of every name.
VARIANTS = {
    "SGD": [{"momentum": 0.9}],
    "AdamW4bit": [{"map": "square"}, {"v": "block"}, {"v": "factor"}, {"rounding": "stochastic"}],
    "PSGD": [{"kind": "xmat"}, {"kind": "lra"}, {"kind": "kron"}],
}
# Options without a default.
REQUIRED = {
    "AcceleratedSGD": {"gamma": 1e-3, "beta": 1e-2},
    "HeavyTailedSGD": {"alpha": 1.5, "sigma": 1e-4},
    "LangevinSGD": {"temperature": 1e-8},
}
THIRD_PARTY = ["torchao AdamW4bit", "torchao AdamW8bit", "bitsandbytes AdamW8bit"]
# Bytes of state for each parameter that an optimizer may take at most.
BOUNDS = {"AdamW4bit": 1.10, "AdamMini": 4.1, "SGDSaI": 4.01, "Lion": 4.01}
STEPS, BATCH, TOKENS = 2, 2, 16


def model_of(sizes):
    torch.manual_seed(0)
    return CharTransformer(sizes.pop("vocabulary"), **sizes)


def optimizer_of(name, options, model):
    package, _, kind = name.rpartition(" ")
    if package == "torchao":
        import torchao.optim

        return getattr(torchao.optim, kind)(model.parameters())
    if package == "bitsandbytes":
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, kind)(model.parameters())
    known = inspect.signature(optimizer_class(name).__init__).parameters
    lr = {"lr": 1e-4} if "lr" in known else {}
    return make_optimizer(name, model, {**lr, **REQUIRED.get(name, {}), **options})


def step_of(optimizer, model, vocabulary):
    tokens = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % vocabulary

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(tokens), tokens)
        loss.backward()
        return loss

    if needs_closure(optimizer):
        return lambda: optimizer.step(closure)

    def step():
        closure()
        optimizer.step()

    return step


def resident(field="VmRSS"):
    """Bytes; "VmHWM" is the highest since it was last reset."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def measured(name, options):
    """One optimizer, in this process."""
    torch.set_num_threads(1)
    small = model_of(dict(SMALL))
    warm = step_of(optimizer_of(name, options, small), small, SMALL["vocabulary"])
    for _ in range(STEPS):
        warm()
    del warm, small
    model = model_of(dict(LARGE))
    entries = sum(p.numel() for p in model.parameters())
    # Gradients are there before, as in any training.
    step_of(torch.optim.SGD(model.parameters(), lr=0.0), model, LARGE["vocabulary"])()
    before = resident()
    optimizer = optimizer_of(name, options, model)
    step = step_of(optimizer, model, LARGE["vocabulary"])
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")
        step()
    peak = resident("VmHWM") - before
    return {
        "parameters": entries,
        "state": state_bytes_of(optimizer),
        "resident": resident() - before,
        "peak": peak,
    }


def run(name, options):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(measured, name, options).result(timeout=600)
        except Exception as error:  # one that fails is a line of the report
            return {"failed": f"{type(error).__name__}: {error}"[:200]}


def title(name, options):
    return " ".join([name, *(f"{key}={value}" for key, value in options.items())])


def table(results):
    found = {name: row for name, row in results.items() if "failed" not in row}
    entries = next(iter(found.values()))["parameters"]
    lines = [
        "# Memory of the optimizers",
        "",
        f"{machine()}. Written by `benchmarks/optimizer_memory.py`: a transformer of {entries:,} parameters "
        "(embedding of 8000 tokens, six layers of width 320, tied output), float32, two steps. Bytes for each "
        "parameter: state, the tensors that the optimizer keeps; resident, growth of the process's memory; peak, the "
        "same at its highest in a step, activations and temporary tensors among it.",
        "",
        "| optimizer | state | resident | peak | state, MB | state at most |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in sorted(found.items(), key=lambda item: (item[1]["state"], item[0])):
        each = [f"{row[kind] / entries:.3f}" for kind in ("state", "resident", "peak")]
        bound = BOUNDS.get(name.split()[0])
        held = "" if bound is None else f"{bound:.2f}: {'yes' if row['state'] <= bound * entries else 'NO'}"
        lines.append(f"| {name} | {' | '.join(each)} | {row['state'] / 1e6:.2f} | {held} |")
    failed = {name: row["failed"] for name, row in results.items() if "failed" in row}
    if failed:
        lines += ["", "Not measured:", "", *(f"- {name}: {reason}" for name, reason in failed.items())]
    return "\n".join(lines) + "\n"


def machine():
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("torchao", "bitsandbytes"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return ", ".join(versions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of optimizers; prints, and writes nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optimizer_memory")
    args = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    warnings.simplefilter("ignore")
    names = args.only or [*optimizer_names(), *THIRD_PARTY]
    results = {}
    for name in names:
        for options in [*([{}] if name != "PSGD" else []), *VARIANTS.get(name, [])]:
            row = results[title(name, options)] = run(name, options)
            print(f"{title(name, options)}: {row}", flush=True)
    if args.only:
        return
    args.out.with_suffix(".json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
