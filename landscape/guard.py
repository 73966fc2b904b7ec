"""Evaluating a model without leaving a trace: modes, buffers, attributes, RNG and global switches as found."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

MODES = ("eval", "train", "keep")


@contextmanager
def rng_restored() -> Iterator[None]:
    """Restores the random state of Python, NumPy, torch and every initialised CUDA device."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restores every attribute of every module: training flags, caches, counters, cached RNN weights."""
    found = [(module, dict(module.__dict__)) for module in model.modules()]
    members = [(holder, type(holder)(holder)) for module, _ in found for holder in _members(module)]
    try:
        yield
    finally:
        for holder, before in members:
            if list(holder) != list(before) or _replaced(holder, before):
                holder.clear()
                holder.update(before)
        for module, attributes in found:
            present = module.__dict__
            for name in present.keys() - attributes.keys():
                del present[name]
            for name, value in attributes.items():
                if present.get(name) is not value:
                    present[name] = value


def _members(module: nn.Module) -> tuple[Any, ...]:
    """Where a module keeps its tensors and children by name."""
    return (module._parameters, module._buffers, module._modules, module._non_persistent_buffers_set)


def _replaced(holder: Any, before: Any) -> bool:
    return isinstance(holder, dict) and any(holder[name] is not before[name] for name in before)


@contextmanager
def substituted(model: nn.Module, replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """Puts `replacements[id(tensor)]` wherever a parameter or buffer of the model stands, tied places included.

    Unlike `torch.func.functional_call` the replacement may stay for as long as a graph is differentiated, which
    activation checkpointing needs: it runs the forward pass again during the backward pass.
    """
    places = []
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None and id(tensor) in replacements:
                    places.append((slots, name, tensor))
    try:
        for slots, name, tensor in places:
            slots[name] = replacements[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for slots, name, tensor in places:
            slots[name] = tensor  # type: ignore[assignment]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switches autocast off on every device where it is on."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def plain_evaluation(
    model: nn.Module | None, mode: str, *, eager: bool = False, others: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Gradients on, autocast off, kernels that can be differentiated twice, `mode` set; all restored on leaving.

    Args:
        model: Whose attributes are restored; None when there is no module.
        mode: "eval", "train" or "keep" (the flags as they are).
        others: Modules that the loss uses besides the model, a criterion for example; their attributes are restored.
        eager: Run functions under torch.compile uncompiled: compiled graphs refuse a second derivative.
    """
    with ExitStack() as stack:
        stack.enter_context(rng_restored())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast())
        # Flash and memory-efficient attention have no second derivative (pytorch#116350); the math kernel has.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_without_attention_fast_path())
        for other in others:
            stack.enter_context(attributes_restored(other))
        if model is not None:
            stack.enter_context(attributes_restored(model))
            if mode != "keep":
                for module in model.modules():
                    module.training = mode == "train"
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                # cuDNN RNN kernels have no second derivative.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            for module in model.modules():
                if getattr(module, "_compiled_call_impl", None) is not None:
                    module._compiled_call_impl = None
        if eager:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _without_attention_fast_path() -> Iterator[None]:
    """`nn.TransformerEncoder` takes another route under no_grad, with other rounding; both must agree here."""
    found = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(found)


def is_compiled(model: nn.Module | None, *functions: object) -> bool:
    """Whether torch.compile wraps the model, a module inside it, or one of the functions."""
    modules = () if model is None else model.modules()
    return any(type(module).__name__ == "OptimizedModule" for module in modules) or any(
        hasattr(function, "_torchdynamo_orig_callable") for function in functions
    )
