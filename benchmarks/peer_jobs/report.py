"""The results as JSON and as Markdown."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .jobs import JOBS
from .measure import Outcome
from .tools import Tool

Table = Mapping[str, Mapping[str, Outcome]]

RULES = """\
Unit: one gradient, that is one forward and one backward pass over the same data in the same process and round; {clock}.
Each cell is the median over the rounds with the quartiles in brackets. In each round all tools run in turns, in random
order, each on its own copy of the model. First calls are not counted, for any tool. Eigenvalues are counted from the
construction of the operator on, with a new random start in each round; of a product only the product itself is counted,
so that what keeps graphs has them.

True errors come from float64: products by double backward with torch alone, relative to the exact product; eigenvalues
of largest modulus by SciPy's ARPACK on those products, and sharpscope's float64 values agree with them to 1e-7. The
error of eigenvalues is the largest of the k, over the largest modulus. ✗ marks a tool that missed the tolerance: the
rounds in which it met it, and its worst error. A tool whose error is not shown met it in every round.

hessian-eigenthings has no rule that ends its Lanczos run: only the run whose own flags say "converged" is counted,
although a user pays for the shorter ones before it. curvlinops' check of determinism is off. "More than 200" is a run
that was ended there.
"""


def provenance(threads: int, mode: str, tools: Sequence[Tool], missing: Mapping[str, str]) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "mode": mode,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scipy": version("scipy"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "tools": {tool.name: tool.version for tool in tools},
        "missing": dict(missing),
    }


def cpu_name() -> str:
    """The processor's name, with its model number where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        facts.setdefault(key.strip(), value.strip())
    return f"{facts.get('model name', platform.machine())}, model {facts.get('model', '?')}"


def best_peer(outcomes: Mapping[str, Outcome], tools: Sequence[Tool], *, always: bool) -> str | None:
    """The fastest of the others that met the tolerance in every round, or else in most of them."""
    ours = {tool.name for tool in tools if tool.ours}
    fit = {
        name: outcome.quantile(0.5)
        for name, outcome in outcomes.items()
        if name not in ours and (outcome.met_always() if always else outcome.met_mostly())
    }
    return min(fit, key=lambda name: fit[name]) if fit else None


def ratio(outcomes: Mapping[str, Outcome], name: str, peer: str | None) -> float | None:
    """Median time of `name` over that of `peer`, if `name` met the tolerance in every round."""
    if peer is None or name not in outcomes or not outcomes[name].met_always():
        return None
    return outcomes[name].quantile(0.5) / outcomes[peer].quantile(0.5)


def cell(outcome: Outcome | None, marks: list[str]) -> str:
    """`2.29 [2.28, 2.36]`, with what was wrong behind it; failures become footnotes in `marks`."""
    if outcome is None:
        return "-"
    if outcome.failure is not None:
        if outcome.ended:
            return outcome.failure
        if outcome.failure not in marks:
            marks.append(outcome.failure)
        return f"fails ({marks.index(outcome.failure) + 1})"
    if not outcome.samples:
        return "-"
    low, middle, high = (figure(outcome.quantile(q)) for q in (0.25, 0.5, 0.75))
    text = f"{middle} [{low}, {high}]" if len(outcome.samples) > 1 else middle
    products = [sample.products for sample in outcome.samples if sample.products]
    if products and max(products) > 1:
        text += f", {statistics.median(products):.0f} products"
    if not outcome.met_always():
        worst = max(sample.error for sample in outcome.samples)
        text += f" ✗ {outcome.met}/{len(outcome.samples)}, error {worst:.0e}"
    return text


def figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(corner: str, columns: Table, tools: Sequence[Tool], marks: list[str]) -> list[str]:
    """One row a tool, one column a model."""
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for tool in tools:
        if any(tool.name in outcomes for outcomes in columns.values()):
            cells = [cell(outcomes.get(tool.name), marks) for outcomes in columns.values()]
            lines.append(f"| {tool.name} | " + " | ".join(cells) + " |")
    return lines


def ratios(columns: Table, tools: Sequence[Tool]) -> dict[str, dict[str, dict[str, Any]]]:
    """By row of ours and kind of peer: the ratio and the peer on each model, and the geometric mean."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for tool in tools:
        if not tool.ours or not any(tool.name in outcomes for outcomes in columns.values()):
            continue
        found[tool.name] = {}
        for kind in ("every round", "most rounds"):
            peers = {
                model: best_peer(outcomes, tools, always=kind == "every round") for model, outcomes in columns.items()
            }
            values = {model: ratio(columns[model], tool.name, peer) for model, peer in peers.items()}
            known = [value for value in values.values() if value is not None]
            mean = math.exp(statistics.fmean(map(math.log, known))) if known else None
            found[tool.name][kind] = {"ratios": values, "peers": peers, "geometric mean": mean, "models": len(known)}
    return found


def ratio_table(columns: Table, tools: Sequence[Tool]) -> list[str]:
    heads = [*columns, "geometric mean"]
    lines = ["| ratio to the best peer that met the tolerance in | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for name, kinds in ratios(columns, tools).items():
        for kind, row in kinds.items():
            cells = [
                "-" if row["ratios"][model] is None else f"{row['ratios'][model]:.2f} ({row['peers'][model]})"
                for model in columns
            ]
            mean = "-" if row["geometric mean"] is None else f"**{row['geometric mean']:.2f}** of {row['models']}"
            lines.append(f"| {name}, {kind} | " + " | ".join([*cells, mean]) + " |")
    return lines


def markdown(
    facts: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Table],
    scales: Mapping[str, tuple[str, Table]],
    tools: Sequence[Tool],
) -> str:
    """The whole report."""
    clock = "processor seconds with one thread" if facts["threads"] == 1 else "wall seconds"
    lines = [
        "# sharpscope and its peers",
        "",
        f"Made by `python benchmarks/peers.py --{facts['mode']}`: Python {facts['python']}, torch {facts['torch']}, "
        f"NumPy {facts['numpy']}, SciPy {facts['scipy']}; {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['threads']} thread(s).",
        "",
        ", ".join(f"{name} {release}".strip() for name, release in facts["tools"].items()) + ".",
        "",
        *[f"Not installed: `{name}` ({reason})." for name, reason in facts["missing"].items()],
        RULES.format(clock=clock),
        "| model | parameters | examples | one gradient, ms | |",
        "|---|---|---|---|---|",
        *[
            f"| {name} | {m['parameters']:,} | {m['examples']} | {1e3 * m['gradient_seconds']:.1f} | {m['about']} |"
            for name, m in models.items()
        ],
        "",
    ]
    for key, columns in results.items():
        marks: list[str] = []
        lines += [f"## {JOBS[key].title}", ""]
        lines += [*table("gradients", columns, tools, marks), "", *ratio_table(columns, tools), "", *_notes(marks)]
    if scales:
        lines += ["# Scaling", "", "Random initial weights; the same unit and rules.", ""]
    for title, columns in scales.values():
        marks = []
        lines += [f"## {title}", "", *table("gradients", columns, tools, marks), "", *_notes(marks)]
    return "\n".join(lines).rstrip() + "\n"


def _notes(marks: Sequence[str]) -> list[str]:
    return [f"({number}) `{text.replace('`', '')}`  " for number, text in enumerate(marks, 1)] + ([""] if marks else [])


def as_json(
    facts: Mapping[str, Any],
    models: Mapping[str, Any],
    results: Mapping[str, Table],
    scales: Mapping[str, tuple[str, Table]],
    tools: Sequence[Tool],
) -> str:
    """Every sample, the ratios and what they depend on."""

    def plain(columns: Table) -> dict[str, dict[str, Any]]:
        return {
            model: {name: {**asdict(outcome), "met": outcome.met} for name, outcome in outcomes.items()}
            for model, outcomes in columns.items()
        }

    record = {
        "provenance": facts,
        "models": models,
        "jobs": {
            key: {"title": JOBS[key].title, "outcomes": plain(columns), "ratios": ratios(columns, tools)}
            for key, columns in results.items()
        },
        "scaling": {key: {"title": title, "outcomes": plain(columns)} for key, (title, columns) in scales.items()},
    }
    return json.dumps(_finite(record), indent=1) + "\n"


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
