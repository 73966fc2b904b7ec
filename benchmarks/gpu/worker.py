"""What runs in a process of its own: the facts of the machine, and each group of timings."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .clock import Clock
from .report import Part, write_json

GROUPS = ("step", "codec", "lanczos", "quadrature")
REPETITIONS = 20


def work(group: str, path: Path, *, mode: str) -> None:
    """Measure a group, mode "full", "quick" or "dry" (on the CPU, tiny), into a file that grows."""
    if group == "facts":
        write_json(path, facts(dry=mode == "dry"))
        return
    if group == "compile":
        write_json(path, compile_all(dry=mode == "dry"))
        return
    part, dry = Part(path), mode == "dry"
    clock = Clock(torch.device("cpu" if dry else "cuda"), 3 if dry else REPETITIONS)
    torch.manual_seed(0)
    if dry:
        torch.set_num_threads(1)
    sizes = {"full": [10**6, 10**7, 10**8], "quick": [10**6, 10**7], "dry": [3000]}[mode]
    try:
        if group == "step":
            from .step_timings import time_steps

            time_steps(part, clock, sizes, small_tensors=20 if dry else 1000)
        elif group == "codec":
            from .codec_timings import time_codec

            time_codec(part, clock, sizes)
        elif group == "lanczos":
            from .lanczos_timings import time_lanczos

            how = (
                {"small": 400, "large": 700, "blocks": 5, "m": 6}
                if dry
                else {"small": 10**6, "large": 10**7, "blocks": 100, "m": 64}
            )
            time_lanczos(part, clock, **how)
        else:
            from .lanczos_timings import time_quadrature

            time_quadrature(part, clock, **({"count": 6, "k": 9} if dry else {"count": 256, "k": 64}))
    except Exception as error:
        part.fail(group, error)
        raise
    part.save()


def compile_all(*, dry: bool) -> dict[str, Any]:
    """Fill the cache of compiled kernels, several at once, so that no test waits for them; nothing in a rehearsal."""
    if dry:
        return {"programs": 0, "seconds": 0.0}
    from sharpscope.kernels import _cupy
    from sharpscope.kernels._dispatch import FUNCTIONS

    began = time.perf_counter()
    arch = _cupy.architecture(torch.cuda.get_device_capability())
    modules = [importlib.import_module(f"sharpscope.kernels.{function}_cuda") for function in FUNCTIONS]
    sources = [source for module in modules for source in module.SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(lambda source: _cupy.cubin(source, arch), sources))
    return {"programs": len(set(paths)), "architecture": arch, "seconds": round(time.perf_counter() - began, 1)}


def facts(*, dry: bool) -> dict[str, Any]:
    """Device, versions, and what the library says of them."""
    found: dict[str, Any] = {
        "device": f"CPU rehearsal ({platform.machine()})",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "nvrtc": _version("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
        "nvcc": _nvcc(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available() and not dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    try:
        from sharpscope.kernels.capabilities import capabilities

        found["capabilities"] = [dataclasses.asdict(capability) for capability in capabilities()]
    except Exception as error:
        found["capabilities"] = f"{type(error).__name__}: {error}"
    return found


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _nvcc() -> str | None:
    program = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    found = re.search(r"release [\d.]+, V([\d.]+)", _said([program, "--version"])) if program else None
    return found[1] if found else None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    return _said([program, "--query-gpu=driver_version", "--format=csv,noheader"]).strip() or None


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), mode=sys.argv[3])
