"""Starts kernels on the GPU through CuPy: compiled once for each architecture, kept on disk, on torch's stream."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _nvrtc
from ._launch import Argument, Source
from ._native import cache_folders, make_private
from ._nvrtc import CudaUnavailable

# What every GPU from the oldest supported on takes in one launch.
MOST_BLOCKS = 2**31 - 1
MOST_THREADS = 1024
OLDEST = (8, 0)
# What a block may have of dynamic shared memory without asking for more.
FREE_SHARED_BYTES = 48 * 1024


def why_unavailable() -> str | None:
    """None where kernels can run on a GPU; else the reason, with the cure. Never raises."""
    try:
        return _why_unavailable()
    except Exception as error:  # a broken installation must not break the paths that need none
        return f"CUDA cannot be used: {type(error).__name__}: {error}"


def launcher() -> CupyLauncher:
    """The launcher for CUDA tensors; raises CudaUnavailable."""
    reason = _known_reason()
    if reason is not None:
        raise CudaUnavailable(reason)
    return _LAUNCHER


class CupyLauncher:
    """A `Launcher` for tensors of one CUDA device, on torch's current stream there.

    Programs are compiled and loaded at their first launch on a device, which must therefore precede the capture of a
    CUDA graph.
    """

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
        """As `Launcher.launch`.

        Raises:
            ValueError: A grid or block that is empty or too large, no tensor, or tensors that are not all on one CUDA
                device.
            TypeError: A scalar of no fixed width, which CuPy would pass with a width of its own choice.
            CudaUnavailable: NVRTC makes no code for this device, or no folder for it can be written.
        """
        if not (1 <= grid <= MOST_BLOCKS and 1 <= block <= MOST_THREADS):
            raise ValueError(
                f"{kernel}: {grid} blocks of {block} threads; a launch has 1 to {MOST_BLOCKS} blocks of 1 to "
                f"{MOST_THREADS} threads: split what is larger over several calls"
            )
        device = _device(kernel, args)
        values = tuple(_value(kernel, i, argument) for i, argument in enumerate(args))
        with torch.cuda.device(device):
            function = _function(source, kernel, device.index)
            if shared_bytes > FREE_SHARED_BYTES:
                function.max_dynamic_shared_size_bytes = shared_bytes
            # Looked up at every call: under the capture of a CUDA graph the current stream is another one.
            stream = _stream(torch.cuda.current_stream(device), device)
            function((grid,), (block,), values, shared_mem=shared_bytes, stream=stream)


_LAUNCHER = CupyLauncher()


class _TorchStream:
    """A stream of torch by the protocol that CuPy asks for, which not every torch has."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def _stream(stream: torch.cuda.Stream, device: torch.device) -> Any:
    cuda = _cupy().cuda
    if hasattr(cuda.Stream, "from_external"):
        return cuda.Stream.from_external(_TorchStream(stream))
    return cuda.ExternalStream(stream.cuda_stream, device.index)  # CuPy 13


def _device(kernel: str, args: Sequence[Argument]) -> torch.device:
    devices = {argument.device for argument in args if isinstance(argument, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"{kernel}: its tensors must be on one CUDA device, but there is {found}; move them to one")
    return devices.pop()


def _value(kernel: str, index: int, argument: Argument) -> np.generic | np.ndarray:
    """What CuPy passes as it is: pointers are 8-byte integers, and arrays of one struct go by value."""
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, Tensor):
        if not argument.is_contiguous():
            raise ValueError(f"{kernel}: argument {index} is not contiguous: strides {argument.stride()}")
        return np.uint64(argument.data_ptr())
    if isinstance(argument, np.generic) or (
        isinstance(argument, np.ndarray) and argument.dtype.names is not None and argument.size == 1
    ):
        return argument
    raise TypeError(
        f"{kernel}: argument {index} is {type(argument).__name__}; it must be a tensor, None, a numpy scalar or a "
        "structured numpy array of size 1"
    )


@functools.cache
def _function(source: Source, kernel: str, device_index: int) -> Any:
    return _module(source, device_index).get_function(kernel)


@functools.cache
def _module(source: Source, device_index: int) -> Any:
    """The program loaded on a device, which is the current one."""
    path = cubin(source, architecture(torch.cuda.get_device_capability(device_index)))
    return _cupy().RawModule(path=str(path))


def architecture(capability: tuple[int, int]) -> str:
    """The newest architecture that NVRTC knows and that the device runs: of the same major number, and not newer.

    Raises CudaUnavailable where there is none, and for devices older than compute capability 8.0.
    """
    major, minor = capability
    if capability < OLDEST:
        raise CudaUnavailable(
            f"the GPU has compute capability {major}.{minor}, but the kernels are made for {OLDEST[0]}.{OLDEST[1]} and "
            "newer; take an NVIDIA GPU of 2020 (Ampere) or later"
        )
    known = _nvrtc.supported_archs()
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        version = ".".join(map(str, _nvrtc.nvrtc_version()))
        raise CudaUnavailable(
            f"NVRTC {version} makes no code for compute capability {major}.{minor}, only for "
            f"{', '.join(f'{arch // 10}.{arch % 10}' for arch in known)}; take CuPy and NVRTC of another CUDA version"
        )
    return f"sm_{max(fitting)}"


def cubin(source: Source, arch: str) -> Path:
    """The compiled program, made unless this or another process has made it before.

    Raises:
        CudaUnavailable: NVRTC is missing, or no folder that only this user writes into can be had.
    """
    key = hashlib.sha256(repr((source.text, _nvrtc.OPTIONS, arch, _nvrtc.nvrtc_version())).encode()).hexdigest()[:32]
    name = f"{Path(source.files[0]).stem}-{arch}-{key}.cubin"
    problems = []
    for folder in cache_folders():
        try:
            make_private(folder)
            if not (folder / name).exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = Path(scratch) / name
                    made.write_bytes(_nvrtc.compile_cubin(source, arch)[0])
                    os.replace(made, folder / name)  # other processes see all of it or none
            return folder / name
        except OSError as error:
            problems.append(f"{folder}: {error}")
    raise CudaUnavailable(
        f"compiled kernels can be kept nowhere ({'; '.join(problems)}); "
        "set SHARPSCOPE_CACHE to a folder that can be written"
    )


@functools.cache
def _known_reason() -> str | None:
    return why_unavailable()


def _why_unavailable() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch from pytorch.org"
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA device that it can use; it needs an NVIDIA GPU and a driver for CUDA "
            f"{torch.version.cuda} or newer"
        )
    try:
        version = _nvrtc.nvrtc_version()
        architecture(torch.cuda.get_device_capability())
    except CudaUnavailable as error:
        return str(error)
    runtime = _cupy().cuda.runtime
    driver, wanted = runtime.driverGetVersion(), max(runtime.runtimeGetVersion() // 1000, version[0])
    if driver // 1000 < wanted:
        cure = ", or install 'sharpscope[cuda12]' instead" if driver // 1000 == 12 else ""
        return (
            f"the NVIDIA driver knows CUDA {driver // 1000}.{driver % 1000 // 10}, but CuPy and NVRTC are made for "
            f"CUDA {wanted}; update the driver{cure}"
        )
    return None


def _cupy() -> Any:
    # Late, and after torch: it is slow to import, and would bring its own CUDA libraries before torch's.
    return importlib.import_module("cupy")
