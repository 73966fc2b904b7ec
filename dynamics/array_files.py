"""Tensors of a trajectory as safetensors files: complete or absent, never half written."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .atomic_files import write_atomically
from .schema import TrajectoryError


def write_arrays(folder: Path, label: str, arrays: Mapping[str, Tensor]) -> str:
    """Writes the tensors and returns the file's name, `label` (made safe) and a hash of the content.

    A file that can be named is whole; a crash in between leaves a `.tmp` file that nothing refers to.
    """
    # A clone for each: safetensors refuses tensors that share storage.
    content = safetensors.torch.save({name: t.detach().cpu().clone().contiguous() for name, t in arrays.items()})
    safe = re.sub(r"[^A-Za-z0-9.=-]+", "_", label)[:100]
    name = f"{safe}-{_digest(content)}.safetensors"
    folder.mkdir(exist_ok=True)
    file = folder / name
    if not (file.exists() and _digest(file.read_bytes()) == _digest(content)):
        write_atomically(file, content)
    return name


def read_arrays(file: Path) -> dict[str, Tensor]:
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise TrajectoryError(
            f"{file} is missing though a row refers to it; restore it from a copy, or record the step again"
        ) from error
    damaged = f"{file} is damaged: its content does not match its name; restore it, or record the step again"
    if _digest(content) != file.stem.rpartition("-")[2]:
        raise TrajectoryError(damaged)
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise TrajectoryError(damaged) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
