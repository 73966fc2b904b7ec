"""Command line: spring all traps on one tool, print the verdicts, optionally write them as JSON."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import importlib.util
import json
import signal
from pathlib import Path
from types import FrameType

import torch

from . import TRAPS, Adapter, Outcome, Trap, Verdict


def load(path: Path) -> Adapter:
    """The object `adapter` of a Python file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "adapter", None), Adapter):
        raise SystemExit(f"{path} has no object `adapter` that is a curvature_traps.Adapter")
    return module.adapter


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("no answer within the time limit")


def spring(trap: Trap, tool: Adapter, limit: int) -> Outcome:
    """One trap under a time limit in seconds; running past it is a crash."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(limit)
    try:
        return trap.spring(tool)
    finally:
        signal.alarm(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m curvature_traps", description=__doc__)
    parser.add_argument("file", type=Path, help="Python file that binds `adapter`")
    parser.add_argument("--only", default="*", help="glob over the names of traps")
    parser.add_argument("--slow", action="store_true", help="also those that take more than a few seconds")
    parser.add_argument("--limit", type=int, default=120, help="seconds for each trap")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tool = load(options.file)
    outcomes = []
    for trap in TRAPS:
        if fnmatch.fnmatchcase(trap.name, options.only) and (options.slow or not trap.slow):
            outcomes.append(outcome := spring(trap, tool, options.limit))
            print(f"{outcome.verdict:<12}{trap.name:<36}{outcome.detail} ({outcome.seconds:.1f} s)", flush=True)
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    print(f"{tool.name} {tool.version}: " + ", ".join(f"{counts[v]} {v}" for v in Verdict if counts[v]))
    if options.json is not None:
        record = {
            "tool": tool.name,
            "version": tool.version,
            "torch": torch.__version__,
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
        }
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return 0 if counts[Verdict.PASS] + counts[Verdict.NOT_OFFERED] == len(outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
