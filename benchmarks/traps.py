"""The trap suite on sharpscope and its peers: writes results/traps.json and results/traps.md beside this file.

Run it in an environment that holds all of them (see README.md). Every tool has a process of its own, so
that none meets what another left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
SUITE = HERE.parent / "tests" / "traps"
ADAPTERS = (
    SUITE / "sharpscope_adapter.py",
    HERE / "adapters" / "pyhessian_adapter.py",
    HERE / "adapters" / "curvlinops_adapter.py",
    HERE / "adapters" / "hessian_eigenthings_adapter.py",
)
VERDICTS = ("pass", "wrong", "refused", "crash", "not offered")
MAX_DETAIL = 230

sys.path.insert(0, str(SUITE))
from curvature_traps import TRAPS  # noqa: E402


def spring_all(adapter: Path, options: list[str]) -> dict[str, Any]:
    """The record that `python -m curvature_traps` writes for one tool."""
    with TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "curvature_traps", str(adapter), "--json", str(record), *options]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SUITE)}, check=False)
        if not record.exists():
            raise SystemExit(f"{adapter.name} ended with code {done.returncode} before it wrote its record")
        return json.loads(record.read_text())


def cell(text: str) -> str:
    """Text that keeps to its cell of a table."""
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= MAX_DETAIL else text[: MAX_DETAIL - 2] + " …"


def table(records: list[dict[str, Any]]) -> str:
    """The verdicts as Markdown: counts, one line per trap, then what was measured."""
    names = [f"{r['tool']} {r['version']}" for r in records]
    by_tool = [{o["trap"]: o for o in r["outcomes"]} for r in records]
    traps = [trap for trap in TRAPS if trap.name in by_tool[0]]
    lines = [
        "# Known failures of curvature tools",
        "",
        f"torch {records[0]['torch']}, Python {platform.python_version()}, CPU, one thread. "
        "Made by `python benchmarks/traps.py`.",
        "",
        "**pass**: right against a dense float64 matrix or a closed form, and nothing left changed; where no right "
        "answer exists, a refusal that says why. **wrong**: a wrong number, or something left changed, without a word. "
        "**refused**: the tool's own error, or a result it flags as no answer, where a right answer is possible. "
        "**crash**: an error from elsewhere. **not offered**: no such feature.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(records),
    ]
    for verdict in VERDICTS:
        counts = [sum(o["verdict"] == verdict for o in tool.values()) for tool in by_tool]
        lines.append(f"| {verdict} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| trap | " + " | ".join(names) + " |", "|---|" + "---|" * len(records)]
    for trap in traps:
        verdicts = [tool[trap.name]["verdict"] for tool in by_tool]
        shown = [v if v in ("pass", "not offered") else f"**{v}**" for v in verdicts]
        lines.append(f"| {trap.name} | " + " | ".join(shown) + " |")
    lines += ["", "## What was asked and what came", ""]
    for trap in traps:
        lines += [
            f"### {trap.name}",
            "",
            trap.summary,
            "",
            "| tool | verdict | measured, or the error |",
            "|---|---|---|",
        ]
        for name, tool in zip(names, by_tool, strict=True):
            outcome = tool[trap.name]
            lines.append(f"| {name} | {outcome['verdict']} | {cell(outcome['detail'])} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave out traps that take more than a few seconds")
    parser.add_argument("--limit", type=int, default=300, help="seconds for each trap")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for traps.json and traps.md")
    arguments = parser.parse_args()
    options = ["--limit", str(arguments.limit), *([] if arguments.fast else ["--slow"])]
    records = [spring_all(adapter, options) for adapter in ADAPTERS]
    for record in records:
        for outcome in record["outcomes"]:
            del outcome["seconds"]  # differs between runs and says nothing about the verdict
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "traps.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    (arguments.output / "traps.md").write_text(table(records))


if __name__ == "__main__":
    main()
