"""An orthonormal sketch of the range of a symmetric operator, and the inner products behind XTrace.

Sizes: n rows, k probes ω, r ≤ k orthonormal rows of the sketch Q (r = k unless the operator has rank below k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.accurate import combine, dot, norm, project
from .leave_one_out import Gram
from .operator import LinearOperator
from .probes import ROUNDING_EPS, checked_finite, gaussian, probe_groups, products, random_generator

# What is left of a product after projection counts as nothing below this many roundings of its length.
RANK_EPS = 8


def remainder(Q: Tensor, w: Tensor) -> Tensor:
    """(I − Qᵀ Q) w [n] for orthonormal rows Q [r, n], projected twice so that rounding leaves nothing inside."""
    rest = w
    for _ in range(2 if len(Q) else 0):
        rest = rest - combine(Q, project(Q, rest))
    return rest


def new_direction(Q: Tensor, w: Tensor) -> Tensor | None:
    """The unit vector [n] that w adds to the orthonormal rows Q, or None if w lies in their span up to rounding."""
    length = float(norm(w))
    if length == 0.0:
        return None
    rest = remainder(Q, w / length)
    left = float(norm(rest))
    return rest / left if left > RANK_EPS * torch.finfo(w.dtype).eps else None


class RangeSketch:
    """Gaussian probes Ω, an orthonormal basis Q of their images A Ω, and the images A Q; it can grow.

    It holds 3 k vectors of length n.

    Args:
        op: Symmetric operator A.
        capacity: Most probes.
        seed: Of the probes.
    """

    def __init__(self, op: LinearOperator, capacity: int, seed: int) -> None:
        self._op = op
        self._generator = random_generator(op, seed)
        vectors = torch.empty(3, capacity, op.shape[0], dtype=op.dtype, device=op.device)
        self._probes, self._Q, self._images = vectors  # rows [k, n], [r, n], [r, n]
        self._inner = torch.zeros(4, capacity, capacity, dtype=torch.float64)  # W, R, H, Z of `Gram`
        self._lengths = torch.zeros(capacity, dtype=torch.float64)
        self._r = 0
        self.num_probes = 0  # k
        self.products = 0

    def grow(self, num: int) -> None:
        """Take `num` more probes, for at most 2 `num` products."""
        old_k, old_r = self.num_probes, self._r
        for size in probe_groups(self._op, num):
            probes = gaussian(self._op, size, self._generator)
            for omega, image in zip(probes, products(self._op, probes), strict=True):
                self._add(omega, image)
        first = old_r
        for size in probe_groups(self._op, self._r - old_r):
            self._images[first : first + size] = products(self._op, self._Q[first : first + size])
            first += size
        self._fill_inner(old_k, old_r)

    def gram(self) -> Gram:
        """The inner products of everything held, on the CPU."""
        k, r = self.num_probes, self._r
        W, R, H, Z = self._inner
        return Gram(
            n=self._op.shape[0],
            W=W[:r, :k],
            R=R[:r, :k],
            H=(H[:r, :r] + H[:r, :r].T) / 2,
            Z=(Z[:r, :r] + Z[:r, :r].T) / 2,
            lengths=self._lengths[:k],
            relative_rounding=ROUNDING_EPS * torch.finfo(self._op.dtype).eps,
        )

    def _add(self, omega: Tensor, image: Tensor) -> None:
        i = self.num_probes
        self.num_probes, self.products = i + 1, self.products + 1
        checked_finite(dot(image, image), self._op, self.products)
        self._probes[i] = omega
        self._lengths[i] = dot(omega, omega)
        q = new_direction(self._Q[: self._r], image)
        if q is not None:
            self._Q[self._r] = q
            self._r += 1
        self._inner[1, : self._r, i] = project(self._Q[: self._r], image)

    def _fill_inner(self, old_k: int, old_r: int) -> None:
        """W, H and Z for the probes after `old_k` and the directions after `old_r`."""
        W, _, H, Z = self._inner
        k, r = self.num_probes, self._r
        for i in range(old_k, k):
            W[:r, i] = project(self._Q[:r], self._probes[i])
        for j in range(old_r, r):
            self.products += 1
            checked_finite(dot(self._images[j], self._images[j]), self._op, self.products)
            W[j, :old_k] = project(self._probes[:old_k], self._Q[j])
            H[:r, j] = project(self._Q[:r], self._images[j])
            H[j, :old_r] = H[:old_r, j]
            Z[:r, j] = project(self._images[:r], self._images[j])
            Z[j, :old_r] = Z[:old_r, j]
