"""What the GPU suite times with and keeps results in, on a CPU."""

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_suite
from gpu.clock import Clock
from gpu.report import Part
from gpu.worker import compile_all
from sharpscope.kernels import _cupy, adamw4_cuda, codec_cuda, lanczos_cuda, tridiagonal_cuda


def test_a_clock_goes_round_all_sets_and_takes_medians():
    calls = []
    clock = Clock(torch.device("cpu"), 7)
    timing = clock.measure([lambda i=i: calls.append(i) for i in range(3)])
    assert timing["repetitions"] == 7
    assert timing["sets"] == 3
    assert calls == [0, 1, 2, 0, *[0, 1, 2, 0, 1, 2, 0] * 2]
    assert timing["device_best_us"] <= timing["device_us"] <= timing["device_worst_us"]
    assert clock.sets_for(10 * clock.l2_bytes) == 4
    assert clock.sets_for(clock.l2_bytes // 4) == 8


def test_parts_are_on_disk_after_every_step(tmp_path):
    part = Part(tmp_path / "part.json")
    part.add("thing", 5, {"device_us": 1.0})
    part.fail("other", ValueError("bad"))
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "measurements": [{"what": "thing", "n": 5, "device_us": 1.0}],
        "figures": {},
        "errors": ["other: ValueError: bad"],
        "not_run": {},
        "waiting_for": None,
    }


def test_rivals_that_fail_are_no_errors_and_lose_nothing(tmp_path):
    path = tmp_path / "part.json"
    part, during = Part(path), []

    def refuses():
        during.append(json.loads(path.read_text())["waiting_for"])
        raise RuntimeError("no solver")

    part.add("ours", 5, {"device_us": 1.0})
    assert part.rival("theirs", 5, refuses) is None
    assert part.rival("another", 5, lambda: {"device_us": 2.0}) == {"what": "another", "n": 5, "device_us": 2.0}
    found = json.loads(path.read_text())
    assert during == ["theirs"]
    assert [m["what"] for m in found["measurements"]] == ["ours", "another"]
    assert found["not_run"] == {"theirs": "not run: RuntimeError: no solver"}
    assert found["errors"] == []
    assert found["waiting_for"] is None


def test_slow_rivals_are_called_once_more_only(monkeypatch):
    calls = []
    clock = Clock(torch.device("cpu"), 20)
    timing = clock.glance(lambda: calls.append(1))
    assert (timing["repetitions"], timing["sets"], len(calls)) == (5, 1, 6)
    assert timing["device_best_us"] <= timing["wall_us"] == timing["device_us"] <= timing["device_worst_us"]
    monkeypatch.setattr("gpu.clock.PATIENCE", 0.0)
    calls.clear()
    assert (clock.glance(lambda: calls.append(1))["repetitions"], len(calls)) == (2, 2)


def test_all_programs_are_compiled_at_once_for_the_device(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(_cupy, "architecture", lambda capability: f"sm_{capability[0]}{capability[1]}")
    monkeypatch.setattr(_cupy, "cubin", lambda source, arch: seen.append((source, arch)) or len(seen))
    every = [s for module in (codec_cuda, adamw4_cuda, lanczos_cuda, tridiagonal_cuda) for s in module.SOURCES]
    assert compile_all(dry=True)["programs"] == 0
    assert seen == []
    found = compile_all(dry=False)
    assert (found["programs"], found["architecture"]) == (len(every), "sm_90")
    assert found["seconds"] >= 0
    assert set(seen) == {(source, "sm_90") for source in every}


def test_findings_of_the_sanitizer_withdraw_the_record(monkeypatch, tmp_path):
    record = tmp_path / "record.json"
    options = ["--out", str(tmp_path / "out.json"), "--record", str(record)]
    for result, kept in (("clean, 3 tests", True), ("findings: 1, in lanczos_dots", False)):
        (tmp_path / str(kept)).mkdir()
        suite = gpu_suite.Suite(gpu_suite.parsed(options), tmp_path / str(kept))
        suite.results |= {"tests": {"all_passed": True}, "environment": {"device": "GPU"}}
        suite.results["verified"] = suite.record()
        monkeypatch.setattr(gpu_suite, "sanitize", lambda result=result, **_: {"memcheck": {"result": result}})
        suite.sanitizer()
        assert suite.results["verified"] is kept
        assert record.exists() is kept
