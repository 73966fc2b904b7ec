"""Kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: planted bugs found, ours clean."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "emulator"
LINES = (FOLDER / "planted.cu").read_text().splitlines()
OPERATIONS = ("codec", "adamw4", "lanczos", "tridiagonal")
RUNTIMES = {"asan": "libasan.so", "ubsan": "libubsan.so", "tsan": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:exitcode=0",
    "TSAN_OPTIONS": "halt_on_error=0:exitcode=0:ignore_noninstrumented_modules=1",
    "OMP_NUM_THREADS": "1",
}
REPORT = re.compile(r"ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error:")
# What each must find: the kernel, words of the report, and the lines of which it must name one: of a race, that of the
# later access.
FOUND = {
    "asan": [
        ("read_outside", "heap-buffer-overflow", ["y[i < n ? i : 0] = x[i];"]),
        ("write_outside", "heap-buffer-overflow", ["if (i <= n) y[i] = 1;"]),
        ("shared_outside", "global-buffer-overflow", ["p[k] = 1;"]),
        ("dynamic_outside", "heap-buffer-overflow", ["s[threadIdx.x + 1] = x[threadIdx.x];"]),
    ],
    "ubsan": [
        ("misaligned", "misaligned address", ["const float4 four = *(const float4*)(x + 1);"]),
        ("shift_too_far", "shift exponent 36 is too large", ["1 << (n - 64)"]),
    ],
    "tsan": [
        ("reverse_without_barrier", "data race", ["s[t] = x[blockIdx.x * 64 + t];", "= s[63 - t];"]),
        ("reverse_with_warp_barrier", "data race", ["s[t] = x[blockIdx.x * 64 + t];", "= s[63 - t];"]),
        (
            "rounds_without_second_barrier",
            "data race",
            ["if (threadIdx.x == 0) s = x[k];", "sum += s * (threadIdx.x + 1);"],
        ),
    ],
}
CLEAN = {"asan": ["inside", "reverse"], "ubsan": ["inside"], "tsan": ["inside", "reverse", "rounds"]}


@functools.cache
def prefix(mode):
    """The beginning of a command that runs with the runtime of a sanitizer; skips where there is none that works."""
    if not shutil.which("g++"):
        pytest.skip("no g++ on PATH: nothing can be built for a sanitizer")

    def located(name):
        return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout

    runtime, standard = located(RUNTIMES[mode]).strip(), located("libstdc++.so").strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"g++ has no {RUNTIMES[mode]}; install the sanitizer runtimes of gcc")
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    command = ["env", f"LD_PRELOAD={runtime}:{standard}", *options]
    # Some kernels place memory so randomly that ThreadSanitizer cannot start: then without randomness.
    for attempt in (command, ["setarch", platform.machine(), "-R", *command]):
        if shutil.which(attempt[0]):
            result = subprocess.run([*attempt, sys.executable, "-c", "print(1)"], capture_output=True, text=True)
            if result.returncode == 0:
                return attempt
    pytest.skip(f"python does not start under {RUNTIMES[mode]}: {result.stderr.strip()[:300]}")


@functools.cache
def sections(mode):
    """What the sanitizer said, by scenario."""
    names = [*CLEAN[mode], *OPERATIONS, *(kernel for kernel, _, _ in FOUND[mode])]
    command = [*prefix(mode), sys.executable, str(FOLDER / "scenarios.py"), mode, *names]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=os.path.sep)
    parts = re.split(r"^== (\w+)\n", result.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), result.stdout


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode in CLEAN for name in (*CLEAN[mode], *OPERATIONS)])
def test_correct_kernels_are_clean(mode, name):
    said, everything = sections(mode)
    assert name in said, everything[-3000:]
    assert not REPORT.search(said[name]), said[name][:6000]
    assert said[name].rstrip().endswith("finished"), said[name][-3000:]


@pytest.mark.parametrize(
    ("mode", "kernel", "words", "lines"), [(mode, *found) for mode in FOUND for found in FOUND[mode]]
)
def test_planted_bugs_are_found_where_they_are(mode, kernel, words, lines):
    said, everything = sections(mode)
    assert kernel in said, everything[-3000:]
    assert REPORT.search(said[kernel]), said[kernel]
    assert words in said[kernel]
    begin = next(i for i, text in enumerate(LINES) if f"void {kernel}(" in text)
    numbers = [next(i for i, text in enumerate(LINES[begin:], begin + 1) if line in text) for line in lines]
    assert any(f"planted.cu:{number}" in said[kernel] for number in numbers), said[kernel][:3000]
