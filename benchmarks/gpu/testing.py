"""The GPU tests, one process for each file, and the same under compute-sanitizer."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .checkout import ROOT, kernel_names
from .process import Finished, run

SMALL = ROOT / "tests" / "kernels" / "gpu" / "test_small.py"
FILES_AT_ONCE = 4
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
QUOTED = 3000
OUTCOMES = ("passed", "failed", "skipped", "error")
MARKED = re.compile(r"^\s*(?:@pytest\.mark\.gpu\b|pytestmark = .*\bgpu\b|.*\bmarks=pytest\.mark\.gpu\b)", re.MULTILINE)
SAYS = re.compile("={9}( |$)")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def gpu_test_files(folder: Path) -> list[Path]:
    """Every test file of a folder that has tests with the marker `gpu`."""
    return [path for path in sorted(folder.rglob("test_*.py")) if MARKED.search(path.read_text())]


def run_tests(
    files: Sequence[Path], *, env: Mapping[str, str], scratch: Path, limit: float, at_once: int = FILES_AT_ONCE
) -> dict[str, Any]:
    """Outcomes of all files within `limit` seconds; a crash, a hang and an error while collecting count as failures."""
    end = time.monotonic() + limit

    def run_file(number: int) -> dict[str, Any]:
        record = scratch / f"tests{number}.jsonl"
        return _run_file(files[number], env=env, record=record, limit=end - time.monotonic())

    with ThreadPoolExecutor(at_once) as pool:
        parts = list(pool.map(run_file, range(len(files))))
    counts = {outcome: sum(part["counts"][outcome] for part in parts) for outcome in OUTCOMES}
    return {"counts": counts, "all_passed": bool(parts) and all(part["all_passed"] for part in parts), "files": parts}


def _run_file(path: Path, *, env: Mapping[str, str], record: Path, limit: float) -> dict[str, Any]:
    done = run(_pytest(path), env={**env, "GPU_SUITE_RECORD": str(record)}, cwd=ROOT, limit=limit)
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return {"file": name, **outcomes(record, done)}


def _pytest(path: Path) -> list[str | Path]:
    options = ["-m", "gpu", "-q", "-p", "gpu.recorder", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120"]
    return [sys.executable, "-m", "pytest", *options, path]


def outcomes(record: Path, done: Finished) -> dict[str, Any]:
    """What the recorder wrote, and what it could not: a test that was running when its process ended."""
    lines = record.read_text().splitlines() if record.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    final = {event["test"]: event for event in events if event["outcome"] != "started"}
    unfinished = [event["test"] for event in events if event["test"] not in final]
    counts = {outcome: sum(event["outcome"] == outcome for event in final.values()) for outcome in OUTCOMES}
    failures = [{"test": e["test"], "text": e["text"]} for e in final.values() if e["outcome"] in ("failed", "error")]
    how = "stopped at its time limit" if done.code is None else f"ended with exit status {done.code}"
    failures += [{"test": test, "text": f"running when pytest {how}"} for test in unfinished]
    if done.code != 0 and not failures:
        failures.append({"test": "", "text": f"pytest {how}\n{done.tail}"})
    return {
        "counts": {**counts, "error": counts["error"] + len(unfinished)},
        "all_passed": done.code == 0 and not failures and counts["passed"] > 0,
        "seconds": done.seconds,
        "failures": failures,
        "skipped": [{"test": e["test"], "text": e["text"]} for e in final.values() if e["outcome"] == "skipped"],
        "slowest": sorted(((round(e["seconds"], 2), e["test"]) for e in final.values()), reverse=True)[:5],
    }


def sanitize(*, env: Mapping[str, str], scratch: Path, limit: float, path: Path = SMALL) -> dict[str, Any]:
    """The small tests under every tool of compute-sanitizer, side by side."""
    program = shutil.which("compute-sanitizer", path=f"{env.get('PATH', '')}:/usr/local/cuda/bin")
    if program is None:
        return {tool: {"result": "refused: compute-sanitizer is not installed"} for tool in TOOLS}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = pool.map(lambda tool: _sanitize(program, tool, env, scratch, limit, path), TOOLS)
        return dict(zip(TOOLS, found, strict=True))


def _sanitize(
    program: str, tool: str, env: Mapping[str, str], scratch: Path, limit: float, path: Path
) -> dict[str, Any]:
    record = scratch / f"{tool}.jsonl"
    # torch's cache of memory would hide what goes beyond a tensor, and what was never written.
    variables = {**env, "GPU_SUITE_RECORD": str(record), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    done = run(
        [program, "--tool", tool, "--print-limit", "1000", *quiet, *_pytest(path)], env=variables, cwd=ROOT, limit=limit
    )
    return {"seconds": done.seconds, **verdict(done, outcomes(record, done), kernel_names())}


def verdict(done: Finished, tests: dict[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """clean, findings in kernels of `ours`, or why the tool gave no answer.

    Reports on kernels of torch are counted, but are no findings.
    """
    if done.code is None:
        return {"result": "refused: it did not end within its time limit", "tail": done.tail}
    said = [line for line in done.output.splitlines() if SAYS.match(line)]
    summaries = [int(match[1] or match[2]) for match in SUMMARY.finditer(done.output)]
    if "Device not supported" in done.output or not summaries:
        reasons = [line.strip("= ") for line in said if line.strip("= ") and "COMPUTE-SANITIZER" not in line]
        reason = (reasons or done.output.splitlines()[-1:] or ["it said nothing"])[0]
        return {"result": f"refused: {reason}", "tail": done.tail}
    reports, text = sum(summaries), "\n".join(said)
    named = sorted(set(re.findall(r"\w+", text)) & set(ours))
    if named:
        result = f"findings: {reports}, in {', '.join(named)}"
        return {"result": result, "kernels": named, "text": _around(said, named)}
    if not tests["all_passed"]:
        return {"result": "refused: the tests did not pass under the tool", "failures": tests["failures"][:3]}
    others = f", {reports} reports on kernels that are not ours" if reports else ""
    found = {"result": f"clean, {tests['counts']['passed']} tests{others}"}
    return {**found, "text": text[:QUOTED]} if reports else found


def _around(said: list[str], named: list[str]) -> str:
    """What was said from a little before the first of our kernels."""
    at = next(i for i, line in enumerate(said) if set(re.findall(r"\w+", line)) & set(named))
    return "\n".join(said[max(at - 2, 0) :])[:QUOTED]
