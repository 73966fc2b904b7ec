"""The X-shaped group of PSGD: Q = diag(a) + adiag(b), 2n numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .psgd_group import Coins, Factor, State, joined, sizes_of


class XMat(Factor):
    """Q = diag(a) + adiag(b): (Q x)_k = a_k x_k + b_k x_{n−1−k}.

    Every coordinate is coupled to its mirror image, so the order of the coordinates is part of the preconditioner.
    For odd n the centre is its own image: its b stays 0.

    Args:
        a, b: Shape [n].

    Source: Pooladzandi and Li, 2024, section 3 (matrix-free preconditioners); the code of psgd_torch, XMat.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b

    @classmethod
    def initial(cls, p: Tensor, scale: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> dict[str, Tensor]:
        # b belongs to a place in a vector, which a single parameter does not have.
        return {"a": scale * torch.ones(p.shape, dtype=scale.dtype, device=p.device)}

    @classmethod
    def gathered(cls, states: Sequence[State]) -> XMat:
        return cls(joined([state["a"] for state in states]), joined([state["b"] for state in states]))

    def slices(self, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        sizes = sizes_of(params)
        pieces = zip(params, self.a.split(sizes), self.b.split(sizes), strict=True)
        return [{"a": a.view(p.shape), "b": b.view(p.shape)} for p, a, b in pieces]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.a), len(self.a)))

    def apply(self, V: Tensor) -> Tensor:
        return self.a.unsqueeze(1) * V + self.b.unsqueeze(1) * V.flip(0)

    def transposed(self, V: Tensor) -> Tensor:
        return self.a.unsqueeze(1) * V + (self.b.unsqueeze(1) * V).flip(0)

    def precondition(self, g: Tensor) -> Tensor:
        coupling = self.a * self.b
        return (self.a.square() + self.b.square().flip(0)) * g + (coupling + coupling.flip(0)) * g.flip(0)

    def inverse_transposed(self, v: Tensor) -> Tensor:
        a, b = self.a.flip(0), self.b.flip(0)
        return (a * v - b * v.flip(0)) / self._determinants

    def moved(self, v: Tensor, h: Tensor, A: Tensor, B: Tensor, rate: float, normalizer: str, coins: Coins) -> XMat:
        tiny = torch.finfo(v.dtype).tiny
        diagonal = A.square() - B.square()
        anti = A * A.flip(0) - B * B.flip(0)
        if len(anti) % 2:
            anti[len(anti) // 2] = 0
        if normalizer == "2nd":
            size = (A.square() + B.square()).max()
        else:
            size = torch.maximum(diagonal.abs().max(), anti.abs().max())
        step = rate / (size + tiny)
        return XMat(
            self.a - step * (diagonal * self.a + anti * self.b.flip(0)),
            self.b - step * (diagonal * self.b + anti * self.a.flip(0)),
        )

    @property
    def log_det(self) -> Tensor:
        logs = self._determinants.abs().log()  # each pair stands twice; the centre's "determinant" is a²
        return logs.sum() / 2

    @property
    def _determinants(self) -> Tensor:
        """Determinants of the 2 × 2 blocks on (k, n−1−k)."""
        return self.a * self.a.flip(0) - self.b * self.b.flip(0)

    def uncoupled(self) -> XMat:
        """The diagonal factor whose P has the same diagonal."""
        return XMat((self.a.square() + self.b.square().flip(0)).sqrt(), torch.zeros_like(self.b))
