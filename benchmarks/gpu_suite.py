"""Everything that needs a GPU, in one run of under ten minutes: tests, compute-sanitizer, timings.

    python benchmarks/gpu_suite.py                 # results/gpu-<device>.json, and kernels/verified.json if all is well
    python benchmarks/gpu_suite.py --dry-run       # every stage on the CPU with tiny sizes, to rehearse the suite

sharpscope need not be installed: it is imported from this checkout. Every stage has processes of its own, and the
result file is replaced after each, so that a crash, a hang or a limit loses nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu.checkout import ROOT, commit, cuda_hashes, environment, make_importable
from gpu.process import run
from gpu.report import table, write_json
from gpu.targets import judged
from gpu.testing import gpu_test_files, run_tests, sanitize

GROUPS = ("step", "lanczos", "quadrature", "codec")
REHEARSED = ROOT / "tests" / "kernels" / "gpu"
RECORD = ROOT / "kernels" / "verified.json"
SECONDS = 570.0
# Most of a stage, in seconds; no stage gets more than what is left of the whole.
LIMITS = {"facts": 90.0, "compile": 90.0, "tests": 280.0}
LIMITS |= {"step": 150.0, "lanczos": 90.0, "quadrature": 60.0, "codec": 90.0}
SANITIZER_LIMIT = 200.0
# What the other stages leave of the whole for the sanitizer.
SANITIZER_RESERVE = 120.0


class Suite:
    """One run: its options, and the results so far."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch, self.began = options, scratch, time.monotonic()
        rehearsal = {"SHARPSCOPE_GPU_TESTS_ON": "cpu"} if options.dry_run else {}
        self.env = environment(make_importable(scratch / "importable"), **rehearsal)
        self.mode = "dry" if options.dry_run else "quick" if options.quick else "full"
        self.results: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "mode": self.mode,
            "commit": options.commit or commit(),
            "files": cuda_hashes(),
            "environment": {},
            "timings": {},
            "errors": {},
        }

    @property
    def out(self) -> Path:
        """The result file; named after the device once that is known."""
        if self.options.out:
            return self.options.out
        device = self.results["environment"].get("device", "unknown")
        name = "-".join("".join(c if c.isalnum() else " " for c in device).split()).lower()
        return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do it; keep what it raises, and write what there is."""
        began = time.monotonic()
        print(f"[{began - self.began:5.0f} s] {name}", flush=True)
        try:
            work()
        except Exception:
            self.results["errors"][name] = traceback.format_exc()
        self.results.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        write_json(self.out, self.results)

    def limit(self, most: float, *, reserve: float = SANITIZER_RESERVE) -> float:
        """Seconds that a stage may take, if those after it need `reserve`."""
        left = self.options.seconds - (time.monotonic() - self.began)
        return max(1.0, min(most, left - (0.0 if self.options.skip_sanitizer else reserve)))

    def worker(self, group: str) -> dict[str, Any]:
        """What a worker process wrote; its end is kept as an error if it was not a good one."""
        path = self.scratch / f"{group}.json"
        command = [sys.executable, "-m", "gpu.worker", group, path, self.mode]
        done = run(command, env=self.env, cwd=ROOT, limit=self.limit(LIMITS[group]))
        found = json.loads(path.read_text()) if path.exists() else {}
        if done.code != 0:
            how = "stopped at its time limit" if done.code is None else f"ended with exit status {done.code}"
            if rival := found.get("waiting_for"):
                found["not_run"][rival] = f"not run: the process {how}"
            else:
                self.results["errors"][group] = f"{how}\n{done.tail}"
        return found

    def facts(self) -> None:
        """The machine, and its compiled kernels."""
        self.results["environment"] = self.worker("facts")
        self.results["compiled"] = self.worker("compile")

    def tests(self) -> None:
        """All tests with the marker, and the record of it."""
        # A rehearsal takes the tests that can run without CUDA.
        folder = REHEARSED if self.options.dry_run else ROOT / "tests"
        files = self.options.tests or gpu_test_files(folder)
        at_once = min(4, max(1, (os.cpu_count() or 1) // 2))
        limit = self.limit(LIMITS["tests"])
        self.results["tests"] = run_tests(files, env=self.env, scratch=self.scratch, limit=limit, at_once=at_once)
        self.results["verified"] = self.record()
        self.results["skipped"] = [skipped for part in self.results["tests"]["files"] for skipped in part["skipped"]]

    def record(self) -> bool:
        """Write which device passed with which files, if every test file passed and the files are still the same."""
        tests, device = self.results["tests"], self.results["environment"].get("device")
        targets = self.records()
        if not (tests["all_passed"] and device and targets and self.results["files"] == cuda_hashes()):
            return False
        for target in targets:
            write_json(target, {"device": device, "date": self.results["date"], "files": self.results["files"]})
        return True

    def records(self) -> list[Path]:
        """Where the verification goes: into the checkout, and beside a result file that was chosen."""
        if self.options.record:
            return [self.options.record]
        if self.options.dry_run:
            return []
        return [RECORD, *([self.options.out.parent / RECORD.name] if self.options.out else [])]

    def timings(self, group: str) -> None:
        """One group, and the targets as they stand."""
        found = self.results["timings"][group] = self.worker(group)
        problems = [*found.get("errors", ()), *filter(None, [self.results["errors"].get(group)])]
        if problems:
            self.results["errors"][group] = "\n".join(problems)
        parts = self.results["timings"].values()
        self.results["targets"] = judged({name: x for part in parts for name, x in part.get("figures", {}).items()})

    def sanitizer(self) -> None:
        """The small tests under compute-sanitizer."""
        limit = self.limit(SANITIZER_LIMIT, reserve=0.0)
        self.results["sanitizer"] = sanitize(env=self.env, scratch=self.scratch, limit=limit)
        if self.findings and self.results.get("verified"):
            for target in self.records():
                target.unlink(missing_ok=True)
            self.results["verified"] = False

    @property
    def findings(self) -> bool:
        """Something wrong in our kernels under compute-sanitizer."""
        return any(found["result"].startswith("findings") for found in self.results.get("sanitizer", {}).values())

    def run(self) -> int:
        """All stages; the exit status: 0, or 1 where a test, a stage or the sanitizer found something."""
        self.stage("facts", self.facts)
        self.stage("tests", self.tests)
        for group in GROUPS:
            self.stage(group, lambda group=group: self.timings(group))
        if not self.options.skip_sanitizer:
            self.stage("sanitizer", self.sanitizer)
        print("\n" + table(self.results))
        print(f"\nwritten to {self.out}")
        tests = self.results.get("tests", {"all_passed": False, "files": []})
        # In a rehearsal a file may skip all it has, for want of CUDA.
        rehearsed = self.options.dry_run and not any(part["failures"] for part in tests["files"])
        fine = (tests["all_passed"] or rehearsed) and not self.findings and not self.results["errors"]
        return 0 if fine else 1


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/gpu-<device>.json")
    parser.add_argument("--quick", action="store_true", help="no sizes above 1e7")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument(
        "--dry-run", action="store_true", help="rehearse on the CPU; kernels/verified.json is left alone"
    )
    parser.add_argument(
        "--record", type=Path, help="write the verification here only, not to kernels/verified.json and beside --out"
    )
    parser.add_argument("--commit", help="what to call the checkout; default what git says")
    parser.add_argument("--tests", type=Path, nargs="*", help="test files; default all with the marker `gpu`")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of the whole run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    with TemporaryDirectory() as scratch:
        return Suite(options, Path(scratch)).run()


if __name__ == "__main__":
    sys.exit(main())
