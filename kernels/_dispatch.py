"""Which implementation of a function runs where, and why."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

# Fastest first. Every one gives the same bits where the codec's definition says so; they differ in speed only.
PATHS = {"cpu": ("c", "numba", "torch"), "cuda": ("cuda", "torch")}
ALL_PATHS = ("c", "numba", "torch", "cuda", "reference")
FUNCTIONS = {
    "codec": "4-bit quantisation of optimizer states",
    "adamw4": "fused 4-bit AdamW step",
    "lanczos": "batched Lanczos",
    "tridiagonal": "batched tridiagonal quadrature",
}
# What has no module of that path.
ABSENT = {("lanczos", "numba"), ("lanczos", "reference"), ("tridiagonal", "reference")}
VARIABLE = "SHARPSCOPE_KERNELS"


class KernelWarning(UserWarning):
    """A function runs, with the right result, on a slower path than this machine could offer."""


class Choice(NamedTuple):
    """One function on one kind of device: the path that runs, and why the faster ones do not."""

    function: str
    device: str
    path: str
    reasons: dict[str, str]


def choose(function: str, device: torch.device) -> ModuleType:
    """The module that implements `function` for tensors on `device`; one warning where a faster path is missing.

    Raises:
        ValueError: $SHARPSCOPE_KERNELS names no path, or tensors are on a device of another kind.
        RuntimeError: The path that $SHARPSCOPE_KERNELS names cannot run here.
    """
    return _chosen(function, device.type, os.environ.get(VARIABLE) or "auto")


def choice(function: str, device_type: str) -> Choice:
    """What `choose` takes, without its warning."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted != "auto" and wanted not in ALL_PATHS:
        raise ValueError(f"${VARIABLE} is {wanted!r}; it must be auto or one of {', '.join(ALL_PATHS)}")
    if device_type not in PATHS:
        raise ValueError(f"tensors are on {device_type!r}; kernels run on cpu and cuda: move them there")
    candidates = PATHS[device_type]
    # A path for the other kind of device, or one that the function does not have, is no answer: then go on as usual.
    if wanted != "auto" and (function, wanted) not in ABSENT:
        suits = wanted in candidates or (wanted == "reference" and device_type == "cpu")
        candidates = (wanted,) if suits else candidates
    reasons: dict[str, str] = {}
    for path in candidates:
        if (function, path) in ABSENT:
            continue
        reason = why_unavailable(function, path)
        if reason is None:
            return Choice(function, device_type, path, reasons)
        reasons[path] = reason
    raise RuntimeError(f"${VARIABLE} asks for {wanted!r}, which cannot run here: {reasons[wanted]}")


@functools.cache
def why_unavailable(function: str, path: str) -> str | None:
    """None where the path runs on this machine; else the reason, with the cure."""
    check = getattr(_module(function, path), "why_unavailable", None)
    return None if check is None else check()


@functools.cache
def _chosen(function: str, device_type: str, wanted: str) -> ModuleType:
    found = choice(function, device_type)
    if found.reasons:
        text = "; ".join(f"no {path}: {reason}" for path, reason in found.reasons.items())
        warnings.warn(
            f"{FUNCTIONS[function]} runs on the slower path {found.path!r}; {text}", KernelWarning, stacklevel=4
        )
    return _module(function, found.path)


def _module(function: str, path: str) -> ModuleType:
    return importlib.import_module(f".{function}_{path}", __package__)
