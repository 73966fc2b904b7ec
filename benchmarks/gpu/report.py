"""Results that are on disk after every step, and a table of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Replace the file at once: a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


class Part:
    """The results of one group of timings.

    Attributes:
        measurements: One record for each thing that was timed.
        figures: The numbers that targets speak of, by name.
        errors: What could not be measured, and why.
        not_run: Programs of others that could not be measured beside ours, and why; that is no error.
        waiting_for: Such a program while it runs, so that its end of the process is not taken for ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measurements: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.errors: list[str] = []
        self.not_run: dict[str, str] = {}
        self.waiting_for: str | None = None

    def add(self, what: str, n: int, timing: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Keep a measurement."""
        record = {"what": what, "n": n, **timing, **more}
        self.measurements.append(record)
        self.save()
        return record

    def figure(self, name: str, value: float) -> None:
        """Keep a number that a target speaks of."""
        self.figures[name] = value
        self.save()

    def fail(self, what: str, error: Exception) -> None:
        """Keep why something was not measured; a wrong result is one of the reasons."""
        self.errors.append(f"{what}: {type(error).__name__}: {error}"[:2000])
        self.save()

    def rival(self, what: str, n: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Keep the timing of a program of others, or why there is none."""
        self.waiting_for = what
        self.save()
        try:
            return self.add(what, n, measure())
        except Exception as error:
            self.not_run[what] = f"not run: {type(error).__name__}: {error}"[:2000]
            return None
        finally:
            self.waiting_for = None
            self.save()

    def save(self) -> None:
        """Write what there is."""
        names = ("measurements", "figures", "errors", "not_run", "waiting_for")
        write_json(self.path, {name: getattr(self, name) for name in names})


def table(results: dict[str, Any]) -> str:
    """What a reader wants to know first."""
    facts = results.get("environment", {})
    lines = [f"{facts.get('device', 'no device')}: torch {facts.get('torch')}, CuPy {facts.get('cupy')}"]
    tests = results.get("tests")
    if tests:
        lines.append("tests: " + ", ".join(f"{count} {outcome}" for outcome, count in tests["counts"].items()))
        for part in tests["files"]:
            lines += [f"  FAILED {f['test'] or part['file']}: {f['text'][-300:]}" for f in part["failures"][:10]]
        lines.append(f"verified: {'yes' if results.get('verified') else 'no'}")
        lines += [f"  skipped {skipped['test']}: {skipped['text']}" for skipped in results.get("skipped", ())]
    lines += [f"sanitizer {tool}: {found['result']}" for tool, found in results.get("sanitizer", {}).items()]
    for name, part in results.get("timings", {}).items():
        lines.append(f"\n{name:58} {'n':>11} {'device µs':>11} {'wall µs':>11} {'copies':>7} {'correct':>8}")
        for m in part.get("measurements", ()):
            copies = f"{m['copies']:7.2f}" if m.get("copies") else " " * 7
            lines.append(
                f"  {m['what']:56} {m['n']:>11} {m['device_us']:11.1f} {m['wall_us']:11.1f} {copies} "
                f"{m.get('correct', '')!s:>8}"
            )
        lines += [f"  {what}: {why}" for what, why in part.get("not_run", {}).items()]
        lines += [f"  ERROR {error}" for error in part.get("errors", ())]
    lines.append("")
    for target in results.get("targets", ()):
        found = "" if target["value"] is None else f"{target['value']:.3g}"
        lines.append(f"{target['status']:8} {target['name']}: {found} ({target['rule']})")
    lines += [f"STAGE FAILED {stage}: {error[-500:]}" for stage, error in results.get("errors", {}).items()]
    return "\n".join(lines)
