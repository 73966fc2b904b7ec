"""Runs the kernels' own CUDA text on a CPU: compiled by g++ behind cuda_on_cpu.h, launched on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sharpscope.kernels._launch import Argument, Source
from torch import Tensor

HERE = Path(__file__).parent
COMMON = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-w",
    f"-I{HERE}",
)
MODES = {
    "fiber": (),
    "asan": ("-O0", "-g", "-fsanitize=address", "-fsanitize-recover=address", "-fsanitize-sections=emu_shared"),
    "ubsan": ("-O0", "-g", "-fsanitize=undefined,float-cast-overflow"),
    "tsan": ("-g", "-fsanitize=thread", "-DEMU_THREADS", "-pthread"),
}
ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:__launch_bounds__\(([^,)]*)[^)]*\)\s*)?void\s+(?:__launch_bounds__\(([^,)]*)[^)]*\)\s*)?(\w+)\s*\('
)


class EmulatorError(RuntimeError):
    """The kernel or its launch is wrong; on a GPU that might crash, hang, or give a wrong number silently."""


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint),
        ("block", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
    )


class EmulatedLauncher:
    """A Launcher for CPU tensors.

    Args:
        mode: "fiber", or the sanitizer to build for; its runtime must be preloaded into the process.
        seed: Order of threads and blocks: 0 ascending, 1 blocks descending and threads permuted, else all permuted.

    `launched` lists the kernels that were started.
    """

    def __init__(self, mode: str = "fiber", seed: int = 0) -> None:
        self.mode, self.seed = mode, seed
        self.launched: list[str] = []

    def launch(
        self,
        source: Source,
        kernel: str,
        grid: int,
        block: int,
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """As `Launcher.launch`; raises EmulatorError for whatever the emulator finds wrong."""
        library, bounds = _library(source.text, self.mode)
        if kernel not in bounds:
            raise EmulatorError(f"`{kernel}` is not in {source.files}, which has {sorted(bounds)}")
        limit = min(bounds[kernel], 1024)
        if not 1 <= block <= limit:
            raise EmulatorError(f"{kernel}: {block} threads per block; must be 1 to {limit}")
        if not 1 <= grid < 2**31:
            raise EmulatorError(f"{kernel}: a grid of {grid} blocks; must be 1 to 2^31 - 1")
        signature = getattr(library, f"emu_signature_{kernel}")
        signature.restype = ctypes.c_char_p
        parameters = signature().decode().split()
        if len(args) != len(parameters):
            raise EmulatorError(f"{kernel}: {len(args)} arguments for {len(parameters)} parameters")
        values = [_value(f"{kernel}: argument {i}", *pair) for i, pair in enumerate(zip(args, parameters, strict=True))]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        config = _Config(grid, block, shared_bytes, self.seed)
        self.launched.append(kernel)
        if getattr(library, f"emu_launch_{kernel}")(ctypes.byref(config), pointers):
            raise EmulatorError(f"{kernel}: {library.emu_last_error().decode()}")


def _value(where: str, argument: Argument, parameter: str) -> np.ndarray:
    """The bytes of one argument, checked against its parameter: p<size>/<size of the element>, i, f or s<size>."""
    kind, size, element = re.fullmatch(r"([pifs])(\d+)(?:/(\d+))?", parameter).groups()
    if argument is None:
        _require(kind == "p", f"{where} is None; its parameter is {parameter}")
        return np.zeros(1, np.uint64)
    if isinstance(argument, Tensor):
        _require(kind == "p", f"{where} is a tensor; its parameter is {parameter}")
        _require(argument.device.type == "cpu", f"{where} is on {argument.device}; the emulator takes CPU tensors")
        _require(argument.is_contiguous(), f"{where} is not contiguous: strides {argument.stride()}")
        width = argument.element_size()
        _require(
            element == "0" or int(element) == width,
            f"{where} is a tensor of {argument.dtype}; its parameter points to {element}-byte elements",
        )
        return np.array([argument.data_ptr()], np.uint64)
    if isinstance(argument, np.ndarray) and argument.dtype.names and argument.size == 1:
        _require(
            kind == "s" and int(size) == argument.dtype.itemsize,
            f"{where} is a struct of {argument.dtype.itemsize} bytes; its parameter is {parameter}",
        )
        return np.ascontiguousarray(argument)
    _require(
        isinstance(argument, np.generic),
        f"{where} is {type(argument).__name__}; must be a tensor, None, a numpy scalar or a structured array of size 1",
    )
    given = {"i": "i", "u": "i", "b": "i", "f": "f"}.get(argument.dtype.kind, "?") + str(argument.dtype.itemsize)
    _require(given == parameter, f"{where} is {argument.dtype}; its parameter is {parameter}")
    return np.array([argument])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EmulatorError(message)


@functools.cache
def _library(text: str, mode: str) -> tuple[ctypes.PyDLL, dict[str, int]]:
    """The program as a library, and the most threads that each kernel allows in a block."""
    expanded = _run(("g++", "-E", "-P", "-xc++", "-DEMU_CPU=1", "-"), text)
    bounds = {}
    for before, after, name in ENTRY.findall(expanded):
        bound = before or after or "1024"
        if not re.fullmatch(r"[\d\s*+()]+", bound):
            raise EmulatorError(f"{name}: __launch_bounds__({bound}) is not a number")
        bounds[name] = eval(bound)
    exports = "".join(f"EMU_EXPORT({name})\n" for name in bounds)
    program = f'#include "cuda_on_cpu.h"\n{text}\n#line 1 "exports"\n{exports}'
    engine = _built("engine", (HERE / "engine.cpp").read_text(), ("-c", "-O2"), mode, "o")
    # PyDLL keeps the interpreter's lock: the engine has one state, so launches must not overlap.
    library = ctypes.PyDLL(str(_built("kernels", program, ("-shared", "-Wl,-z,nodelete"), mode, "so", (str(engine),))))
    library.emu_last_error.restype = ctypes.c_char_p
    return library, bounds


def _built(name: str, text: str, how: tuple[str, ...], mode: str, suffix: str, linked: tuple[str, ...] = ()) -> Path:
    """`text` compiled, kept under a name made from everything that it is made from."""
    header = (HERE / "cuda_on_cpu.h").read_text()
    flags = (*COMMON, *MODES[mode], *how)
    key = hashlib.sha256(repr((text, header, flags, linked, _run(("g++", "--version"), ""))).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"sharpscope-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    target = folder / f"{name}-{mode}-{key}.{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            inputs = ["-xc++", "-", *(("-xnone", *linked) if linked else ())]
            _run(("g++", *flags, *inputs, "-o", str(made)), text)
            os.replace(made, target)
    return target


@functools.cache
def _run(command: tuple[str, ...], text: str) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        raise EmulatorError(f"g++ failed:\n{result.stderr[:4000]}")
    return result.stdout


def why_unavailable() -> str | None:
    """None where kernels can be emulated, else the reason."""
    return None if shutil.which("g++") else "no g++ on PATH: CUDA kernels cannot be emulated"
