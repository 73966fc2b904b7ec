"""Following extreme eigenvalues of an operator that changes a little from point to point."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.accurate import dot, norm
from .eigs import EigenPairs, top_eigenvalues
from .estimate import NotConvergedWarning
from .lanczos import KrylovBasis, plain_tensors
from .operator import LinearOperator
from .ritz_search import BASIS_EPS, GAP_DOUBT, Ends, RitzPairs

Which = Literal["LA", "SA", "LM", "BE"]

# Length of the fresh noise in a start vector beside a unit vector: it costs 1e-4 of the value, before any product.
NOISE = 0.01
# Length of the best of the unwanted vectors of the point before. It carries from point to point what the products have
# amplified of the noise: an eigenvector that neither the tracked ones nor the gradient know of grows there by itself.
HIDDEN = 0.02
# No error bar is below this share of the residual: a gap between Ritz values says nothing of eigenvalues not yet seen.
LEAST_SHARE = 1 / 3
# The error bar at a weak end of the spectrum, in residuals: the eigenvalue next to θ is seldom the outermost there.
WEAK_SHARE = 6.0
# The gradient's share of a start, beside unit vectors, is this times tan² of the angle by which they turned, at most 1.
GRADIENT = 4.0
# tan of that angle before it is known.
UNKNOWN_TURN = 0.25
# An end of the spectrum is weak below this share of |λ|max, of which a point takes over this share until it sees more.
WEAK = 0.5
SCALE_KEPT = 0.5
# Rows of the basis; a point that needs more is left to `top_eigenvalues`.
MIN_ROWS = 40


class EigenTracker:
    r"""Extreme eigenvalues at one point after another, each from the eigenvectors of the one before.

    One Krylov space for each point, from the sum of the unit eigenvectors found last, the operator's `start_vector()`
    (the gradient, for a Hessian) with a weight that follows how far the eigenvectors turned between the last two
    points, the best unwanted vector of the last space, and a little noise. Products are made until the values are
    known to `tol`.

    A value is the Ritz value θ. Its error bar is 3 residual² / gap as far as the Ritz values show a gap, but at least a
    third of the residual and at most all of it. At an end of the spectrum that is weak beside the other, where
    eigenvalues crowd, it is six residuals. That is an estimate, which held at 96 to 100 % of the points of the
    trainings tried; certain is that an eigenvalue lies within the residual, which is at most three error bars.

    An eigenvalue that overtakes the tracked ones where neither they nor the gradient have a part in its eigenvector is
    found when the noise has grown, and at the latest at the next proof: at the first point and at every
    `proof_every`-th after it the pairs are those of `top_eigenvalues` with its verification.

    Nothing is extrapolated: every value is measured at its point, from products made there.

    Args:
        num, which: As for `top_eigenvalues`.
        tol: Error bar over |λ|max to stop at.
        max_products: Budget of a point; by default 300 + 30 num.
        proof_every: Points from one proof to the next; None for a proof at the first point only.
        seed: Of the random parts, others at each point.
        state: What an earlier tracker remembered: its attribute `state`, tensors and numbers only. It is changed in
            place, and a tracker that goes on from a copy of it gives the very same numbers.

    Source: for residual² / gap: Parlett, The Symmetric Eigenvalue Problem, theorem 11.7.1.
    """

    def __init__(
        self,
        num: int = 1,
        *,
        which: Which = "LA",
        tol: float = 1e-3,
        max_products: int | None = None,
        proof_every: int | None = 25,
        seed: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        if proof_every is not None and proof_every < 1:
            raise ValueError(f"`proof_every` is {proof_every}; give a number of points >= 1, or None")
        self.which: Which = which
        self.num, self.tol, self.max_products = num, tol, max_products
        self.proof_every, self.seed = proof_every, seed
        self.state: dict[str, Any] = {} if state is None else state

    def measure(self, op: LinearOperator) -> EigenPairs:
        """The pairs of `op`, which take over as what the next point starts from.

        `value_bounds` are the error bars.
        """
        vectors, points = self._known_vectors(op), int(self.state.get("points", 0))
        if vectors is None:
            self.state.clear()
            points = 0
        seed = self.seed + points
        proof = points == 0 or (self.proof_every is not None and points % self.proof_every == 0)
        if vectors is None or proof or Ends(self.which, self.num).want_all(op.shape[0]):
            pairs = self._search(op, vectors, seed, budget=self.max_products)
        else:
            with plain_tensors(), op.fixed():
                pairs = self._track(op, vectors, seed)
        self.state["points"] = points + 1
        return pairs

    def _known_vectors(self, op: LinearOperator) -> Tensor | None:
        """Eigenvectors of the point before [n, num], in the dtype of `op`."""
        vectors = self.state.get("vectors")
        if vectors is None or vectors.shape != (op.shape[0], self.num):
            return None
        return vectors.to(op.device, op.dtype)

    def _search(self, op: LinearOperator, start: Tensor | None, seed: int, *, budget: int | None) -> EigenPairs:
        """The pairs with a proof."""
        pairs = top_eigenvalues(
            op,
            self.num,
            which=self.which,
            tol=self.tol,
            accuracy="vectors",
            verify=True if self.num == 1 else "run",
            max_products=budget,
            start=start,
            seed=seed,
        )
        if start is not None:
            self.state["turn"] = _turn(start, pairs.vectors)
        scale = max(SCALE_KEPT * self.state.get("scale", 0.0), float(pairs.values.abs().max()))
        self.state["vectors"], self.state["scale"] = pairs.vectors, scale
        self.state.pop("hidden", None)
        bars = _bars(pairs.value_bounds, pairs.residuals, pairs.values, scale)
        return replace(pairs, value_bounds=bars)

    def _track(self, op: LinearOperator, vectors: Tensor, seed: int) -> EigenPairs:
        began = time.perf_counter()
        budget = 300 + 30 * self.num if self.max_products is None else self.max_products
        krylov = KrylovBasis(op, max(MIN_ROWS, 2 * self.num + 20))
        krylov.add(self._start(op, vectors, seed))
        found, settled = None, False
        while krylov.num_pending and not krylov.is_full and krylov.products < budget and not settled:
            krylov.expand()
            found = self._ritz(krylov, op)
            settled = self._is_settled(found)
        if found is None or (not settled and krylov.num_pending and krylov.products + self.num < budget):
            # Something longer, with restarts.
            pairs = self._search(op, vectors, seed, budget=budget - krylov.products)
            return replace(pairs, products=pairs.products + krylov.products, seconds=time.perf_counter() - began)
        tracked = krylov.vectors(found.S[:, : self.num + 1])  # [num or one more, n]
        for v in tracked:
            v /= norm(v)
        known = tracked[: self.num].mT
        self.state.update(vectors=known.clone(), scale=found.scale, turn=_turn(vectors, known))
        self.state.pop("hidden", None)
        if len(tracked) > self.num:
            self.state["hidden"] = tracked[self.num].clone()
        order = found.theta[: self.num].argsort() if self.which == "BE" else torch.arange(self.num)
        bars = self._error_bars(found) + found.floor
        pairs = EigenPairs(
            values=found.theta[order],
            vectors=tracked[order].mT,
            residuals=found.residuals[order] + found.floor,
            value_bounds=bars[order],
            converged=bool((bars <= self.tol * found.scale).all()),
            verified=False,
            products=krylov.products,
            seconds=time.perf_counter() - began,
            tol=self.tol,
        )
        if not pairs.converged:
            warnings.warn(
                f"values of {int((bars > self.tol * found.scale).sum())} of {self.num} tracked eigenpairs are not "
                f"within tol · |λ|max = {self.tol * found.scale:.3g} after {pairs.products} products: raise "
                "`max_products`, or loosen `tol`",
                NotConvergedWarning,
                stacklevel=2,
            )
        return pairs

    def _start(self, op: LinearOperator, vectors: Tensor, seed: int) -> Tensor:
        """One vector [n] rich in all wanted directions, old and new."""
        start = torch.zeros_like(vectors[:, 0])
        for v in vectors.mT:
            start += v
        start /= norm(start)
        turn = self.state.get("turn", UNKNOWN_TURN)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(start), generator=generator, dtype=torch.promote_types(op.dtype, torch.float32))
        others = [
            (min(1.0, GRADIENT * turn**2), op.start_vector()),
            (HIDDEN, self.state.get("hidden")),
            (NOISE, noise),
        ]
        total = start.clone()
        for weight, given in others:
            vector = None if given is None else given.to(op.device, op.dtype)
            if vector is not None and (length := float(norm(vector))) > 0 and math.isfinite(length):
                # Along the start, not against it: the sum must not cancel.
                total += vector * ((weight if float(dot(vector, start)) >= 0 else -weight) / length)
        return total

    def _ritz(self, krylov: KrylovBasis, op: LinearOperator) -> RitzPairs:
        theta, S, asymmetry = krylov.ritz()
        order = Ends(self.which, self.num).order(theta)
        S = S[:, order]
        scale = max(float(theta.abs().max()), SCALE_KEPT * self.state.get("scale", 0.0))
        floor = (op.relative_error + BASIS_EPS * krylov.eps) * scale + 2 * float(asymmetry[order[: self.num]].max())
        return RitzPairs(theta[order], S, krylov.coefficients[krylov.size :] @ S, self.num, scale, floor)

    def _error_bars(self, found: RitzPairs) -> Tensor:
        """[num], without the floor."""
        wanted = torch.arange(min(self.num, len(found.theta)))
        gaps = (found.theta[wanted, None] - found.theta).abs()
        gaps[wanted, wanted] = math.inf
        gap, residuals = gaps.amin(dim=1), found.residuals[wanted]
        # A lone Ritz value shows no gap at all.
        quadratic = torch.where(gap.isfinite() & (gap > 0), GAP_DOUBT * residuals.square() / gap, residuals)
        return _bars(quadratic, residuals, found.theta[wanted], found.scale)

    def _is_settled(self, found: RitzPairs) -> bool:
        # Never without an unwanted vector: nothing hidden would grow otherwise.
        return len(found.theta) > self.num and bool((self._error_bars(found) <= found.goal(self.tol)).all())


def _bars(quadratic: Tensor, residuals: Tensor, values: Tensor, scale: float) -> Tensor:
    """The error bars [num]: `quadratic` in the residuals, within the limits that they set."""
    weak = values.abs() < WEAK * scale
    return torch.where(weak, WEAK_SHARE * residuals, torch.clamp(quadratic, LEAST_SHARE * residuals, residuals))


def _turn(before: Tensor, after: Tensor) -> float:
    """Largest tan of the angle between an old vector and the space of the new ones, both [n, num] with unit columns."""
    found = torch.stack([torch.stack([dot(a, b) for b in after.mT]) for a in before.mT])
    cosine = float(torch.linalg.vector_norm(found, dim=1).min())
    return math.sqrt(max(0.0, 1 - cosine**2)) / max(cosine, 1e-3)
