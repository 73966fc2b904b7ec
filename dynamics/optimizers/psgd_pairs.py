"""Where PSGD's pairs (v, h) come from: products with the Hessian, or gradients to be whitened."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...hessian.curvature import Hessian
from .base import Closure

Vectors = dict[Tensor, Tensor]


class Pairs(ABC):
    """The pairs of one step."""

    def evaluate(self, closure: Closure | None) -> Any:
        """Loss and gradients at the weights; the gradients are left in `.grad`."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @abstractmethod
    def products(self, probes: Vectors) -> tuple[Vectors, Vectors]:
        """(v, h) for probes v of the parameters that have a gradient; v may come back rounded."""


class Gradients(Pairs):
    """h = g: P becomes E[g gᵀ]^(-1/2)."""

    def products(self, probes: Vectors) -> tuple[Vectors, Vectors]:
        return probes, {p: _gradient(p) for p in probes}


class Differences(Pairs):
    """h = (∇L(θ + ε v) − ∇L(θ)) / ε by a second call of the closure, ε = √eps of the parameter's dtype.

    Both calls draw the same random numbers (dropout), and the weights come back bit for bit. BatchNorm's running
    statistics see both calls. v is the displacement that was made, after rounding, over ε. The error is O(ε |v|²) from
    the third derivative and O(√eps |g|) from rounding.

    Source: the code of psgd_torch, `exact_hessian_vector_product=False`.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params

    def evaluate(self, closure: Closure | None) -> Any:
        self._closure, self._streams = closure, _streams()
        return super().evaluate(closure)

    def products(self, probes: Vectors) -> tuple[Vectors, Vectors]:
        streams = _streams()
        weights = {p: p.detach().clone() for p in probes}
        before = {p: p.grad.clone() if p in probes and p.grad is not None else p.grad for p in self._params}
        moved: Vectors = {}
        h: Vectors = {}
        try:
            for p, v in probes.items():
                p.add_((_scale(p) * v).to(p.dtype))
                moved[p] = (p.to(v.dtype) - weights[p].to(v.dtype)) / _scale(p)
            _restore(self._streams)
            super().evaluate(self._closure)
            for p, v in moved.items():
                after = torch.zeros_like(v) if p.grad is None else p.grad.to(v.dtype)
                h[p] = (after - _gradient(p, before).to(v.dtype)) / _scale(p)
        finally:
            _restore(streams)
            for p, weight in weights.items():
                p.copy_(weight)
            for p, gradient in before.items():
                p.grad = gradient
        return moved, h


class Exact(Pairs):
    """h = H v by differentiating the gradient, which needs the graph of the loss.

    The closure returns the loss without calling backward, or calls `backward(create_graph=True)`. A custom autograd
    function that is marked once_differentiable drops terms of H without a word: take differences for it.

    Source: Pearlmutter, Fast Exact Multiplication by the Hessian, 1994.
    """

    def __init__(self, params: Sequence[Tensor], *, twice: bool) -> None:
        self._params, self._twice = [p for p in params if p.requires_grad], twice

    def evaluate(self, closure: Closure | None) -> Any:
        for p in self._params:
            p.grad = None
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            loss = super().evaluate(closure)
        if any(p.grad is not None for p in self._params):
            self._gradients = {p: p.grad for p in self._params if p.grad is not None}
            if self._twice and not any(g.requires_grad for g in self._gradients.values()):
                raise ValueError(
                    "the closure called loss.backward(), which frees the graph that `curvature` 'hvp' differentiates: "
                    "return the loss without backward, call backward(create_graph=True), or take curvature='difference'"
                )
        else:
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise TypeError(
                    f"the closure returned {type(loss).__name__} without a graph and left no gradients; `curvature` "
                    "'hvp' needs the loss itself: return it without backward() and without float()"
                )
            with torch.enable_grad():
                found = torch.autograd.grad(loss, self._params, create_graph=self._twice, allow_unused=True)
            self._gradients = {p: g for p, g in zip(self._params, found, strict=True) if g is not None}
        for p, gradient in self._gradients.items():
            p.grad = gradient.detach()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def products(self, probes: Vectors) -> tuple[Vectors, Vectors]:
        rounded = {p: v.to(p.dtype) for p, v in probes.items()}
        curved = [p for p in probes if self._gradients[p].requires_grad]
        found: Sequence[Tensor | None] = [None] * len(probes)
        if curved:
            outputs, vectors = [self._gradients[p] for p in curved], [rounded[p] for p in curved]
            try:
                found = torch.autograd.grad(outputs, list(probes), vectors, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"the loss cannot be differentiated twice ({error}); take curvature='difference'"
                ) from error
        products = {p: torch.zeros_like(p) if h is None else h for p, h in zip(probes, found, strict=True)}
        return {p: rounded[p].to(v.dtype) for p, v in probes.items()}, products


class OfObjective(Pairs):
    """h = H v with the Hessian of an `Objective`; gradients are those of the training loop."""

    def __init__(self, hessian: Hessian) -> None:
        self._hessian = hessian

    def products(self, probes: Vectors) -> tuple[Vectors, Vectors]:
        op = self._hessian
        named = op.objective.parameters
        known = set(named.values())
        if any(p not in known for p in probes):
            raise ValueError(
                "`objective` does not analyse every parameter that has a gradient; make it with params=None, or with "
                "all parameters of the optimizer"
            )
        v = op.flatten({name: probes.get(p, torch.zeros_like(p)).to(op.dtype) for name, p in named.items()})
        h = op.unflatten(op @ v)
        return probes, {p: h[name] for name, p in named.items() if p in probes}


@dataclass(frozen=True)
class _RandomState:
    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor] | None


def _streams() -> _RandomState:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return _RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def _restore(state: _RandomState) -> None:
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state_all(state.cuda)


def _scale(p: Tensor) -> float:
    return torch.finfo(p.dtype).eps ** 0.5


def _gradient(p: Tensor, gradients: dict[Tensor, Tensor | None] | None = None) -> Tensor:
    gradient = p.grad if gradients is None else gradients[p]
    if gradient is None:
        raise RuntimeError("a probe was drawn for a parameter without a gradient")
    return gradient
