"""Which implementation runs on this machine, why, and what has been verified on a GPU."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import dataclass

import torch

from ._dispatch import FUNCTIONS, choice, why_unavailable
from ._launch import FOLDER, Source

# Written by benchmarks/gpu_suite.py after all GPU tests passed: device, date and the hash of every CUDA file.
RECORD = FOLDER / "verified.json"


@dataclass(frozen=True)
class Capability:
    """One function on one kind of device.

    Attributes:
        function: As in `FUNCTIONS`; `what` says it in words.
        device: "cpu" or "cuda".
        path: What runs: "c", "numba", "torch", "cuda", "reference", or "none" without such a device.
        why: Why nothing faster runs; empty if the fastest does.
        verified: Of CUDA kernels: on which GPU and when the present text passed the GPU tests, or that it did not.
    """

    function: str
    what: str
    device: str
    path: str
    why: str
    verified: str


def capabilities() -> list[Capability]:
    """The path of every function on the CPU and on CUDA devices; compiles the C libraries if that was not done yet."""
    found = []
    for function, what in FUNCTIONS.items():
        on_cpu = choice(function, "cpu")
        found.append(Capability(function, what, "cpu", on_cpu.path, _text(on_cpu.reasons), ""))
        found.append(_on_cuda(function, what))
    return found


def verification(function: str) -> str:
    """Whether the CUDA text of a function is what passed the GPU tests, by the hashes of its files."""
    if not RECORD.exists():
        return "not verified on a GPU"
    record = json.loads(RECORD.read_text())
    sources: tuple[Source, ...] = importlib.import_module(f".{function}_cuda", __package__).SOURCES
    files = sorted({name for source in sources for name in source.files})
    if all(record["files"].get(name) == file_hash(name) for name in files):
        return f"verified on {record['device']}, {record['date']}"
    return f"not verified on a GPU since it was changed (before: {record['device']}, {record['date']})"


def file_hash(name: str) -> str:
    """SHA-256 of a file of this folder."""
    return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()


def _on_cuda(function: str, what: str) -> Capability:
    if torch.cuda.is_available():
        found = choice(function, "cuda")
        path, why = found.path, _text(found.reasons)
    else:
        path, why = "none", why_unavailable(function, "cuda") or ""
    return Capability(function, what, "cuda", path, why, verification(function))


def _text(reasons: dict[str, str]) -> str:
    return "; ".join(f"no {path}: {reason}" for path, reason in reasons.items())
