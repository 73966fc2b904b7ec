"""What is installed, what it can do here, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import NamedTuple

import torch

from ..kernels import capabilities
from .workloads.fashion_mnist import PACKAGE_FOLDER
from .workloads.text import KJV_COMMAND

PACKAGES = ("sharpscope", "torch", "numpy", "scipy", "pandas", "matplotlib", "typer", "rich", "tqdm", "safetensors")
# Package, and what it adds.
OPTIONAL = {
    "scikit-learn": "the digits workloads: pip install 'sharpscope[data]'",
    "pyarrow": "Trajectory.to_parquet: pip install 'sharpscope[export]'",
    "numba": "fast kernels where there is no C compiler: pip install 'sharpscope[numba]'",
    "cupy": "CUDA kernels, without which they run as torch operations: pip install 'sharpscope[cuda13]'",
}


class Fact(NamedTuple):
    """One line: of which kind, about what, what is found, and what follows."""

    kind: str
    name: str
    found: str
    meaning: str = ""


def info() -> list[Fact]:
    """Versions, back ends and data on this machine."""
    facts = [Fact("version", "python", platform.python_version())]
    facts += [Fact("version", name, _version(name) or "missing") for name in PACKAGES]
    for name, use in OPTIONAL.items():
        found = _version(name) or (_version("cupy-cuda13x") or _version("cupy-cuda12x") if name == "cupy" else None)
        facts.append(Fact("optional", name, found or "not installed", "" if found else use))
    facts += [_cpu(), *_cuda(), *_kernels(), *_data()]
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> Fact:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    meaning = f"torch works with {torch.get_num_threads()} threads; the same number gives the same bits again"
    return Fact("device", "cpu", f"{cores} cores", meaning)


def _cuda() -> list[Fact]:
    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        )
        return [Fact("device", "cuda", "none", f"everything runs on the CPU; {built}")]
    facts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        meaning = "objectives work where their model is; the built-in workloads stay on the CPU without --device cuda"
        facts.append(Fact("device", f"cuda:{index}", size, meaning))
    return facts


def _kernels() -> list[Fact]:
    facts = []
    for found in capabilities():
        notes = [note for note in (found.verified, found.why) if note]
        facts.append(Fact("kernel", f"{found.what}, {found.device}", found.path, "; ".join(notes)))
    return facts


def _data() -> list[Fact]:
    digits = importlib.util.find_spec("sklearn") is not None
    fashion = PACKAGE_FOLDER.is_dir()
    bible = shutil.which(KJV_COMMAND[0]) is not None
    return [
        Fact("data", "digits", "scikit-learn" if digits else "missing", "" if digits else OPTIONAL["scikit-learn"]),
        Fact(
            "data",
            "Fashion-MNIST",
            "Debian package" if fashion else "not installed",
            "" if fashion else "apt install dataset-fashion-mnist, --data FOLDER, or a download at the first use",
        ),
        Fact(
            "data",
            "text",
            "King James Bible" if bible else "pydoc_data.topics",
            "" if bible else "apt install bible-kjv for a longer one, or --data FILE",
        ),
    ]
