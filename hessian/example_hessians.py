"""Factors of the positive parts of single examples' Hessians, written out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from ..landscape.memory import InsufficientMemory
from ..landscape.objective import Objective
from .example_chunks import ExampleChunk, example_chunks
from .example_factors import ExampleGram

log = logging.getLogger("sharpscope")


def positive_hessian_factors(objective: Objective, *, memory_budget: int, method: str) -> tuple[ExampleGram, Tensor]:
    """F_i [n, parameters, r] with F_i F_iᵀ the positive part of n w_i ∇²ℓ_i; and the share ‖−‖_F / ‖·‖_F [n] cut off.

    Raises:
        InsufficientMemory: matrices of all examples do not fit `memory_budget`.
    """
    with example_chunks(objective) as (theta, chunks):
        n, p = sum(len(chunk) for chunk in chunks), sum(t.numel() for t in theta)
        needed = 4 * 8 * n * p**2
        if needed > memory_budget:
            raise InsufficientMemory(
                f"the Hessians of {n} examples by {p} parameters need {needed / 2**30:.3g} GiB and `memory_budget` is "
                f"{memory_budget / 2**30:.3g} GiB; use factor='ggn', fewer examples or fewer parameters"
            )
        found, name = _hessians(objective, theta, chunks, method)
    weights = n * torch.cat([chunk.weights for chunk in chunks]).to(objective.device)
    hessians = torch.cat([h for h, _ in found]).double() * weights.reshape(-1, 1, 1)
    values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
    # What rounding leaves of a zero is no part of a spectrum.
    eps = torch.finfo(objective.dtype).eps
    noise = p * eps * values.abs().amax(1, keepdim=True)
    rank = max(1, int((values > noise).sum(1).max()))
    positive = torch.where(values > noise, values, 0.0)
    factors = (vectors * positive.sqrt().unsqueeze(1))[:, :, -rank:]
    cut = values.clamp(max=0.0).norm(dim=1) / values.norm(dim=1).clamp(min=1e-300)
    norms = (torch.cat([g for _, g in found]).double() * weights.unsqueeze(1)).norm(dim=1).cpu()
    return ExampleGram(None, factors, norms, p * eps, name), cut.cpu()


def _hessians(
    objective: Objective, theta: Sequence[Tensor], chunks: Sequence[ExampleChunk], method: str
) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """`_of_chunk` of every chunk, by the first method that works, and its name."""
    if method != "loop":
        try:
            return [_of_chunk(objective, theta, chunk, vectorised=True) for chunk in chunks], "vmap"
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what a user's model raises under a transform may be anything
            if method == "vmap":
                raise
            log.info("coherence: vmap failed (%s: %s)", type(error).__name__, error)
    return [_of_chunk(objective, theta, chunk, vectorised=False) for chunk in chunks], "loop"


def _of_chunk(
    objective: Objective, theta: Sequence[Tensor], chunk: ExampleChunk, *, vectorised: bool
) -> tuple[Tensor, Tensor]:
    """∇²ℓ_i [b, parameters, parameters] and ∇ℓ_i [b, parameters]."""
    if not vectorised:
        pairs = [_by_double_backward(objective, theta, chunk, i) for i in range(len(chunk))]
        return torch.stack([h for h, _ in pairs]), torch.stack([g for _, g in pairs])
    rows = chunk.several(0, len(chunk))
    whole = objective.join([t.detach() for t in theta], theta)

    def loss(flat: Tensor, *rows: Tensor) -> Tensor:
        own = objective.split(flat, theta)
        with objective.replaced(own):
            return objective.raw_loss(chunk.of(rows), own)

    in_dims = (None, *(0 for _ in rows))
    # One example's Hessian at a time: reverse over reverse, vectorised over its rows.
    hessians = [jacrev(grad(loss))(whole, *(t[i] for t in rows)) for i in range(len(chunk))]
    return torch.stack(hessians), vmap(grad(loss), in_dims=in_dims)(whole, *rows)


def _by_double_backward(
    objective: Objective, theta: Sequence[Tensor], chunk: ExampleChunk, i: int
) -> tuple[Tensor, Tensor]:
    value = objective.raw_loss(chunk.single(i), theta)
    gradient = objective.join(torch.autograd.grad(value, theta, create_graph=True, allow_unused=True), theta)
    rows = [
        objective.join(torch.autograd.grad(entry, theta, retain_graph=True, allow_unused=True), theta)
        if entry.requires_grad
        else torch.zeros_like(gradient)
        for entry in gradient
    ]
    return torch.stack(rows).detach(), gradient.detach()
