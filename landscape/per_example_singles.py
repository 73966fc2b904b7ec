"""The examples of a chunk evaluated on their own: vectorised by `torch.func`, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from .batches import fresh_containers, map_tensors
from .evaluation import Chunk, Evaluation
from .per_example_sums import ChunkSums

# Entries of per-example gradients made by one vectorised call.
VECTORISED_ENTRIES = 1 << 23


class Singles:
    """ℓ_i and g_i of a chunk's examples; for use inside an evaluation.

    Args:
        theta: The parameters as the model uses them.
    """

    def __init__(self, objective: Evaluation, chunk: Chunk, theta: Sequence[Tensor]) -> None:
        self._objective, self._chunk, self._theta = objective, chunk, list(theta)
        self._parts: tuple[Any, Any] | None = None
        if objective._criterion is not None:
            self._parts = objective._split(fresh_containers(chunk.batch))
        # Tensors with an example axis, as [b, rows of an example, ...].
        self._cut: list[Tensor] = []
        for part, flattened in self._pieces():
            map_tensors(part, lambda t, f=flattened: self._note(t, f))

    def loss(self, *rows: Tensor) -> Tensor:
        """ℓ_i as a scalar, from the example's rows of every tensor that has some."""
        left = iter(rows)

        def chosen(tensor: Tensor, flattened: bool) -> Tensor:
            return next(left) if self._has_examples(tensor, flattened) else tensor

        parts = [map_tensors(part, lambda t, f=flattened: chosen(t, f)) for part, flattened in self._pieces()]
        objective = self._objective
        if self._parts is None:
            value = objective._loss(objective.model, parts[0])
        else:
            assert objective._criterion is not None
            assert objective._predict is not None
            assert objective.model is not None
            value = objective._criterion(objective._predict(objective.model, parts[0]), parts[1])
        return value.reshape(())

    def gradient(self, i: int) -> list[Tensor]:
        """g_i by one ordinary backward pass, in the shapes of the parameters."""
        return self._one(i, range(len(self._theta)))[1]

    def gradient_nearby(self, i: int, relative: float) -> list[Tensor]:
        """g_i where every weight is larger by a random share of up to `relative`."""
        random = torch.Generator().manual_seed(0)
        near = []
        for t in self._theta:
            share = relative * torch.rand(t.shape, generator=random, dtype=torch.float64)
            near.append((t.detach() * (1 + share).to(t)).requires_grad_())
        with self._objective.replaced(near):
            value = self.loss(*(t[i] for t in self._cut))
            found = torch.autograd.grad(value, near, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(near, found, strict=True)]

    def losses(self, kept: Tensor) -> Tensor:
        """ℓ_i of the examples kept [m], in float64."""
        chosen = [t[kept.to(t.device)] for t in self._cut]
        try:
            with torch.no_grad():
                values = vmap(self._substituted(()), in_dims=(None, *(0 for _ in chosen)))((), *chosen)
        except Exception:  # what a user's code raises under vmap may be anything; on its own it must work
            values = torch.stack([self.loss(*(t[i] for t in chosen)).detach() for i in range(int(kept.sum()))])
        return values.double().cpu()

    def add(self, sums: ChunkSums, which: Sequence[int], step: int | None, vectorised: bool) -> Tensor:
        """Adds the gradients by the parameters `which` to the sums; returns the losses of the examples kept."""
        numbers = torch.nonzero(sums.kept).reshape(-1).tolist()
        if not vectorised:
            step = 1
        elif step is None:
            step = max(1, sums.at_most(VECTORISED_ENTRIES) // sum(self._theta[k].numel() for k in which))
        losses = []
        for first in range(0, len(numbers), step):
            group = numbers[first : first + step]
            if vectorised:
                values, gradients = self._several(group, which)
            else:
                value, single = self._one(group[0], which)
                values, gradients = value.reshape(1), [g.unsqueeze(0) for g in single]
            losses.append(values.detach().double().cpu())
            for k, gradient in zip(which, gradients, strict=True):
                sums.add_examples(k, gradient.reshape(len(group), -1), group)
        return torch.cat(losses)

    def _several(self, group: Sequence[int], which: Sequence[int]) -> tuple[Tensor, Sequence[Tensor]]:
        chosen = [t[list(group)] if len(group) < len(t) else t for t in self._cut]
        function = vmap(grad_and_value(self._substituted(which)), in_dims=(None, *(0 for _ in chosen)))
        gradients, values = function(tuple(self._theta[k].detach() for k in which), *chosen)
        return values, gradients

    def _one(self, i: int, which: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        wanted = [self._theta[k] for k in which]
        value = self.loss(*(t[i] for t in self._cut))
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        return value.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]

    def _substituted(self, which: Sequence[int]) -> Any:
        def function(own: tuple[Tensor, ...], *rows: Tensor) -> Tensor:
            full = [t.detach() for t in self._theta]
            for k, tensor in zip(which, own, strict=True):
                full[k] = tensor
            with self._objective.replaced(full):
                return self.loss(*rows)

        return function

    def _pieces(self) -> list[tuple[Any, bool]]:
        """What holds tensors, and whether they may be flattened to [b · length, ...]: targets may."""
        if self._parts is None:
            return [(self._chunk.batch, False)]
        return [(self._parts[0], False), (self._parts[1], True)]

    def _has_examples(self, tensor: Tensor, flattened: bool) -> bool:
        size = self._chunk.size
        return tensor.ndim > 0 and (tensor.shape[0] % size == 0 if flattened else tensor.shape[0] == size)

    def _note(self, tensor: Tensor, flattened: bool) -> Tensor:
        if self._has_examples(tensor, flattened):
            self._cut.append(tensor.reshape(self._chunk.size, -1, *tensor.shape[1:]))
        return tensor
