"""Quadratic losses with homogeneous and heterogeneous diagonal blocks: what Adam's scaling gains on each, exactly.

Sizes: B blocks of d coordinates, n = B d; m starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...hessian.operator import DenseOperator
from ...landscape.layout import Layout

# Eigenvalues of the blocks; both cases have the same nine, and κ = 5000.
CASES: dict[str, tuple[tuple[float, ...], ...]] = {
    "heterogeneous": ((1, 2, 3), (99, 100, 101), (4998, 4999, 5000)),
    "homogeneous": ((1, 99, 4998), (2, 100, 4999), (3, 101, 5000)),
}


@dataclass(frozen=True)
class BlockQuadratic:
    """f(w) = ½ wᵀ H w with H block-diagonal, each block Q diag(λ) Qᵀ with a random rotation Q of its own.

    Attributes:
        eigenvalues: Of each block.
        H: [n, n], float64.
    """

    eigenvalues: tuple[tuple[float, ...], ...]
    H: Tensor

    @classmethod
    def random(cls, eigenvalues: tuple[tuple[float, ...], ...], *, seed: int) -> BlockQuadratic:
        """With rotations uniform over the orthogonal group, drawn with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        blocks = []
        for values in eigenvalues:
            Q, R = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
            Q = Q * R.diagonal().sign()  # without the signs QR is not uniform
            blocks.append(Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T)
        return cls(eigenvalues, torch.block_diag(*blocks))

    @property
    def condition(self) -> float:
        """κ of H."""
        values = [value for block in self.eigenvalues for value in block]
        return max(values) / min(values)

    @property
    def block_condition(self) -> float:
        """The largest κ of a block."""
        return max(max(values) / min(values) for values in self.eigenvalues)

    def operator(self) -> DenseOperator:
        """H with its blocks as the parameters "block0", "block1" ..., for `block_spectra`."""
        names = tuple(f"block{i}" for i in range(len(self.eigenvalues)))
        return DenseOperator(self.H, layout=Layout(names, tuple(torch.Size([len(v)]) for v in self.eigenvalues)))

    def descent(self, start: Tensor, scale: Tensor | None = None) -> Descent:
        r"""w ← w − η D⁻¹ H w from `start` [n] at the best constant η = 2 / (μ + L), the extremes of D⁻½ H D⁻½.

        Args:
            scale: Diagonal [n] of D, positive; None is gradient descent. With |H w0| it is Adam with β1 = 0, ε = 0 and
                its second moment held at that of the first gradient (β2 = 1, v0 = g0²).
        """
        root = torch.ones_like(start) if scale is None else scale.sqrt()
        values, vectors = torch.linalg.eigh(self.H / root.unsqueeze(1) / root)
        return Descent(values, vectors.T @ (root * start))


def quadratic_suite(seed: int = 0) -> dict[str, BlockQuadratic]:
    """The two nine-dimensional problems of the paper, "heterogeneous" and "homogeneous": three blocks of three.

    Source: Zhang et al., Why Transformers Need Adam: A Hessian Perspective, 2024, its study of quadratic models.
    """
    return {name: BlockQuadratic.random(values, seed=seed) for name, values in CASES.items()}


@dataclass(frozen=True)
class Descent:
    r"""Gradient descent on ½ Σ λ_i y_i² at η = 2 / (λ_min + λ_max): y_i(t) = (1 − η λ_i)^t y_i, in closed form.

    Attributes:
        values: λ [n], positive, ascending.
        start: y(0) [n].
    """

    values: Tensor
    start: Tensor

    @property
    def lr(self) -> float:
        return 2 / float(self.values[0] + self.values[-1])

    @property
    def condition(self) -> float:
        """κ of what descends: that of D⁻½ H D⁻½."""
        return float(self.values[-1] / self.values[0])

    def loss(self, step: int) -> float:
        """After so many steps; it never grows."""
        factors = (1 - self.lr * self.values).abs() ** step
        return 0.5 * float((self.values * (factors * self.start).square()).sum())

    def steps_to(self, share: float) -> int:
        """The first step at which the loss is at most `share` of that at the start."""
        goal, last = share * self.loss(0), 1
        while self.loss(last) > goal:
            last *= 2
        low, high = last // 2, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.loss(middle) <= goal else (middle, high)
        return high if self.loss(0) > goal else 0


def most_steps(condition: float, share: float) -> int:
    """No start takes gradient descent more steps: every factor is at most (κ − 1) / (κ + 1) in size."""
    return math.ceil(math.log(share) / (2 * math.log((condition - 1) / (condition + 1))))
