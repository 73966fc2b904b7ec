"""The search behind `top_eigenvalues`: converge the wanted Ritz pairs, then prove that none is missed.

Sizes: n parameters, j directions multiplied by A, m rows of the basis (see `KrylovBasis`), num wanted pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .exclusion import RandomRun, lift
from .lanczos import KrylovBasis

# A space of so few dimensions, in all or for each wanted pair, is gone through entirely: that misses nothing.
EXHAUSTIVE = 8
EXHAUSTIVE_PER_PAIR = 3
# Rows of the basis kept free for a proof, so also the most products of one.
PROOF_ROWS = 24
# A proof overlooks a hidden eigenvector with a probability of at most 0.8 times this.
DOUBT = 0.01
# A proof is about eigenvalues further out than the wanted ones by this share of |λ|max, or by `tol`.
MARGIN = 1e-4
# The same two for a proof from the search's own run: for a single pair, for a strict proof of one, and for several,
# which take enough products to prove more.
RUN_DOUBT = 0.1
SINGLE_MARGIN = 0.5
STRICT_SINGLE_MARGIN = 0.05
RUN_MARGIN = 0.05
# It may make the search longer by this share, or by this many products.
RUN_PROOF_SHARE = 0.5
RUN_PROOF_PRODUCTS = 4
# The error of a value is taken to be this times residual² / gap: the Ritz values may show a gap too wide while an
# eigenvalue close by is not yet resolved. And never less than this share of the residual, which bounds what it can be
# wrong by where two eigenvalues still pass as one.
GAP_DOUBT = 3.0
LEAST_SHARE = 0.1
# Share of the other Ritz vectors that survive a restart. All from 0.1 to 0.7 need the same number of products.
KEPT_SHARE = 0.35
# Rounding in the basis and in each rotation of it, in units of ‖A‖.
BASIS_EPS = 2
# Where `tol` is out of reach: the residual to stop at, as a share of the floor.
FLOOR_SHARE = 0.1


Accuracy = Literal["values", "vectors"]
# Where the proof comes from: nowhere, the search's own run, or that and a random run in the complement of the basis.
Proof = Literal["none", "run", "complement"]


@dataclass(frozen=True)
class Ends:
    """Which eigenvalues are wanted: `num` of them, at the end or ends of the spectrum that `which` names."""

    which: str
    num: int

    def want_all(self, n: int) -> bool:
        """So many of the n eigenvalues are wanted that all directions may as well be multiplied."""
        return n <= max(EXHAUSTIVE, EXHAUSTIVE_PER_PAIR * self.num)

    def order(self, theta: Tensor) -> Tensor:
        """Indices of ascending values θ [j], the most wanted first."""
        up = torch.arange(len(theta))
        if self.which == "LM":
            return theta.abs().argsort(descending=True, stable=True)
        if self.which == "BE":
            return torch.stack([up.flip(0), up], dim=1).flatten()[: len(theta)]
        return up if self.which == "SA" else up.flip(0)

    def edges(self, wanted: Tensor) -> list[tuple[int, float]]:
        """Pairs (sign, edge): beside the `wanted` [num], in `order`, a λ would be wanted too if sign · λ > edge."""
        if self.which == "LM":
            edge = float(wanted.abs().min())
            return [(1, edge), (-1, edge)]
        if self.which == "BE" and self.num > 1:
            return [(1, float(wanted[::2].min())), (-1, -float(wanted[1::2].max()))]
        return [(-1, -float(wanted.max()))] if self.which == "SA" else [(1, float(wanted.min()))]


@dataclass(frozen=True)
class RitzPairs:
    """All j Ritz pairs of a basis, the `num` wanted ones first.

    Attributes:
        theta: Values [j].
        S: Coordinates in the basis [j, j].
        coupling: A v in the pending directions [p, j], which is the residual but for the floor.
        num: Number of wanted ones.
        scale: Largest |θ|, the yardstick of `tol`.
        floor: What rounding and the error of the products may add to a residual.
    """

    theta: Tensor
    S: Tensor
    coupling: Tensor
    num: int
    scale: float
    floor: float

    @cached_property
    def residuals(self) -> Tensor:
        """‖A v − θ v‖ [j] without the floor."""
        return torch.linalg.vector_norm(self.coupling, dim=0)

    @cached_property
    def value_errors(self) -> Tensor:
        """Cautious errors of the wanted values [num], without the floor.

        Three times residual² / gap where the other Ritz intervals leave a gap, between a tenth of the residual and the
        residual.

        Source: Parlett, The Symmetric Eigenvalue Problem, theorem 11.7.1 (Kato and Temple).
        """
        wanted = torch.arange(min(self.num, len(self.theta)))
        gaps = (self.theta[wanted, None] - self.theta).abs() - self.residuals  # [num, j]
        gaps[wanted, wanted] = math.inf
        gap, residual = gaps.amin(dim=1), self.residuals[wanted]
        # A lone Ritz value shows no gap at all.
        quadratic = torch.where((gap > residual) & gap.isfinite(), GAP_DOUBT * residual.square() / gap, residual)
        return torch.clamp(quadratic, LEAST_SHARE * residual, residual)

    def errors(self, accuracy: Accuracy) -> Tensor:
        """What has to get small [num], without the floor."""
        return self.residuals[: self.num] if accuracy == "vectors" else self.value_errors

    def goal(self, tol: float) -> float:
        """Error to stop at: tol · scale without the floor, or well under the floor where `tol` is out of reach."""
        return max(tol * self.scale - self.floor, FLOOR_SHARE * self.floor)

    def have_converged(self, tol: float, accuracy: Accuracy) -> bool:
        return len(self.theta) >= self.num and bool((self.errors(accuracy) <= self.goal(tol)).all())


class Outcome(Enum):
    PROVED = "nothing is hidden"
    AGAIN = "something turned up that belongs in the basis: try again in what is left"
    OPEN = "the budget or the basis ended first"


class RitzSearch:
    """Grows a `KrylovBasis` until it contains the wanted pairs.

    Args:
        krylov: Basis that holds the start vector.
        ends: Which pairs are wanted.
        tol: A pair is good when its error + floor ≤ tol · scale.
        accuracy: Whose error: that of the "values", or of the "vectors", which is the residual.
        relative_error: Gives that of one product of the operator; it may grow with the products seen.
        random_share: Length of the random part of the unit start vector.
        proof: That nothing is hidden.
        draw: Gives a fresh random vector [n].
        exhausted: Asked before every product; True ends the search.
    """

    def __init__(
        self,
        krylov: KrylovBasis,
        ends: Ends,
        tol: float,
        *,
        accuracy: Accuracy,
        relative_error: Callable[[], float],
        random_share: float,
        proof: Proof,
        draw: Callable[[], Tensor],
        exhausted: Callable[[], bool],
    ) -> None:
        self.krylov, self._ends, self._tol = krylov, ends, tol
        self._accuracy: Accuracy = accuracy
        self._proof: Proof = proof
        self._relative_error, self._random_share = relative_error, random_share
        self._draw, self._exhausted = draw, exhausted
        self._n = krylov.rows.shape[1]
        self._asymmetry = 0.0
        self._products_of_proofs = 0
        self._exhaustive = ends.want_all(self._n) and krylov.capacity == self._n
        self._pairs: tuple[tuple[int, ...], RitzPairs] | None = None
        self._first_run: RandomRun | None = None
        self._converged_at: int | None = None

    def run(self) -> float | None:
        """Search within the budget.

        Returns:
            The margin within which, as a share of |λ|max, anything wanted can still be hidden, none if the whole space
            is known; None if there is no proof.
        """
        settled = self._solve()
        while settled and self.krylov.size < self._n:
            if self._proof == "none":
                return None
            if self._proof == "run" or self._ends.num == 1:
                return self._margin_of_own_run(self.pairs())
            outcome = self._probe()
            if outcome is not Outcome.AGAIN:
                return max(self._tol, MARGIN) if outcome is Outcome.PROVED else None
            settled = self._solve()
        return 0.0 if self.krylov.size == self._n else None

    def pairs(self) -> RitzPairs:
        """Rayleigh-Ritz over everything multiplied so far."""
        krylov = self.krylov
        state = (krylov.size, krylov.num_pending, krylov.starts, krylov.restarts)
        if self._pairs is None or self._pairs[0] != state:
            self._pairs = (state, self._rayleigh_ritz())
        return self._pairs[1]

    def _rayleigh_ritz(self) -> RitzPairs:
        theta, S, asymmetry = self.krylov.ritz()
        order = self._ends.order(theta)
        wanted = order[: self._ends.num]
        shown, rows_rounding = float(asymmetry[wanted].max()), float(self.krylov.rounding(S[:, wanted]).max())
        scale = float(theta.abs().max())
        rounding = BASIS_EPS * self.krylov.eps * (1 + self.krylov.restarts)
        return RitzPairs(
            theta=theta[order],
            S=S[:, order],
            coupling=self.krylov.coefficients[self.krylov.size :] @ S[:, order],
            num=self._ends.num,
            scale=scale,
            # The skew half shows; the symmetric half of the products' error, as large in the mean, does not.
            floor=(self._relative_error() + rounding) * scale + rows_rounding + 2 * max(shown, self._asymmetry),
        )

    def _solve(self) -> bool:
        """Grow until every wanted error is small enough; False if the budget or the basis ended first."""
        krylov, direction = self.krylov, None
        while krylov.size < self._n:
            if krylov.size:
                pairs = self.pairs()
                if self._is_settled(pairs):
                    return True
                direction = pairs.coupling[:, pairs.residuals[: pairs.num].argmax()]
            if self._exhausted():
                return False
            self._make_room(1)
            # Where the space became invariant too soon, go on in a direction that it knows nothing of.
            if not krylov.num_pending:
                self._first_run = self._own_run()
                direction = krylov.add(self._draw())
            if krylov.is_full or not krylov.num_pending:
                return False
            krylov.expand(direction)
        return True

    def _is_settled(self, pairs: RitzPairs) -> bool:
        if self._exhaustive or not pairs.have_converged(self._tol, self._accuracy):
            return False
        if self._proof == "none" or (self._proof == "complement" and pairs.num > 1):
            return True
        return self._run_can_show_no_more() or self._proved_by_own_run(pairs, self._asked_margin())

    def _make_room(self, free: int) -> None:
        """Thick restart if fewer than `free` rows are left."""
        krylov, num = self.krylov, self._ends.num
        j, p, capacity = krylov.size, krylov.num_pending, krylov.capacity
        if capacity == self._n or j + p + free <= capacity:
            return
        keep = num + max(2, int(KEPT_SHARE * (j - num))) if free == 1 else max(num + 2, capacity - p - free)
        keep = min(keep, capacity - p - 2)
        if num <= keep < j:
            pairs = self.pairs()
            self._first_run = self._own_run()
            self._asymmetry = max(self._asymmetry, float(krylov.ritz()[2].max()))
            krylov.restart(pairs.theta[:keep], pairs.S[:, :keep])

    def _own_run(self) -> RandomRun:
        """The Lanczos run from the start vector, up to the first restart or second start."""
        if self._first_run is not None:
            return self._first_run
        H, j = self.krylov.coefficients, self.krylov.size
        remainders = H.diagonal(-1).tolist()
        remainders += [0.0] * (j - len(remainders))
        return RandomRun(self._n / (RUN_DOUBT * self._random_share) ** 2, H.diagonal().tolist(), remainders)

    def _run_can_show_no_more(self) -> bool:
        """It has ended, or its proof takes too long: in a crowded spectrum it can take any number of products."""
        if self._first_run is not None:
            return True
        size = self.krylov.size
        self._converged_at = size if self._converged_at is None else self._converged_at
        if self._proof == "complement":
            return False
        return size - self._converged_at >= max(RUN_PROOF_PRODUCTS, RUN_PROOF_SHARE * self._converged_at)

    def _asked_margin(self) -> float:
        strict = self._proof == "complement"
        single = STRICT_SINGLE_MARGIN if strict else SINGLE_MARGIN
        return max(self._tol, single if self._ends.num == 1 else RUN_MARGIN)

    def _proved_by_own_run(self, pairs: RitzPairs, margin: float) -> bool:
        """The run that found the pairs excludes, by the random part of its start, all that is not close to them."""
        wanted = pairs.theta[: pairs.num]
        return self._own_run().excludes_all_but(wanted.tolist(), self._ends.edges(wanted), margin * pairs.scale)

    def _margin_of_own_run(self, pairs: RitzPairs) -> float | None:
        """The least margin that it proves, to a factor of 1.2; None if not the one asked for."""
        asked = self._asked_margin()
        if not self._proved_by_own_run(pairs, asked):
            return None
        margin = asked
        while margin / 1.2 >= self._tol > 0 and self._proved_by_own_run(pairs, margin / 1.2):
            margin /= 1.2
        return margin

    def _probe(self) -> Outcome:
        """Lanczos in the complement of the basis from a random start, until that is shown to hold nothing wanted.

        The run bounds the spectrum of the complement. The pending directions couple it to the basis, and an
        eigenvector may lie half in each and show in neither: so the basis is grown too, until the coupling cannot lift
        any eigenvalue over the edge.
        """
        krylov = self.krylov
        self._make_room(PROOF_ROWS)
        run = RandomRun(self._n / DOUBT**2)
        direction, in_run, last = krylov.add(self._draw()), True, 0
        while direction is not None and not (krylov.is_full or self._exhausted() or self._proof_is_too_long()):
            krylov.expand(direction)
            self._products_of_proofs += 1
            if in_run:
                last = krylov.size - 1
                remainder = float(torch.linalg.vector_norm(krylov.coefficients[last + 1 :, last]))
                run.alpha.append(float(krylov.coefficients[last, last]))
                run.beta.append(remainder if remainder > krylov.noise else 0.0)
            pairs = self.pairs()
            if not pairs.have_converged(self._tol, self._accuracy):
                return Outcome.AGAIN
            step = self._judge(run, pairs, following=krylov.coefficients[krylov.size :, last])
            if isinstance(step, Outcome):
                return step
            direction, in_run = step
        return Outcome.OPEN

    def _proof_is_too_long(self) -> bool:
        """It may double the products: where the spectrum is crowded at the edge, a proof can take any number."""
        return self._products_of_proofs >= max(PROOF_ROWS, self.krylov.products - self._products_of_proofs)

    def _judge(self, run: RandomRun, pairs: RitzPairs, *, following: Tensor) -> Outcome | tuple[Tensor, bool]:
        """What the run shows so far; or the pending direction [p] to multiply next, and whether it continues the run.

        The run continues in the direction `following` [p].
        """
        others, coupling = pairs.theta[pairs.num :], pairs.coupling[:, pairs.num :]
        obstacle, run_on = None, False
        for sign, edge in self._ends.edges(pairs.theta[: pairs.num]):
            side = run if sign > 0 else run.mirrored()
            top, *lower = side.ritz_values()
            limit = edge + max(self._tol, MARGIN) * pairs.scale + pairs.floor
            if top > limit:
                return Outcome.AGAIN
            bound, lifted = side.upper_bound(limit), lift(sign * others, coupling, limit)
            if bound is not None and lifted <= limit - bound:
                continue
            if bound is None or lifted <= limit - top:
                # A longer run lowers the bound, at best to its top Ritz value.
                run_on = True
            elif lower and lifted <= limit - lower[0]:
                # Its top Ritz value is in the way, a copy of the edge perhaps; the next run will not have it.
                return Outcome.AGAIN
            weighted = coupling / (limit - sign * others).sqrt()
            obstacle = weighted[:, weighted.norm(dim=0).argmax()] if len(others) else following
        if obstacle is None:
            return Outcome.PROVED
        if run.has_ended:
            return (obstacle, False) if bool(obstacle.any()) else Outcome.OPEN
        # A direction across the next one of the run leaves it a Lanczos run, in a smaller complement.
        across = obstacle - following * (following.dot(obstacle) / following.dot(following))
        if run_on or across.norm() < 0.5 * obstacle.norm():
            return following, True
        return across, False
