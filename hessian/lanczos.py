"""Krylov bases of symmetric operators, fully reorthogonalised: for eigenpairs; `kernels` has the runs in lockstep.

Every new direction passes classical Gram-Schmidt against the whole basis at least twice, with coefficients summed in
float64, so the basis stays orthonormal to rounding and no ghost copies of eigenvalues appear however long it runs.

Sizes: n parameters, j directions multiplied by A so far, p pending ones, m = j + p rows of the basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.accurate import combine, norm, project, rotate_
from ..kernels.lanczos_state import BREAKDOWN_EPS
from .operator import LinearOperator


class KrylovBasis:
    """An orthonormal basis that grows by products, with the projection of A onto it.

    Its rows Q [m, n] are the j directions already multiplied, then the p pending ones, and A Q_jᵀ = Qᵀ H holds to
    rounding for the coefficients H [m, j]. Plain Lanczos has one pending direction, the last remainder; further
    starts, random restarts and thick restarts are the same thing with more of them.

    Args:
        op: Symmetric operator A, shape [n, n].
        capacity: Most rows to hold; at most n are needed.

    Attributes:
        size: j. num_pending: p. products, restarts, starts: How many there were.
        scale: The largest ‖A q‖ seen, a lower bound of ‖A‖.
    """

    def __init__(self, op: LinearOperator, capacity: int) -> None:
        self._op = op
        self._n = op.shape[0]
        self._eps = torch.finfo(op.dtype).eps
        self.capacity = min(capacity, self._n)
        self._Q = torch.empty(self.capacity, self._n, dtype=op.dtype, device=op.device)
        self._H = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self.size = self.num_pending = self.products = self.restarts = self.starts = 0
        self.scale = 0.0

    @property
    def rows(self) -> Tensor:
        """Q [m, n], a view."""
        return self._Q[: self.size + self.num_pending]

    @property
    def coefficients(self) -> Tensor:
        """H [m, j], float64, on the CPU, a view."""
        return self._H[: self.size + self.num_pending, : self.size]

    @property
    def is_full(self) -> bool:
        """There is no room for another remainder, and one is to be expected."""
        return len(self.rows) == self.capacity < self._n

    @property
    def noise(self) -> float:
        """Remainders below this are rounding: the space is invariant."""
        return BREAKDOWN_EPS * self._eps * self.scale

    def add(self, v: Tensor) -> Tensor | None:
        """Take v [n] into the span of the rows.

        Returns:
            The coordinates [p] among the pending directions of what is new in v beside the multiplied ones; None
            where nothing is, or where there is no room.
        """
        length = float(norm(v))
        if length == 0.0 or self.is_full:
            return None
        h, rest, left = _orthogonalise(self.rows, v / length)
        direction = h[self.size :]
        if len(self.rows) < self._n and left > BREAKDOWN_EPS * self._eps:
            self._append(rest, left)
            direction = torch.cat([direction, torch.tensor([left], dtype=torch.float64)])
        if not bool((direction.abs() > BREAKDOWN_EPS * self._eps).any()):
            return None
        self.starts += 1
        return direction

    def expand(self, direction: Tensor | None = None) -> float:
        """Multiply a pending direction and make what is new in the product pending; the norm of that.

        If it is only noise it is dropped, and there is one pending direction less.

        Args:
            direction: Coordinates [p] among the pending directions; by default the first.
        """
        if direction is not None and self.num_pending > 1:
            self._put_first(direction)
        j, m = self.size, len(self.rows)
        h, rest, left = _orthogonalise(self.rows, self._product(self._Q[j]))
        if not bool(torch.isfinite(h).all()):
            raise ValueError(
                f"product {self.products} of {self._op!r} has NaN or infinite entries; "
                "check that the loss and the gradient are finite at these weights, or work in float64"
            )
        self._H[:m, j] = h
        self.scale = max(self.scale, float(torch.linalg.vector_norm(h)), left)
        self.size, self.num_pending = j + 1, self.num_pending - 1
        if m < self._n and left > self.noise:
            self._append(rest, left)
            self._H[m, j] = left
        return left

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rayleigh-Ritz on the multiplied directions: values θ [j] ascending, coordinates S [j, j], asymmetry [j].

        With V = Qᵀ S, A V − V Θ has the coordinates H S in the pending directions, and beside them only the error of
        the products, of which `asymmetry` is the part [j] that shows in the coefficients.
        """
        H, j = self.coefficients, self.size
        T = (H[:j] + H[:j].mT) / 2
        theta, S = torch.linalg.eigh(T)
        return theta, S, torch.linalg.vector_norm((H[:j] - T) @ S, dim=0)

    def vectors(self, S: Tensor) -> Tensor:
        """The directions [m, n] with coordinates S [j, m]."""
        return combine(self._Q[: self.size], S)

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Thick restart: keep only the Ritz pairs θ [k], S [j, k] as multiplied directions, and all pending ones.

        Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000.
        """
        j, k, p = self.size, len(theta), self.num_pending
        coupling = self._H[j : j + p, :j] @ S  # [p, k]
        rotate_(self._Q[:j], S)
        self._Q[k : k + p] = self._Q[j : j + p].clone()
        self._H.zero_()
        self._H[:k, :k] = torch.diag(theta)
        self._H[k : k + p, :k] = coupling
        self.size, self.restarts = k, self.restarts + 1

    def _put_first(self, direction: Tensor) -> None:
        """Reflect the pending directions so that `direction` [p] becomes the first."""
        j, m = self.size, len(self.rows)
        g = direction / torch.linalg.vector_norm(direction)
        # Either sign of g will do. A negative first entry keeps the reflection w = e₁ − g free of cancellation.
        w = torch.where(g[0] > 0, g, -g)
        w[0] += 1.0
        Z = torch.eye(m - j, dtype=torch.float64) - torch.outer(w, w) * (2.0 / w.dot(w))
        rotate_(self._Q[j:m], Z)
        self._H[j:m, :j] = Z @ self._H[j:m, :j]

    def _append(self, rest: Tensor, left: float) -> None:
        self._Q[len(self.rows)] = rest / left
        self.num_pending += 1

    def _product(self, q: Tensor) -> Tensor:
        w = self._op.matvec(q)
        self.products += 1
        if w.shape != q.shape or w.dtype != q.dtype:
            raise ValueError(
                f"product of {self._op!r} is {w.dtype} {list(w.shape)}; matmat must return {q.dtype} {list(q.shape)}"
            )
        return w.detach()


def checked_vector(op: LinearOperator, v: Tensor, name: str) -> Tensor:
    """`v` if it is a finite vector [n] of the operator's dtype and device; an error that calls it `name` if not."""
    if not isinstance(v, Tensor):
        raise TypeError(f"`{name}` is a {type(v).__name__}; pass a torch tensor of shape [{op.shape[0]}]")
    if v.shape != (op.shape[0],):
        raise ValueError(f"`{name}` has shape {list(v.shape)}; it must be [{op.shape[0]}]")
    # "cuda" means the current GPU, whose tensors say "cuda:0".
    if v.dtype != op.dtype or v.device != torch.empty(0, device=op.device).device:
        raise ValueError(
            f"`{name}` is {v.dtype} on {v.device}; {op!r} works in {op.dtype} on {op.device}: use {name}.to(...)"
        )
    if not bool(torch.isfinite(v).all()):
        raise ValueError(f"`{name}` has NaN or infinite entries; all must be finite")
    return v.detach()


@contextmanager
def plain_tensors() -> Iterator[None]:
    """No autograd graph and no inference tensors, whatever mode the caller is in. Operators enable what they need."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _orthogonalise(Q: Tensor, w: Tensor) -> tuple[Tensor, Tensor, float]:
    """w [n] = Qᵀ h + rest with Q rest = 0: coefficients h [m] (float64, CPU), the rest [n], its norm.

    Two passes, and a third where the second took away more than it left. w itself is not written to: it may belong to
    the operator.
    """
    h = project(Q, w, rough=True)
    rest = w - combine(Q, h)
    left = 0.0
    for _ in range(2):
        correction = project(Q, rest)
        h += correction
        rest -= combine(Q, correction)
        left = float(norm(rest))
        if float(torch.linalg.vector_norm(correction)) <= left:
            break
    return h.cpu(), rest, left
