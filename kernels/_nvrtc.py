"""Compiles CUDA programs with NVRTC; needs neither a GPU nor a driver."""

from __future__ import annotations

import importlib
from typing import Any

from ._launch import Source

# Contraction, flushed subnormals and approximate division would each change bits.
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--device-as-default-execution-space",
)


class CudaUnavailable(RuntimeError):
    """Kernels cannot be compiled or started here; the message says why and what would help."""


class CompilationError(RuntimeError):
    """NVRTC refused a program; the message is its log."""


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC library that CuPy finds; raises CudaUnavailable."""
    nvrtc = _nvrtc()
    try:
        major, minor = nvrtc.getVersion()
    except Exception as error:  # CuPy looks for the library at the first call; what it raises varies
        raise CudaUnavailable(
            f"CuPy finds no NVRTC library ({_first_line(error)}); pip install 'sharpscope[cuda13]' brings it"
        ) from error
    return int(major), int(minor)


def supported_archs() -> tuple[int, ...]:
    """Compute capabilities that this NVRTC makes code for, as 90 for 9.0; raises CudaUnavailable."""
    nvrtc_version()
    return tuple(int(arch) for arch in _nvrtc().getSupportedArchs())


def compile_cubin(source: Source, arch: str) -> tuple[bytes, str]:
    """Machine code of `source` for `arch`, such as "sm_90", and the log with every kernel's registers and spills.

    Raises:
        CompilationError: The program is wrong, or NVRTC does not know the architecture.
        CudaUnavailable: CuPy or NVRTC is missing.
    """
    image, log = _compiled(source, (*OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v"), "getCUBIN")
    return image + b"\0", log  # CuPy takes the image for a string and drops its last byte


def compile_ptx(source: Source, arch: str) -> str:
    """The PTX of `source` for the virtual architecture of `arch`, such as "sm_90"; raises as `compile_cubin`."""
    image, _ = _compiled(source, (*OPTIONS, f"--gpu-architecture={arch.replace('sm_', 'compute_')}"), "getPTX")
    return image.decode().rstrip("\0")


def _compiled(source: Source, options: tuple[str, ...], getter: str) -> tuple[bytes, str]:
    nvrtc_version()
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source.text, source.files[0], (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompilationError(f"{' '.join(source.files)} with {options}: {error}\n{log}") from error
        return getattr(nvrtc, getter)(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cupy.cuda").nvrtc
    except Exception as error:  # ImportError where it is missing; anything where its installation is broken
        raise CudaUnavailable(
            f"CuPy cannot be imported ({_first_line(error)}); pip install 'sharpscope[cuda13]', "
            "or [cuda12] for older drivers"
        ) from error
    return nvrtc


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
