"""The C sources of this folder as libraries: compiled for this processor at first use, kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from ._launch import FOLDER

# Contraction and fast-math would change bits; errno and traps would keep square roots and comparisons from vectors.
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# OpenMP's threads do not survive a fork; in another process than this they are not there.
_PROCESS = os.getpid()
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# More even out threads that start late, fewer cost less to hand out.
RANGES_PER_THREAD = 2
COMPILERS = ("cc", "gcc", "clang")


class NativeUnavailable(RuntimeError):
    """No library can be had here; the message says why and what would help."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The library made from `name`.c; raises NativeUnavailable."""
    found = _built(name)
    if isinstance(found, str):
        raise NativeUnavailable(found)
    return found


def why_unavailable(name: str) -> str | None:
    """None where `library(name)` works, after building it; else the reason."""
    try:
        library(name)
    except NativeUnavailable as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $SHARPSCOPE_CACHE, else sharpscope in the user's cache folder."""
    chosen = os.environ.get("SHARPSCOPE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharpscope"


def cache_folders() -> tuple[Path, Path]:
    """`cache_folder()`, and where that cannot be used one of this user among the temporary files."""
    return cache_folder(), Path(tempfile.gettempdir()) / f"sharpscope-{os.getuid()}"


def make_private(folder: Path) -> None:
    """Make a folder for code that will be loaded; raises OSError, also where others may write into it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write into {folder}, so code there is not loaded; set SHARPSCOPE_CACHE")


def in_parallel(work: Callable[[int, int], None], total: int, *, grain: int) -> None:
    """`work(first, last)` over [0, total) in contiguous ranges of at least `grain`, on as many threads as torch has.

    For calls into C, which hold no lock of Python's; what the ranges are must not matter to the result. There are
    several for each thread, and a thread takes the next when it is done: after an operation of torch its own threads
    keep the cores busy for a while, and whoever is late then has less to do.
    """
    threads = max(1, min(torch.get_num_threads(), total // grain))
    if threads == 1:
        work(0, total)
        return
    count = max(threads, min(RANGES_PER_THREAD * threads, total // grain))
    ranges = iter([(total * i // count, total * (i + 1) // count) for i in range(count)])

    def drain() -> None:
        for first, last in ranges:  # taking the next one is atomic
            work(first, last)

    _team()(drain, threads)


def _team() -> Callable[[Callable[[], None], int], None]:
    """What runs a function on several threads, the caller's among them, and waits for all.

    The threads of torch's own OpenMP where they can be had: after an operation of torch they keep their cores busy for
    a while, waiting for the next, and would only get in the way of others.
    """
    openmp = _openmp()
    return _on_pool if openmp is None or os.getpid() != _PROCESS else functools.partial(_on_openmp, openmp)


def _on_openmp(openmp: Callable[..., None], work: Callable[[], None], threads: int) -> None:
    errors: list[BaseException] = []

    def guarded(_: object) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    openmp(_CALLBACK(guarded), None, threads, 0)
    if errors:
        raise errors[0]


def _on_pool(work: Callable[[], None], threads: int) -> None:
    helpers = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)  # they use the caller's memory
    for helper in begun:
        helper.result()


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP library that torch is linked with; None where it has none of that kind.

    Looked up through torch's own library, because a process may hold several: scikit-learn brings one, too.
    """
    folder = Path(torch.__file__).parent / "lib"
    try:
        library = next(folder.glob("libtorch_cpu.*"))
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, StopIteration, AttributeError):
        return None
    parallel.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """One for each process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="sharpscope")


@functools.cache
def _built(name: str) -> ctypes.CDLL | str:
    """The library, from a cache or compiled; or the reason why there is none."""
    wanted = shlex.split(os.environ.get("CC", ""))
    candidates = [wanted] if wanted else [[compiler] for compiler in COMPILERS]
    compiler = next((command for command in candidates if shutil.which(command[0])), None)
    if compiler is None:
        tried = f"CC={shlex.join(wanted)}" if wanted else ", ".join(COMPILERS)
        return f"no C compiler found ({tried}); install gcc or clang, or set CC"
    text = [path.read_text() for path in (FOLDER / f"{name}.c", *sorted(FOLDER.glob("*.h")))]
    reason = ""
    for tuning in (("-march=native",), ("-mcpu=native",), ()):
        key = hashlib.sha256(repr((text, compiler, FLAGS, tuning, _processor())).encode()).hexdigest()[:24]
        for folder in cache_folders():
            found = _cached_or_compiled([*compiler, *FLAGS, *tuning], FOLDER / f"{name}.c", folder / f"{name}-{key}.so")
            if not isinstance(found, str):
                return found
            reason = found
    return reason


def _cached_or_compiled(command: list[str], source: Path, target: Path) -> ctypes.CDLL | str:
    """The library `target`, compiled if it is not there or does not load; or the reason why not."""
    try:
        make_private(target.parent)
        if target.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(target))
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            result = subprocess.run(
                [*command, str(source), "-o", str(made), "-lm"], capture_output=True, text=True, timeout=300
            )
            if result.returncode:
                return f"{command[0]} could not compile {source.name}: {_said(result)}"
            os.replace(made, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{source.name} could not be compiled into {target.parent}: {error}"


@functools.cache
def _processor() -> str:
    """What decides the instructions that may be used: caches on a shared disk serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {described}"


def _said(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stderr or result.stdout).strip()[:500] or f"it ended with exit status {result.returncode}"
