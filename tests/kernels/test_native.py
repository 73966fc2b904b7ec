"""C kernels: how they are compiled, kept and run in threads, and what a machine without a compiler gets."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from sharpscope.kernels import _native
from sharpscope.kernels._native import NativeUnavailable, in_parallel, library, why_unavailable

HERE = Path(__file__).parent
COMPILER = next((path for path in map(shutil.which, _native.COMPILERS) if path), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Sources, caches and temporary files of the test's own, and nothing remembered."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    (sources / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    monkeypatch.setattr(_native, "FOLDER", sources)
    monkeypatch.setattr(_native.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("SHARPSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield
    forget()


def forget():
    _native.library.cache_clear()
    _native._built.cache_clear()


def compiler_at(path, text):
    """A program in place of the compiler."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def built_in(folder):
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


@needs_compiler
class TestCache:
    def test_a_library_is_compiled_once(self, tmp_path, monkeypatch):
        counted = compiler_at(tmp_path / "counting", f'echo x >> {tmp_path}/count; exec {COMPILER} "$@"')
        monkeypatch.setenv("CC", counted)
        for _ in range(3):
            assert library("answer").answer() == 42
            forget()
        assert (tmp_path / "count").read_text().split() == ["x"]
        assert [name.split("-")[0] for name in built_in(tmp_path / "cache")] == ["answer"]

    def test_another_header_is_another_library(self, tmp_path):
        assert library("answer").answer() == 42
        (tmp_path / "sources" / "answer.h").write_text("#define ANSWER 43\n")
        forget()
        assert library("answer").answer() == 43
        assert len(built_in(tmp_path / "cache")) == 2

    def test_another_processor_is_another_library(self, tmp_path, monkeypatch):
        library("answer")
        monkeypatch.setattr(_native, "_processor", lambda: "one with other instructions")
        forget()
        assert library("answer").answer() == 42
        assert len(built_in(tmp_path / "cache")) == 2

    def test_a_damaged_library_is_compiled_again(self, tmp_path):
        """Written by a process of its own: a library that is open must not be changed."""
        code = "from sharpscope.kernels import _native; from pathlib import Path; import sys\n"
        code += "_native.FOLDER = Path(sys.argv[1]); print(_native.library('answer').answer())"
        command = [sys.executable, "-c", code, str(tmp_path / "sources")]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "42\n"
        (path,) = (tmp_path / "cache").iterdir()
        path.write_bytes(path.read_bytes()[:100])
        assert library("answer").answer() == 42

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        """A file where the folder should be: it stops root, too."""
        (tmp_path / "cache").write_text("")
        assert library("answer").answer() == 42
        assert len(built_in(tmp_path / "temporary" / f"sharpscope-{os.getuid()}")) == 1

    def test_a_folder_that_others_may_write_is_not_trusted(self, tmp_path, monkeypatch):
        (tmp_path / "cache").write_text("")
        shared = tmp_path / "temporary" / f"sharpscope-{os.getuid()}"
        shared.mkdir()
        shared.chmod(0o777)
        assert "others may write" in str(why_unavailable("answer"))
        assert built_in(shared) == []

    def test_nothing_can_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SHARPSCOPE_CACHE", "/dev/null/cache")
        (tmp_path / "temporary" / f"sharpscope-{os.getuid()}").write_text("")
        with pytest.raises(NativeUnavailable, match="could not be compiled into"):
            library("answer")

    def test_processes_that_build_at_once(self, tmp_path):
        """Each loads a whole library, whoever wrote it, and leaves nothing else."""
        code = "from sharpscope.kernels import _native; from pathlib import Path; import sys\n"
        code += "_native.FOLDER = Path(sys.argv[1]); sys.stdin.read(1); print(_native.library('answer').answer())"
        command = [sys.executable, "-c", code, str(tmp_path / "sources")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
        assert [process.communicate("x")[0] for process in processes] == ["42\n"] * 3
        assert len(built_in(tmp_path / "cache")) == 1

    def test_a_compiler_with_arguments(self, monkeypatch, tmp_path):
        (tmp_path / "sources" / "answer.h").write_text("")
        monkeypatch.setenv("CC", f"{COMPILER} -DANSWER=7")
        assert library("answer").answer() == 7

    def test_a_compiler_without_tuning(self, tmp_path, monkeypatch):
        """One that knows neither -march=native nor -mcpu=native."""
        picky = (
            f'for a in "$@"; do case $a in *=native) echo "unknown $a" >&2; exit 1;; esac; done; exec {COMPILER} "$@"'
        )
        monkeypatch.setenv("CC", compiler_at(tmp_path / "picky", picky))
        assert library("answer").answer() == 42


class TestWithoutACompiler:
    def test_none_is_installed(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(NativeUnavailable, match=r"no C compiler found \(cc, gcc, clang\); install gcc or clang"):
            library("answer")
        assert "install gcc or clang" in str(why_unavailable("answer"))

    def test_the_chosen_one_is_missing(self, monkeypatch):
        monkeypatch.setenv("CC", "no-such-compiler -O2")
        with pytest.raises(NativeUnavailable, match="CC=no-such-compiler -O2"):
            library("answer")

    def test_a_broken_one(self, tmp_path, monkeypatch):
        broken = compiler_at(tmp_path / "broken", "echo 'fatal error: no stdint.h' >&2; exit 1")
        monkeypatch.setenv("CC", broken)
        with pytest.raises(NativeUnavailable, match=r"could not compile answer\.c: fatal error: no stdint\.h"):
            library("answer")
        assert built_in(tmp_path / "cache") == []

    def test_one_that_makes_no_library(self, tmp_path, monkeypatch):
        writes = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'
        monkeypatch.setenv("CC", compiler_at(tmp_path / "strange", writes))
        with pytest.raises(NativeUnavailable, match="could not be compiled into"):
            library("answer")


class TestThreads:
    @pytest.fixture(autouse=True, params=["openmp", "pool"])
    def threads(self, request, monkeypatch):
        """Three, of torch's OpenMP or of our own."""
        if request.param == "pool":
            monkeypatch.setattr(_native, "_openmp", lambda: None)
        elif _native._openmp() is None:
            pytest.skip("torch has no OpenMP here whose threads can be had")
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("total", [1, 2, 5, 9, 100, 101])
    @pytest.mark.parametrize("grain", [1, 4, 50, 1000])
    def test_ranges_cover_everything_once(self, total, grain):
        ranges = []
        in_parallel(lambda first, last: ranges.append((first, last)), total, grain=grain)
        ranges.sort()
        assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
        assert ranges[-1][1] == total
        threads = max(1, min(3, total // grain))
        assert len(ranges) == (1 if threads == 1 else max(threads, min(_native.RANGES_PER_THREAD * 3, total // grain)))
        assert all(last - first >= min(grain, total) for first, last in ranges)

    def test_ranges_run_at_the_same_time(self):
        meeting = threading.Barrier(3, timeout=20)
        in_parallel(lambda first, last: meeting.wait() and None, 3, grain=1)

    def test_one_thread_stays_in_the_caller(self):
        torch.set_num_threads(1)
        seen = []
        in_parallel(lambda first, last: seen.append((threading.current_thread(), first, last)), 7, grain=1)
        assert seen == [(threading.current_thread(), 0, 7)]

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_an_error_waits_for_the_others(self, failing):
        """The memory that they work on is the caller's."""
        finished, started = [], threading.Barrier(3, timeout=20)

        def work(first, last):
            started.wait()
            if first == failing:
                raise RuntimeError(f"range {first}")
            threading.Event().wait(0.05)
            finished.append(first)

        with pytest.raises(RuntimeError, match=f"range {failing}"):
            in_parallel(work, 3, grain=1)
        assert sorted(finished) == sorted({0, 1, 2} - {failing})

    def test_a_forked_process_has_threads_of_its_own(self):
        in_parallel(lambda first, last: None, 3, grain=1)
        child = os.fork()
        if child == 0:
            seen = []
            try:
                in_parallel(lambda first, last: seen.append(first), 3, grain=1)
            finally:
                os._exit(len(seen))
        assert exit_code(child, seconds=30) == 3


def exit_code(child, seconds):
    """Of a process that is killed when it takes longer: -SIGKILL then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_compiler
def test_calls_into_c_hold_no_lock():
    """ctypes.CDLL releases Python's lock; PyDLL would not."""
    assert type(library("answer")) is ctypes.CDLL


class TestSanitizers:
    """Address and undefined sanitizers over the C sources, in processes of their own."""

    @pytest.mark.parametrize("form", ["", "-DPORTABLE"], ids=["native", "portable"])
    def test_they_find_nothing(self, form, sanitized):
        which = "native and (threads or beyond or represent or skipped or (test_steps and (dtypes0 or dtypes1)))"
        files = [str(HERE / f"test_{name}_c.py") for name in ("codec", "adamw4")]
        options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which)
        result = sanitized(form, "-m", "pytest", *options, *files)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert " passed" in result.stdout
        assert "skipped" not in result.stdout

    def test_they_would_find_a_write_beyond_the_end(self, sanitized):
        code = "import torch\nfrom sharpscope.kernels import codec_c\n"
        code += (
            "x, short, bad = torch.rand(256), torch.empty(127, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)\n"
        )
        code += "codec_c.quantize_block(x, short, torch.empty(2), bad, map='linear')"
        result = sanitized("", "-c", code)
        assert result.returncode != 0
        assert "ERROR: AddressSanitizer" in result.stderr
        assert "codec" in result.stderr
