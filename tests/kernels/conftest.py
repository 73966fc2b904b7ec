"""The emulator of the tests: `emulated(seed)` starts CUDA kernels on CPU tensors. The forms in which C is compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "emulator"))

from emulator import EmulatedLauncher, why_unavailable
from sharpscope.kernels import _native


@pytest.fixture(scope="session")
def emulated():
    """`emulated(seed=0)` -> a Launcher that runs the CUDA text on this CPU, in an order given by the seed."""
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    return lambda seed=0: EmulatedLauncher(seed=seed)


@pytest.fixture(params=["native", "portable"])
def compiled_as(request, monkeypatch):
    """`compiled_as(name)` compiles name.c for this processor, or in plain loops, and makes it the library in use."""

    def choose(name):
        if request.param == "portable":
            compiler = os.environ.get("CC") or next((c for c in _native.COMPILERS if shutil.which(c)), "cc")
            monkeypatch.setenv("CC", f"{compiler} -DPORTABLE")
        forget_libraries()
        reason = _native.why_unavailable(name)
        if reason:
            pytest.skip(reason)

    yield choose
    monkeypatch.undo()
    forget_libraries()


def forget_libraries():
    _native.library.cache_clear()
    _native._built.cache_clear()


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """`sanitized(flags, *arguments)` runs Python with the C sources under address and undefined sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = folder / "compiler"  # optimising what is instrumented takes longer than running it
    compiler.write_text("""#!/bin/sh
for word; do
    shift
    [ "$word" = -O3 ] || set -- "$@" "$word"
done
exec gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all "$@"
""")
    compiler.chmod(0o755)

    def run(flags, *arguments):
        found = [_runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
        if None in found:
            pytest.skip("gcc with its sanitizers is not installed")
        environment = {
            **os.environ,
            "CC": f"{compiler} {flags}",
            "LD_PRELOAD": ":".join(map(str, found)),
            "ASAN_OPTIONS": "detect_leaks=0",
            "SHARPSCOPE_CACHE": str(folder / "cache"),
        }
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def _runtime(name):
    """The file of a runtime library of gcc, or None."""
    if not shutil.which("gcc"):
        return None
    answer = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return Path(answer).resolve() if os.path.isabs(answer) else None
