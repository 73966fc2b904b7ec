"""The low-rank group of PSGD: Q = (I + U Vᵀ) diag(d), (2r + 1) n numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .psgd_group import Coins, Factor, State, joined, sizes_of


class LRA(Factor):
    """Q = (I + U Vᵀ) diag(d); rank 0 is the diagonal group.

    One step moves d, and either U or V: with the other held fixed I + U Vᵀ is a group, with both it is not.

    Args:
        U, V: Shape [n, r].
        d: Shape [n].

    Source: Li, Black Box Lie Group Preconditioners for SGD, 2022, section 3; Pooladzandi and Li, 2024, section 3
    (low-rank approximation); the code of psgd_torch, LRA.
    """

    def __init__(self, U: Tensor, V: Tensor, d: Tensor) -> None:
        self.U, self.V, self.d = U, V, d

    @classmethod
    def initial(cls, p: Tensor, scale: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> dict[str, Tensor]:
        rank, n = options["rank"], options["num_coordinates"]
        size = 1 / math.sqrt(n * (rank + 10))  # ‖U Vᵀ‖ is then well below 1

        def normal() -> Tensor:
            drawn = torch.randn(p.numel(), rank, dtype=scale.dtype, device=p.device, generator=draw)
            return size * drawn

        d = scale * torch.ones(p.shape, dtype=scale.dtype, device=p.device)
        return {"d": d, "U": normal(), "V": normal()}

    @classmethod
    def gathered(cls, states: Sequence[State]) -> LRA:
        U, V = (torch.cat([state[key] for state in states]) for key in ("U", "V"))
        return cls(U, V, joined([state["d"] for state in states]))

    def slices(self, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        sizes = sizes_of(params)
        pieces = zip(params, self.U.split(sizes), self.V.split(sizes), self.d.split(sizes), strict=True)
        return [{"d": d.view(p.shape), "U": U, "V": V} for p, U, V, d in pieces]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.d), len(self.d)))

    def apply(self, V: Tensor) -> Tensor:
        scaled = self.d.unsqueeze(1) * V
        return scaled + self.U @ (self.V.T @ scaled)

    def transposed(self, V: Tensor) -> Tensor:
        return self.d.unsqueeze(1) * (V + self.V @ (self.U.T @ V))

    def inverse_transposed(self, v: Tensor) -> Tensor:
        x = v / self.d
        return x - self.V @ torch.linalg.solve(self._core.T, self.U.T @ x)

    def inverse(self, v: Tensor) -> Tensor:
        """Q⁻¹ v for v [n]."""
        return (v - self.U @ torch.linalg.solve(self._core, self.V.T @ v)) / self.d

    def moved(self, v: Tensor, h: Tensor, A: Tensor, B: Tensor, rate: float, normalizer: str, coins: Coins) -> LRA:
        start = self._balanced() if coins.balance else self
        U, V, d, core = start.U, start.V, start.d, start._core
        tiny = torch.finfo(v.dtype).tiny
        Ph, inverse_v = start.transposed(A.unsqueeze(1)).squeeze(1), start.inverse(B)
        slope = Ph * h - v * inverse_v
        if normalizer == "2nd":
            sizes = (Ph.square() + v.square() + tiny).rsqrt() * (h.square() + inverse_v.square() + tiny).rsqrt()
            step = rate * sizes.min()
        else:
            step = rate / (slope.abs().max() + tiny)
        d = d - step * d * slope
        if U.shape[1] == 0:
            return LRA(U, V, d)
        fixed = V if coins.first else U
        x, y = fixed.T @ A, fixed.T @ B  # [r]
        step = rate / (_size(A, fixed @ x, B, fixed @ y, normalizer) + tiny)
        if coins.first:
            U = U - step * (torch.outer(A, x @ core) - torch.outer(B, y @ core))
        else:
            V = V - step * (torch.outer(A + V @ x, x) - torch.outer(B + V @ y, y))
        return LRA(U, V, d)

    @property
    def log_det(self) -> Tensor:
        return self.d.abs().log().sum() + torch.linalg.slogdet(self._core).logabsdet

    @property
    def _core(self) -> Tensor:
        """I + Vᵀ U [r, r]; its determinant is that of I + U Vᵀ."""
        return torch.eye(self.U.shape[1], dtype=self.U.dtype, device=self.U.device) + self.V.T @ self.U

    def _balanced(self) -> LRA:
        """The same Q with ‖U‖ = ‖V‖."""
        U_size, V_size = self.U.norm(), self.V.norm()
        ratio = torch.where((U_size > 0) & (V_size > 0), (U_size / V_size).sqrt(), torch.ones_like(U_size))
        return LRA(self.U / ratio, self.V * ratio, self.d)


def _size(a: Tensor, x: Tensor, b: Tensor, y: Tensor, normalizer: str) -> Tensor:
    """‖a xᵀ‖ + ‖b yᵀ‖, or the Frobenius norm ‖a xᵀ − b yᵀ‖."""
    if normalizer == "2nd":
        return a.norm() * x.norm() + b.norm() * y.norm()
    square = (a @ a) * (x @ x) + (b @ b) * (y @ y) - 2 * (a @ b) * (x @ y)
    return square.clamp_min(0).sqrt()
