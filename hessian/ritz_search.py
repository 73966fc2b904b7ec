"""The search behind `top_eigenvalues`: converge the wanted Ritz pairs, then prove that none is missed.

Sizes: n parameters, j directions multiplied by A, m rows of the basis (see `KrylovBasis`), num wanted pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from .exclusion import coupling_strength, excludes, tridiagonal, upper_bound
from .lanczos import KrylovBasis

# Up to this many directions for each wanted pair, go through the whole space: it costs little more and misses nothing.
EXHAUSTIVE = 3
# Rows of the basis kept free for a proof, so also the most products of one.
PROOF_ROWS = 24
# Chance that a proof overlooks a hidden eigenvector, over 0.8.
DOUBT = 0.01
# A proof is about eigenvalues further out than the wanted ones by this share of |λ|max, or by `tol`.
MARGIN = 1e-4
# The same two for a single pair, which is proved from its own run at next to no cost.
SINGLE_DOUBT = 0.3
SINGLE_MARGIN = 0.05
# Share of the other Ritz vectors that survive a restart. All from 0.1 to 0.7 need the same number of products.
KEPT_SHARE = 0.35
# Rounding in the basis and in each rotation of it, in units of ‖A‖.
BASIS_EPS = 8
# Directions whose parts across each other are below this count as parallel.
PARALLEL = 1e-6
# Where `tol` is out of reach: the residual to stop at, as a share of the floor.
FLOOR_SHARE = 0.1


@dataclass(frozen=True)
class Ends:
    """Which eigenvalues are wanted: `num` of them, at the end or ends of the spectrum that `which` names."""

    which: str
    num: int

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
    """The wanted pairs as a basis gives them.

    Attributes:
        theta: Values [num], the most wanted first.
        S: Coordinates in the basis [j, num].
        residuals: ‖A v − θ v‖ [num], without the floor.
        gaps: Distance from each θ to the nearest interval θ' ± residual of another Ritz pair [num]; may be negative.
        scale: Largest |θ| of all Ritz values, the yardstick of `tol`.
        floor: What rounding and the error of the products may add to a residual.
    """

    theta: Tensor
    S: Tensor
    residuals: Tensor
    gaps: Tensor
    scale: float
    floor: float


class Outcome(Enum):
    PROVED = "nothing is hidden"
    MISSED = "something wanted turned up"
    OPEN = "the budget or the basis ended first"


@dataclass
class Probe:
    """A Lanczos run in the complement of the main directions: its rows, diagonal and remainders (0 at its end)."""

    rows: list[int] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)


class RitzSearch:
    """Grows a `KrylovBasis` until it contains the wanted pairs.

    Args:
        krylov: Basis that holds the start vector.
        ends: Which pairs are wanted.
        tol: A pair is good when residual + floor ≤ tol · scale.
        relative_error: Of one product of the operator.
        random_share: Length of the random part of the unit start vector.
        verify: Prove that nothing is hidden.
        draw: Gives a fresh random vector [n].
        exhausted: Asked before every product; True ends the search.
    """

    def __init__(
        self,
        krylov: KrylovBasis,
        ends: Ends,
        tol: float,
        *,
        relative_error: float,
        random_share: float,
        verify: bool,
        draw: Callable[[], Tensor],
        exhausted: Callable[[], bool],
    ) -> None:
        self.krylov, self._ends, self._tol, self._verify = krylov, ends, tol, verify
        self._relative_error, self._random_share = relative_error, random_share
        self._draw, self._exhausted = draw, exhausted
        self._n = krylov.rows.shape[1]
        self._exhaustive = self._n <= EXHAUSTIVE * ends.num and krylov.capacity == self._n

    def run(self) -> bool:
        """Search within the budget; True if nothing wanted can be hidden any more."""
        settled = self._solve()
        while settled and self._verify and self.krylov.size < self._n:
            if self._ends.num == 1:
                return self._proved_by_own_run(self.pairs())
            outcome = self._probe()
            if outcome is not Outcome.MISSED:
                return outcome is Outcome.PROVED
            settled = self._solve()
        return self.krylov.size == self._n

    def pairs(self) -> RitzPairs:
        """The wanted pairs from Rayleigh-Ritz over everything multiplied so far."""
        theta, S, residuals = self.krylov.ritz()
        wanted = self._ends.order(theta)[: self._ends.num]
        apart = (theta[wanted, None] - theta).abs() - residuals  # [num, j]
        apart[torch.arange(len(wanted)), wanted] = math.inf
        scale = float(theta.abs().max())
        rounding = BASIS_EPS * torch.finfo(self.krylov.rows.dtype).eps * (1 + self.krylov.restarts)
        floor = (self._relative_error + rounding) * scale
        return RitzPairs(theta[wanted], S[:, wanted], residuals[wanted], apart.amin(1), scale, floor)

    def _solve(self) -> bool:
        """Grow until every wanted residual is small enough; False if the budget ended first."""
        krylov = self.krylov
        while krylov.size < self._n:
            pairs = self.pairs() if krylov.size >= self._ends.num else None
            if pairs is not None and self._is_settled(pairs):
                return True
            if self._exhausted():
                return False
            if self._make_room(1):
                pairs = self.pairs()
            if krylov.is_full:
                return False
            # Where the space became invariant too soon, go on in a direction that it knows nothing of.
            if not krylov.num_pending and krylov.add(self._draw()) is None:
                return True
            krylov.expand(self._worst_residual(pairs))
        return True

    def _is_settled(self, pairs: RitzPairs) -> bool:
        if self._exhaustive or bool((pairs.residuals > self._goal(pairs)).any()):
            return False
        return not self._verify or self._ends.num > 1 or self._proved_by_own_run(pairs, unable=True)

    def _goal(self, pairs: RitzPairs) -> float:
        """Residual to stop at: tol · scale without the floor, or well under the floor where `tol` is out of reach."""
        return max(self._tol * pairs.scale - pairs.floor, FLOOR_SHARE * pairs.floor)

    def _worst_residual(self, pairs: RitzPairs | None) -> Tensor | None:
        """The residual of the least converged wanted pair, in the pending directions [p]."""
        if pairs is None or self.krylov.num_pending == 1:
            return None
        residuals = self.krylov.coefficients[self.krylov.size :] @ pairs.S  # [p, num]
        return residuals[:, pairs.residuals.argmax()]

    def _make_room(self, free: int) -> bool:
        """Thick restart if fewer than `free` rows are left; whether it was done."""
        krylov, num = self.krylov, self._ends.num
        j, p, capacity = krylov.size, krylov.num_pending, krylov.capacity
        if capacity == self._n or j + p + free <= capacity:
            return False
        keep = num + max(2, int(KEPT_SHARE * (j - num))) if free == 1 else max(num + 2, capacity - p - free)
        keep = min(keep, capacity - p - 2)
        if keep >= j:
            return False
        theta, S, _ = krylov.ritz()
        kept = self._ends.order(theta)[:keep]
        krylov.restart(theta[kept], S[:, kept])
        return True

    def _proved_by_own_run(self, pairs: RitzPairs, *, unable: bool = False) -> bool:
        """For a single pair: the run that found it excludes, by the random part of its start, all further out.

        After a restart, or a second start, it is no longer a Lanczos run and can say nothing: then `unable`.
        """
        krylov = self.krylov
        if krylov.restarts or krylov.starts > 1:
            return unable
        H, j = krylov.coefficients, krylov.size
        alpha, beta = H[:j].diagonal().tolist(), H.diagonal(-1).tolist()
        beta += [0.0] * (j - len(beta))
        needed = self._n / (SINGLE_DOUBT * self._random_share) ** 2
        margin = max(self._tol, SINGLE_MARGIN) * pairs.scale
        return all(
            excludes([sign * a for a in alpha], beta, edge + margin, needed)
            for sign, edge in self._ends.edges(pairs.theta)
        )

    def _probe(self) -> Outcome:
        """Lanczos in the complement of the main directions from a random start, until that holds nothing wanted.

        The pending directions couple the two: an eigenvector may lie half in each and show in neither. So both are
        grown until the coupling cannot lift any eigenvalue over the edge.
        """
        krylov = self.krylov
        self._make_room(PROOF_ROWS)
        direction = krylov.add(self._draw())
        probe = Probe()
        to_probe = True
        while direction is not None and not krylov.is_full and not self._exhausted():
            j = krylov.size
            krylov.expand(direction)
            if to_probe:
                remainder = float(torch.linalg.vector_norm(krylov.coefficients[j + 1 :, j]))
                probe.rows.append(j)
                probe.alpha.append(float(krylov.coefficients[j, j]))
                probe.beta.append(remainder if remainder > krylov.noise else 0.0)
            pairs = self.pairs()
            if bool((pairs.residuals > self._goal(pairs)).any()):
                return Outcome.MISSED
            step = self._judge(probe, max(self._tol, MARGIN) * pairs.scale + pairs.floor)
            if isinstance(step, Outcome):
                return step
            direction, to_probe = step
        return Outcome.OPEN

    def _judge(self, probe: Probe, margin: float) -> Outcome | tuple[Tensor | None, bool]:
        """What the probe shows so far; or the pending direction [p] to multiply next, and whether it is the probe's."""
        krylov, num = self.krylov, self._ends.num
        j, H = krylov.size, krylov.coefficients
        main = torch.tensor([i for i in range(j) if i not in probe.rows])
        outside = torch.tensor([*probe.rows, *range(j, len(H))])
        T = H[main][:, main]
        theta, S = torch.linalg.eigh((T + T.mT) / 2)
        order = self._ends.order(theta)
        wanted, others = theta[order[:num]], theta[order[num:]]
        coupling = H[:, main] @ S[:, order[num:]]  # [m, others]
        hidden = torch.linalg.eigvalsh(tridiagonal(probe.alpha, probe.beta))
        strongest, to_probe = None, False
        for sign, edge in self._ends.edges(wanted):
            limit = edge + margin
            top = float((sign * hidden).max())
            if top > limit:
                return Outcome.MISSED
            bound = upper_bound([sign * a for a in probe.alpha], probe.beta, limit, self._n / DOUBT**2)
            lift = coupling_strength(sign * others, coupling[outside], limit)
            if bound is None or lift > limit - bound:
                weighted = coupling[j:] / (limit - sign * others).sqrt()  # [p, others]
                strongest = weighted[:, weighted.norm(dim=0).argmax()] if len(others) else torch.zeros(len(H) - j)
                to_probe |= bound is None or lift <= (limit - top) / 2
        if strongest is None:
            return Outcome.PROVED
        following = H[j:, probe.rows[-1]]
        if probe.beta[-1] > 0:
            # A main direction must leave the probe's next one alone, or that would no longer be a Lanczos run.
            rest = strongest - following * (following.dot(strongest) / following.dot(following))
            if to_probe or float(rest.norm()) <= PARALLEL * float(strongest.norm()):
                return following, True
            strongest = rest
        return (strongest if bool(strongest.any()) else None), False
