"""Krylov bases of symmetric operators, fully reorthogonalised: for eigenpairs; `kernels` has the runs in lockstep.

Every new direction passes classical Gram-Schmidt against the whole basis at least twice, with coefficients summed in
float64, so the basis stays orthonormal to rounding and no ghost copies of eigenvalues appear however long it runs.

Sizes: n parameters, j directions multiplied by A so far, p pending ones, m = j + p rows of the basis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.accurate import combine, norm, orthogonalise, project, rotate_
from ..kernels.lanczos_state import BREAKDOWN_EPS
from ..kernels.rounded_rows import rotate_stored_, store, unit_of
from .operator import LinearOperator


class KrylovBasis:
    """An orthonormal basis that grows by products, with the projection of A onto it.

    Its rows Q [m, n] are the j directions already multiplied, then the p pending ones, and A Q_jᵀ = Qᵀ H holds to
    rounding for the coefficients H [m, j]. Plain Lanczos has one pending direction, the last remainder; further
    starts, random restarts and thick restarts are the same thing with more of them.

    Rows may be held in fewer bits than the operator works in. What is stored is what is multiplied and orthogonalised
    against, so A Q_jᵀ = Qᵀ H + E, where column i of E is only what rounding took from the remainder of product i, and
    its length is known. A restart adds A δ − δ Θ for the rounding δ of its rows.

    Args:
        op: Symmetric operator A, shape [n, n].
        capacity: Most rows to hold; at most n are needed.
        dtype: Of the rows; by default that of the operator.

    Attributes:
        size: j. num_pending: p. products, restarts, starts: How many there were.
        scale: The largest ‖A q‖ seen, a lower bound of ‖A‖. eps: Of the operator's dtype.
        is_rounded: Rows have another dtype than the operator.
        orthogonality: Largest entry of |Q Qᵀ − I| seen, where rows are rounded.
    """

    def __init__(self, op: LinearOperator, capacity: int, dtype: torch.dtype | None = None) -> None:
        self._op = op
        self._n = op.shape[0]
        self.eps = torch.finfo(op.dtype).eps
        self.capacity = min(capacity, self._n)
        self.is_rounded = dtype not in (None, op.dtype)
        self._unit = unit_of(self._n) if self.is_rounded else 1.0
        self._Q = torch.empty(self.capacity, self._n, dtype=dtype or op.dtype, device=op.device)
        self._lost = torch.zeros(self.capacity, dtype=torch.float64)  # ‖column of E‖
        self._H = torch.zeros(self.capacity, self.capacity, dtype=torch.float64)
        self.size = self.num_pending = self.products = self.restarts = self.starts = 0
        self.scale = self.orthogonality = 0.0

    @property
    def rows(self) -> Tensor:
        """Q [m, n], a view; times a power of two where rows are rounded."""
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
        return BREAKDOWN_EPS * self.eps * self.scale

    def add(self, v: Tensor) -> Tensor | None:
        """Take v [n] into the span of the rows.

        Returns:
            The coordinates [p] among the pending directions of what is new in v beside the multiplied ones; None
            where nothing is, or where there is no room.
        """
        length = float(norm(v))
        if length == 0.0 or self.is_full:
            return None
        h, rest, left = orthogonalise(self.rows, v / length, unit=self._unit)
        h = h.cpu()
        direction = h[self.size :]
        if len(self.rows) < self._n and left > BREAKDOWN_EPS * self.eps:
            self._append(rest, left)
            direction = torch.cat([direction, torch.tensor([left], dtype=torch.float64)])
        if not bool((direction.abs() > BREAKDOWN_EPS * self.eps).any()):
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
        h, rest, left = orthogonalise(self.rows, self._product(self._row(j)), unit=self._unit)
        h = h.cpu()
        if not bool(torch.isfinite(h).all()):
            raise ValueError(
                f"product {self.products} of {self._op!r} has NaN or infinite entries; "
                "check that the loss and the gradient are finite at these weights, or work in float64"
            )
        self._H[:m, j] = h
        self.scale = max(self.scale, float(torch.linalg.vector_norm(h)), left)
        self.size, self.num_pending = j + 1, self.num_pending - 1
        self._lost[j] = 0.0
        if m < self._n and left > self.noise:
            self._lost[j] = left * self._append(rest, left)
            self._H[m, j] = left
        elif self.is_rounded:
            self._lost[j] = left
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
        return combine(self._Q[: self.size], S / self._unit, dtype=self._op.dtype)

    def rounding(self, S: Tensor) -> Tensor:
        """Bound [m] on what the rounding of stored rows adds to ‖A v − θ v‖, for the directions S [j, m]; else 0.

        ‖E s‖, and what rows that are not quite orthonormal add to the length ‖C s‖ of the coupling.
        """
        coupling = torch.linalg.vector_norm(self.coefficients[self.size :] @ S, dim=0)
        return S.abs().mT @ self._lost[: self.size] + coupling * (len(self.rows) * self.orthogonality)

    def watch_last_row(self) -> float:
        """`orthogonality`, with the last row, rounded or not."""
        self._watch([len(self.rows) - 1])
        return self.orthogonality

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Thick restart: keep only the Ritz pairs θ [k], S [j, k] as multiplied directions, and all pending ones.

        Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000.
        """
        j, k, p = self.size, len(theta), self.num_pending
        coupling = self._H[j : j + p, :j] @ S  # [p, k]
        moved = self._rotate(0, j, S)
        self._lost[:k] = S.abs().mT @ self._lost[:j] + (self.scale + theta.abs()) * moved
        self._Q[k : k + p] = self._Q[j : j + p].clone()
        self._H.zero_()
        self._H[:k, :k] = torch.diag(theta)
        self._H[k : k + p, :k] = coupling
        self.size, self.restarts = k, self.restarts + 1
        if self.is_rounded:
            self._watch(range(k))

    def _put_first(self, direction: Tensor) -> None:
        """Reflect the pending directions so that `direction` [p] becomes the first."""
        j, m = self.size, len(self.rows)
        g = direction / torch.linalg.vector_norm(direction)
        # Either sign of g will do. A negative first entry keeps the reflection w = e₁ − g free of cancellation.
        w = torch.where(g[0] > 0, g, -g)
        w[0] += 1.0
        Z = torch.eye(m - j, dtype=torch.float64) - torch.outer(w, w) * (2.0 / w.dot(w))
        moved = self._rotate(j, m, Z)
        self._H[j:m, :j] = Z @ self._H[j:m, :j]
        self._lost[:j] += self._H[j:m, :j].abs().mT @ moved
        if self.is_rounded:
            self._watch(range(j, m))

    def _row(self, i: int) -> Tensor:
        return self._Q[i].to(self._op.dtype) / self._unit if self.is_rounded else self._Q[i]

    def _append(self, rest: Tensor, left: float) -> float:
        """Returns how far rounding moved the new row."""
        m, moved = len(self.rows), 0.0
        if self.is_rounded:
            moved = store(self._Q[m], rest, self._unit / left) / self._unit
        else:
            torch.div(rest, left, out=self._Q[m])
        self.num_pending += 1
        if self.is_rounded:
            self._watch([m])
        return moved

    def _rotate(self, first: int, last: int, S: Tensor) -> Tensor:
        """Sᵀ times the rows from `first` to `last`, in place of as many of them; how far rounding moved each [k]."""
        if self.is_rounded:
            return rotate_stored_(self._Q[first:last], S) / self._unit
        rotate_(self._Q[first:last], S)
        return torch.zeros(S.shape[1], dtype=torch.float64)

    def _watch(self, rows: Iterable[int]) -> None:
        for i in rows:
            inner = project(self.rows, self._Q[i]).cpu() / self._unit**2
            inner[i] -= 1.0
            self.orthogonality = max(self.orthogonality, float(inner.abs().max()))

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
