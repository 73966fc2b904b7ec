"""The GPU suite, rehearsed on a CPU: what it runs, what it keeps of failures, when it calls kernels verified."""

import hashlib
import importlib
import json
import os
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_suite
from gpu.checkout import commit, cuda_hashes, environment, kernel_names, make_importable
from gpu.process import Finished, run
from gpu.report import Part, table, write_json
from gpu.targets import TARGETS, judged
from gpu.testing import TOOLS, gpu_test_files, run_tests, sanitize, verdict

ROOT = gpu_suite.ROOT
SKIPS = "import pytest\n\n@pytest.mark.gpu\ndef test_b():\n    pytest.skip('no device')\n"
PASSES = SKIPS + "\n@pytest.mark.gpu\ndef test_a():\n    pass\n"
FAILS = PASSES + "\n@pytest.mark.gpu\ndef test_c():\n    assert 1 == 2\n"
CRASHES = PASSES + "\n@pytest.mark.gpu\ndef test_c():\n    import os\n    os.abort()\n"
HANGS = PASSES + "\n@pytest.mark.gpu\ndef test_c():\n    import time\n    time.sleep(600)\n"
BROKEN = "import pytest, a_module_that_is_not_there\n"


@pytest.fixture
def env(tmp_path):
    return environment(make_importable(tmp_path / "importable"))


@pytest.fixture
def tests_in(tmp_path):
    """`tests_in(text)` -> a test file."""

    def make(text, name="test_it.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(exit status, output, results, record) of a whole dry run, whose test insists on the checkout's sharpscope."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_it.py").write_text(
        "import pytest, sharpscope.kernels\n\n@pytest.mark.gpu\ndef test_it():\n"
        "    assert '/importable/sharpscope/' in sharpscope.kernels.__file__\n"
    )
    out, record = folder / "out.json", folder / "verified.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_suite.py", "--dry-run", "--skip-sanitizer"]
    command += ["--out", out, "--record", record, "--tests", folder / "test_it.py"]
    before = hashes_of_the_record()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=120)
    assert hashes_of_the_record() == before
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text()), json.loads(record.read_text())


def hashes_of_the_record():
    return gpu_suite.RECORD.read_text() if gpu_suite.RECORD.exists() else None


def test_every_stage_runs_and_writes_what_it_found(rehearsal):
    status, output, results, record = rehearsal
    assert results["errors"] == {}
    assert status == 0
    assert {
        "date",
        "mode",
        "commit",
        "files",
        "environment",
        "tests",
        "timings",
        "targets",
        "seconds",
    } <= results.keys()
    assert results["mode"] == "dry"
    assert {"device", "torch", "python", "cupy", "nvrtc", "nvcc", "capabilities"} <= results["environment"].keys()
    assert {c["function"] for c in results["environment"]["capabilities"]} == {
        "codec",
        "adamw4",
        "lanczos",
        "tridiagonal",
    }
    assert results["tests"]["counts"] == {"passed": 1, "failed": 0, "skipped": 0, "error": 0}
    assert results["timings"].keys() == set(gpu_suite.GROUPS)
    for part in results["timings"].values():
        assert part["errors"] == []
        for measured in part["measurements"]:
            assert measured["device_us"] > 0
            assert measured["wall_us"] > 0
            assert measured["repetitions"] >= 3
            assert measured.get("correct") in (True, None)
    assert record == {"device": results["environment"]["device"], "date": results["date"], "files": results["files"]}
    assert "1 passed" in output


def test_every_target_is_measured_but_what_only_cupy_can_do(rehearsal):
    found = {target["name"]: target for target in rehearsal[2]["targets"]}
    assert len(found) == len(TARGETS)
    not_run = {name for name, target in found.items() if target["status"] == "not run"}
    assert not_run == {"quadrature (256, 64): times faster than cupy.linalg.eigh"}
    assert all(target["value"] > 0 for name, target in found.items() if name not in not_run)


def test_every_result_that_can_be_checked_was(rehearsal):
    measured = [m for part in rehearsal[2]["timings"].values() for m in part["measurements"]]
    ours = [m for m in measured if m["what"].startswith(("block", "rank-1", "quantize", "dequantize", "batched"))]
    assert len(ours) >= 16
    assert all(m["correct"] is True for m in ours if "torch operations" not in m["what"])
    assert all(m["sets"] >= 4 for m in ours if "Lanczos" not in m["what"])


def test_targets_are_met_missed_or_not_run():
    upper = next(target for target in TARGETS if target.rule == "<=")
    lower = next(target for target in TARGETS if target.rule == ">=")
    for target, good, bad in ((upper, 0.99, 1.01), (lower, 1.01, 0.99)):
        for factor, status in ((good, "met"), (bad, "missed"), (1.0, "met")):
            figures = {target.name: target.border * factor}
            statuses = {t["name"]: t["status"] for t in judged(figures)}
            assert statuses.pop(target.name) == status
            assert set(statuses.values()) == {"not run"}


@pytest.mark.parametrize(
    ("text", "counts", "passed", "words"),
    [
        (PASSES, {"passed": 1, "failed": 0, "skipped": 1, "error": 0}, True, None),
        (FAILS, {"passed": 1, "failed": 1, "skipped": 1, "error": 0}, False, "assert 1 == 2"),
        (CRASHES, {"passed": 1, "failed": 0, "skipped": 1, "error": 1}, False, "ended with exit status -6"),
        (HANGS, {"passed": 1, "failed": 0, "skipped": 1, "error": 1}, False, "stopped at its time limit"),
        (SKIPS, {"passed": 0, "failed": 0, "skipped": 1, "error": 0}, False, None),
        (BROKEN, {"passed": 0, "failed": 0, "skipped": 0, "error": 1}, False, "a_module_that_is_not_there"),
    ],
    ids=["passes", "fails", "crashes", "hangs", "skips", "broken"],
)
def test_no_outcome_of_a_test_is_lost(env, tests_in, tmp_path, text, counts, passed, words):
    limit = 6.0 if text == HANGS else 60.0
    found = run_tests([tests_in(text)], env=env, scratch=tmp_path, limit=limit)
    assert found["counts"] == counts
    assert found["all_passed"] is passed
    (part,) = found["files"]
    assert words is None or any(words in failure["text"] for failure in part["failures"])
    assert [failure["test"].split("::")[-1] for failure in part["failures"] if text in (FAILS, CRASHES, HANGS)] == (
        ["test_c"] if text in (FAILS, CRASHES, HANGS) else []
    )


def test_one_file_without_a_pass_spoils_all(env, tests_in, tmp_path):
    files = [tests_in(PASSES), tests_in(SKIPS, "test_other.py")]
    found = run_tests(files, env=env, scratch=tmp_path, limit=60)
    assert not found["all_passed"]
    assert found["counts"]["passed"] == 1
    assert not run_tests([], env=env, scratch=tmp_path, limit=60)["all_passed"]


def test_all_files_together_keep_the_limit(env, tests_in, tmp_path):
    files = [tests_in(HANGS), tests_in(HANGS, "test_other.py"), tests_in(HANGS, "test_third.py")]
    began = time.monotonic()
    found = run_tests(files, env=env, scratch=tmp_path, limit=4.0, at_once=1)
    assert time.monotonic() - began < 30
    assert not any(part["all_passed"] for part in found["files"])
    assert all("stopped at its time limit" in part["failures"][0]["text"] for part in found["files"])


def test_the_gpu_tests_of_the_repository_are_found(tmp_path):
    names = {path.relative_to(ROOT).as_posix() for path in gpu_test_files(ROOT / "tests")}
    assert {f"tests/kernels/gpu/test_{name}.py" for name in ("codec", "adamw4", "lanczos", "hessian", "small")} <= names
    assert "tests/kernels/test_gpu_suite.py" not in names  # it only writes such files
    for i, line in enumerate(("pytestmark = [pytest.mark.slow, pytest.mark.gpu]", "    @pytest.mark.gpu", "x = 'gpu'")):
        (tmp_path / f"test_{i}.py").write_text(f"import pytest\n{line}\n")
    assert [path.name for path in gpu_test_files(tmp_path)] == ["test_0.py", "test_1.py"]


def a_run(monkeypatch, tmp_path, *options):
    monkeypatch.setattr(gpu_suite, "GROUPS", ())
    arguments = ["--dry-run", "--skip-sanitizer", "--out", str(tmp_path / "out.json"), *map(str, options)]
    return gpu_suite.main(arguments), json.loads((tmp_path / "out.json").read_text())


def test_a_failing_test_gives_a_bad_exit_and_no_record(monkeypatch, tmp_path, tests_in):
    record = tmp_path / "verified.json"
    monkeypatch.setattr(gpu_suite.Suite, "facts", lambda self: self.results["environment"].update(device="GPU"))
    status, results = a_run(monkeypatch, tmp_path, "--tests", tests_in(FAILS), "--record", record)
    assert status == 1
    assert results["verified"] is False
    assert results["tests"]["counts"]["failed"] == 1
    assert not record.exists()
    assert "FAILED" in table(results)


def test_skipped_tests_are_fine_in_a_rehearsal_only_and_verify_nothing(monkeypatch, tmp_path, tests_in):
    record, path = tmp_path / "verified.json", tests_in(SKIPS)
    monkeypatch.setattr(gpu_suite.Suite, "facts", lambda self: self.results["environment"].update(device="GPU"))
    status, results = a_run(monkeypatch, tmp_path, "--tests", path, "--record", record)
    assert status == 0
    assert results["verified"] is False
    (skipped,) = results["skipped"]
    assert (skipped["test"].split("::")[-1], skipped["text"]) == ("test_b", "Skipped: no device")
    assert "verified: no\n  skipped " in table(results)
    assert not record.exists()
    options = ["--skip-sanitizer", "--out", str(tmp_path / "out.json"), "--tests", str(path), "--record", str(record)]
    assert gpu_suite.main(options) == 1
    assert not record.exists()


def test_a_stage_that_breaks_is_kept_and_the_others_run(monkeypatch, tmp_path, tests_in):
    monkeypatch.setattr(gpu_suite.Suite, "facts", lambda self: 1 / 0)
    record = tmp_path / "verified.json"
    status, results = a_run(monkeypatch, tmp_path, "--tests", tests_in(PASSES), "--record", record)
    assert status == 1
    assert "ZeroDivisionError" in results["errors"]["facts"]
    assert results["tests"]["all_passed"]
    assert not record.exists()  # without a device there is nothing to verify on


def test_files_that_change_during_the_run_are_not_verified(monkeypatch, tmp_path, tests_in):
    hashes = iter([{"codec.cu": "1"}, {"codec.cu": "2"}])
    monkeypatch.setattr(gpu_suite, "cuda_hashes", lambda: next(hashes))
    record = tmp_path / "verified.json"
    monkeypatch.setattr(gpu_suite.Suite, "facts", lambda self: self.results["environment"].update(device="GPU"))
    _, results = a_run(monkeypatch, tmp_path, "--tests", tests_in(PASSES), "--record", record)
    assert results["tests"]["all_passed"]
    assert results["verified"] is False
    assert not record.exists()


def test_the_record_is_what_capabilities_reads(monkeypatch, tmp_path, rehearsal):
    record = tmp_path / "verified.json"
    capabilities = importlib.import_module("sharpscope.kernels.capabilities")  # the name in the package is a function
    monkeypatch.setattr(capabilities, "RECORD", record)
    written = {**rehearsal[3], "files": cuda_hashes()}
    write_json(record, written)
    for function in ("codec", "adamw4", "lanczos", "tridiagonal"):
        assert capabilities.verification(function) == f"verified on {written['device']}, {written['date']}"
    write_json(record, {**written, "files": {name: "0" for name in written["files"]}})
    for function in ("codec", "adamw4", "lanczos", "tridiagonal"):
        assert "since it was changed" in capabilities.verification(function)


def a_suite(tmp_path, *options):
    """One that runs nothing by itself."""
    suite = gpu_suite.Suite(gpu_suite.parsed(["--out", str(tmp_path / "out.json"), *options]), tmp_path)
    suite.results["errors"] = {}
    return suite


def test_errors_stay_with_their_group(monkeypatch, tmp_path):
    suite = a_suite(tmp_path)
    parts = {
        "step": {"errors": ["one", "two"], "figures": {}},
        "codec": {"errors": [], "figures": {TARGETS[0].name: 9.0}},
    }
    monkeypatch.setattr(suite, "worker", lambda group: parts[group])
    for group in parts:
        suite.timings(group)
    assert suite.results["errors"] == {"step": "one\ntwo"}
    assert suite.results["targets"][0]["value"] == 9.0


@pytest.mark.parametrize(
    ("waiting", "errors", "not_run"),
    [(None, {"lanczos"}, {}), ("loop", set(), {"loop": "not run: the process stopped at its time limit"})],
)
def test_a_group_that_ends_within_a_rival_is_no_error(monkeypatch, tmp_path, waiting, errors, not_run):
    suite = a_suite(tmp_path)

    def stopped(command, **how):
        part = Part(Path(command[4]))
        part.add("ours", 5, {"device_us": 1.0})
        part.waiting_for = waiting
        part.save()
        return Finished(None, "the end", 1.0)

    monkeypatch.setattr(gpu_suite, "run", stopped)
    suite.timings("lanczos")
    assert set(suite.results["errors"]) == errors
    found = suite.results["timings"]["lanczos"]
    assert found["not_run"] == not_run
    assert [m["what"] for m in found["measurements"]] == ["ours"]


def test_the_verification_lies_beside_a_chosen_result_file_too(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "RECORD", tmp_path / "kernels" / "verified.json")
    assert a_suite(tmp_path).records() == [tmp_path / "kernels" / "verified.json", tmp_path / "verified.json"]
    assert a_suite(tmp_path / "a", "--record", "other.json").records() == [Path("other.json")]
    assert a_suite(tmp_path / "b", "--dry-run").records() == []
    suite = a_suite(tmp_path / "c")
    suite.results |= {"tests": {"all_passed": True}, "environment": {"device": "GPU"}}
    assert suite.record()
    written = [json.loads(path.read_text()) for path in suite.records()]
    assert written[0] == written[1] == {"device": "GPU", "date": suite.results["date"], "files": cuda_hashes()}


def test_a_commit_can_be_named(tmp_path):
    assert a_suite(tmp_path, "--commit", "a release").results["commit"] == "a release"
    assert a_suite(tmp_path / "a").results["commit"] == commit()


def test_time_is_left_for_the_sanitizer(tmp_path):
    suite = a_suite(tmp_path, "--seconds", "300")
    assert 175 < suite.limit(1000.0) <= 180
    assert 295 < suite.limit(1000.0, reserve=0.0) <= 300
    assert suite.limit(50.0) == 50.0
    assert 295 < a_suite(tmp_path / "a", "--seconds", "300", "--skip-sanitizer").limit(1000.0) <= 300


def test_hashes_are_those_of_the_files():
    hashes = cuda_hashes()
    assert {"codec.cu", "adamw4.cu", "lanczos.cu", "tridiagonal.cu"} <= hashes.keys()
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((ROOT / "kernels" / name).read_bytes()).hexdigest()


def test_the_checkout_is_importable_where_it_is_not_installed(tmp_path):
    importable = make_importable(tmp_path / "importable")
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    code = (
        "import sharpscope, sharpscope.dynamics.optimizers, sharpscope.kernels as k, pathlib; "
        "print(sharpscope.__file__, sorted(p.name for p in pathlib.Path(k.__file__).parent.glob('*.cu')))"
    )

    def said(*path):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}  # -S: nothing installed beside PYTHONPATH
        return subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, cwd="/")

    assert "No module named 'sharpscope'" in said(*paths).stderr
    found = said(importable, *paths)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[0] == str(importable / "sharpscope" / "__init__.py")
    assert "codec.cu" in found.stdout


def test_a_commit_is_named_where_there_is_git(tmp_path):
    assert commit(tmp_path) is None
    found = commit(ROOT)
    assert found is None or len(found.rstrip("+")) == 40


CLEAN = "========= COMPUTE-SANITIZER\n1 passed\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
BAD = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at quantize_block+0x90 in codec.cu:12
=========     by thread (5,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 3 errors
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section
========= ERROR SUMMARY: 1 error
"""
PASSED = {"all_passed": True, "counts": {"passed": 3}, "failures": []}


FOREIGN = BAD.replace("quantize_block+0x90 in codec.cu:12", "void at::native::elementwise<4>(int)+0x70")
OURS = {"quantize_block", "lanczos_dots"}


@pytest.mark.parametrize(
    ("done", "tests", "result"),
    [
        (Finished(0, CLEAN, 1.0), PASSED, "clean, 3 tests"),
        (Finished(0, RACE, 1.0), PASSED, "clean, 3 tests"),
        (Finished(1, BAD, 1.0), PASSED, "findings: 3, in quantize_block"),
        (
            Finished(1, BAD.replace("ERROR SUMMARY: 3 errors", "RACECHECK SUMMARY: 2 hazards"), 1.0),
            PASSED,
            "findings: 2",
        ),
        (Finished(1, FOREIGN, 1.0), PASSED, "clean, 3 tests, 3 reports on kernels that are not ours"),
        (Finished(1, FOREIGN, 1.0), {**PASSED, "all_passed": False}, "refused: the tests did not pass under the tool"),
        (Finished(1, REFUSED, 1.0), PASSED, "refused: Error: Device not supported"),
        (Finished(1, "Segmentation fault\n", 1.0), PASSED, "refused: Segmentation fault"),
        (Finished(1, "", 1.0), PASSED, "refused: it said nothing"),
        (Finished(1, "=========== FAILURES ==========\nit fell\n", 1.0), PASSED, "refused: it fell"),
        (Finished(None, CLEAN, 1.0), PASSED, "refused: it did not end within its time limit"),
        (Finished(1, CLEAN, 1.0), {**PASSED, "all_passed": False}, "refused: the tests did not pass under the tool"),
    ],
)
def test_what_the_sanitizer_says_is_understood(done, tests, result):
    found = verdict(done, tests, OURS)["result"]
    assert found == result or (result.startswith(("refused: Error", "findings: 2")) and found.startswith(result))


@pytest.mark.parametrize(
    "place",
    [
        "    at quantize_block+0x90 in codec.cu:12",
        "    at quantize_block(float const*, int)+0x90 in codec.cu:12",
        "    at 0x90 in quantize_block(float const*)",
        "Error: Race reported between Write access at quantize_block+0x30 in codec.cu:9",
    ],
)
def test_findings_name_the_kernels_and_are_quoted(place):
    found = verdict(Finished(1, BAD.replace("    at quantize_block+0x90 in codec.cu:12", place), 1.0), PASSED, OURS)
    assert found["kernels"] == ["quantize_block"]
    assert place.strip() in found["text"]


def test_the_kernels_are_found_in_the_files():
    assert OURS | {"adamw4_block", "tridiagonal_quadrature", "rank1_encode"} <= kernel_names()


def test_the_sanitizer_runs_the_tests_under_every_tool(env, tests_in, tmp_path):
    assert all(
        "not installed" in found["result"] for found in sanitize(env={"PATH": ""}, scratch=tmp_path, limit=9).values()
    )
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(
        f'#!{sys.executable}\nimport subprocess, sys\nprint("========= COMPUTE-SANITIZER")\n'
        "first = next(i for i, word in enumerate(sys.argv) if 'python' in word and i)\n"
        "status = subprocess.call(sys.argv[first:])\n"
        "bad = 'initcheck' in sys.argv\n"
        'print("=========     at lanczos_dots+0x30" if bad else "")\n'
        'print("========= ERROR SUMMARY: " + ("4 errors" if bad else "0 errors"))\n'
        "sys.exit(status)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    variables = {**env, "PATH": f"{program.parent}:{env['PATH']}"}
    found = sanitize(env=variables, scratch=tmp_path, limit=60, path=tests_in(PASSES))
    assert {tool: found[tool]["result"] for tool in TOOLS} == {
        "memcheck": "clean, 1 tests",
        "racecheck": "clean, 1 tests",
        "initcheck": "findings: 4, in lanczos_dots",
        "synccheck": "clean, 1 tests",
    }


def test_processes_are_stopped_with_their_children(tmp_path):
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); print(1, flush=True); {sleep}"
    done = run([sys.executable, "-c", code], env=os.environ, cwd=tmp_path, limit=3.0)
    assert done.code is None
    assert done.output.strip() == "1"
    assert done.seconds < 30
