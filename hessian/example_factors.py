"""Gauss-Newton factors of single examples, and their inner products within a memory budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..landscape.memory import InsufficientMemory
from ..landscape.objective import Objective
from .example_chunks import ExampleChunk, example_chunks
from .loss_roots import LossRoot, loss_root

log = logging.getLogger("sharpscope")


@dataclass(frozen=True)
class ExampleGram:
    """What the coherence needs of the examples' curvature.

    Attributes:
        gram: Inner products [n r, n r] of the columns of all factors L_i [parameters, r], in float64; or
        factors: the factors themselves [n, parameters, r], where they are fewer numbers.
        gradient_norms: ‖∇ℓ_i‖ [n], in float64.
        rounding: Share of their largest at which eigenvalues of the mean Hessian cannot be told from rounding.
        method: "vmap" or "loop".
        sketched: Whether columns of some example are random combinations.
    """

    gram: Tensor | None
    factors: Tensor | None
    gradient_norms: Tensor
    rounding: float
    method: str
    sketched: bool = False


def gauss_newton_gram(
    objective: Objective, *, num_columns: int | None, seed: int, memory_budget: int, method: str
) -> ExampleGram:
    r"""Inner products of the factors L_i = √(n w_i) J_iᵀ R_i Ω_i, with R_i R_iᵀ = ∇²_z ℓ_i and w_i = 1/n for a mean.

    Args:
        num_columns: None for Ω_i = I; else so many columns of random signs over √num_columns for each example, so that
            E[L_i L_iᵀ] is its Gauss-Newton matrix. Examples with no more outputs than that keep Ω_i = I.
        memory_budget: Bytes. Factors that do not fit are made block by block, once for each pair of blocks.
        method: "vmap", "loop", or "auto" for the first that works.
    """
    with example_chunks(objective) as (theta, chunks):
        for name in ("vmap", "loop") if method == "auto" else (method,):
            work = _Work(objective, theta, chunks, num_columns, seed, memory_budget, vectorised=name == "vmap")
            try:
                return work.gram(name)
            except (ValueError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # what a user's model raises under a transform may be anything
                if name == "loop" or method != "auto":
                    raise
                log.info("coherence: vmap failed (%s: %s)", type(error).__name__, error)
    raise AssertionError("unreachable: the last method returns or raises")


def rounding_of_factors(eps: float, num_columns: int) -> float:
    """Of eigenvalues of Σ F_i F_iᵀ for factors with relative errors of some eps, multiplied in float64.

    The errors E move singular values by at most ‖E‖_F, about eps ‖F‖_F, and eigenvalues as their squares.
    """
    return num_columns * max(torch.finfo(torch.float64).eps, (4 * eps) ** 2)


class _Work:
    def __init__(
        self,
        objective: Objective,
        theta: Sequence[Tensor],
        chunks: Sequence[ExampleChunk],
        num_columns: int | None,
        seed: int,
        memory_budget: int,
        *,
        vectorised: bool,
    ) -> None:
        self.objective, self.theta = objective, tuple(theta)
        self.seed, self.memory_budget, self.vectorised = seed, memory_budget, vectorised
        self.places = [(chunk, i) for chunk in chunks for i in range(len(chunk))]
        self.roots, self.slopes = self._read(num_columns)
        self.columns = max(_width(root, num_columns) for root in self.roots)
        self.num_columns = num_columns
        self.sketched = num_columns is not None and any(root.width > num_columns for root in self.roots)
        self.num_parameters = sum(t.numel() for t in self.theta)
        self.gradient_norms = torch.zeros(len(self.places), dtype=torch.float64)

    def gram(self, name: str) -> ExampleGram:
        n, r, p = len(self.places), self.columns, self.num_parameters
        block = self._block()
        rounding = rounding_of_factors(torch.finfo(self.objective.dtype).eps, n * r)
        if p <= n * r and block >= n:
            factors = self._factors(0, n)
            return ExampleGram(None, factors.mT, self.gradient_norms, rounding, name, self.sketched)
        # The matrix, its coordinates and what their computation takes.
        if 4 * 8 * (n * r) ** 2 > self.memory_budget:
            raise InsufficientMemory(
                f"the inner products of {n} examples with {r} columns each need {4 * 8 * (n * r) ** 2 / 2**30:.3g} GiB "
                f"and `memory_budget` is {self.memory_budget / 2**30:.3g} GiB; take fewer examples, or "
                "outputs='sketch' with fewer columns"
            )
        gram = torch.zeros(n * r, n * r, dtype=torch.float64, device=self.objective.device)
        for first in range(0, n, block):
            left = self._factors(first, min(first + block, n)).reshape(-1, p)
            for second in range(first, n, block):
                right = left if second == first else self._factors(second, min(second + block, n)).reshape(-1, p)
                rows, columns = slice(first * r, first * r + len(left)), slice(second * r, second * r + len(right))
                products = left.double() @ right.T.double()
                gram[rows, columns], gram[columns, rows] = products, products.T
                del right
        return ExampleGram(gram, None, self.gradient_norms, rounding, name, self.sketched)

    def _block(self) -> int:
        """Examples whose factors are held at one time: all, or as many as fit twice; with room for a part anew."""
        n, example = len(self.places), (self.columns + 1) * self.num_parameters * self.objective.dtype.itemsize
        if 2 * n * example <= self.memory_budget:
            return n
        block = self.memory_budget // (4 * example)
        if block < 1:
            raise InsufficientMemory(
                f"the factors of four examples need {4 * example / 2**30:.3g} GiB and `memory_budget` is "
                f"{self.memory_budget / 2**30:.3g} GiB; raise it, select parameters, or use outputs='sketch' with "
                "fewer columns"
            )
        return block

    def _read(self, num_columns: int | None) -> tuple[list[LossRoot], list[Tensor]]:
        """R_i and ∇_z ℓ_i of every example, by a forward pass each."""
        roots, slopes = [], []
        criterion = self.objective.criterion
        assert criterion is not None
        for chunk, i in self.places:
            with torch.no_grad():
                z, targets = self.objective.prediction(chunk.single(i))
            roots.append(loss_root(criterion, z, targets))
            leaf = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(criterion(leaf, targets), leaf)
            slopes.append(slope.detach().reshape(-1))
        return roots, slopes

    def _seeds(self, first: int, last: int, scales: Sequence[float]) -> Tensor:
        """√(n w_i) R_i Ω_i and, as the last column, n w_i ∇_z ℓ_i [b, columns + 1, m]."""
        found = []
        for i, scale in zip(range(first, last), scales, strict=True):
            root, slope = self.roots[i], self.slopes[i]
            seeds = slope.new_zeros(self.columns + 1, len(slope))
            width = _width(root, self.num_columns)
            seeds[:width] = scale**0.5 * root.times(self._signs(i, root.width, slope)).T
            seeds[-1] = scale * slope
            found.append(seeds)
        return torch.stack(found)

    def _signs(self, i: int, width: int, like: Tensor) -> Tensor:
        """Ω_i, the same at every call."""
        if self.num_columns is None or width <= self.num_columns:
            return torch.eye(width, dtype=like.dtype, device=like.device)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        signs = torch.randint(0, 2, (width, self.num_columns), generator=random).mul_(2).sub_(1)
        return signs.to(like) / self.num_columns**0.5

    def _factors(self, first: int, last: int) -> Tensor:
        """L_iᵀ of the examples [last − first, columns, parameters]; notes the norms of their gradients."""
        like = {"dtype": self.objective.dtype, "device": self.objective.device}
        out = torch.empty(last - first, self.columns, self.num_parameters, **like)
        group = max(1, (last - first) // 4)
        at = first
        while at < last:
            chunk, i = self.places[at]
            size = min(group, last - at, len(chunk) - i) if self.vectorised else 1
            weights = chunk.weights[i : i + size] * len(self.places)
            seeds = self._seeds(at, at + size, weights.tolist())
            pulled = self._several(chunk, i, seeds) if self.vectorised else self._one(chunk, i, seeds[0])
            squares = torch.zeros(size, dtype=torch.float64, device=out.device)
            column = 0
            for piece in pulled:
                flat = piece.reshape(size, self.columns + 1, -1)
                out[at - first : at - first + size, :, column : column + flat.shape[2]] = flat[:, :-1]
                squares += flat[:, -1].double().square().sum(1).to(out.device)
                column += flat.shape[2]
            self.gradient_norms[at : at + size] = squares.sqrt().cpu()
            at += size
        return out

    def _several(self, chunk: ExampleChunk, first: int, seeds: Tensor) -> Sequence[Tensor]:
        rows = chunk.several(first, first + len(seeds))

        def pulled(own: tuple[Tensor, ...], seeds: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            def outputs(*own: Tensor) -> Tensor:
                with self.objective.replaced(own):
                    return self.objective.prediction(chunk.of(rows))[0].reshape(-1)

            return vmap(vjp(outputs, *own)[1])(seeds)

        own = tuple(t.detach() for t in self.theta)
        return vmap(pulled, in_dims=(None, 0, *(0 for _ in rows)))(own, seeds, *rows)

    def _one(self, chunk: ExampleChunk, i: int, seeds: Tensor) -> Sequence[Tensor]:
        z = self.objective.prediction(chunk.single(i))[0].reshape(-1)
        if not z.requires_grad:
            return [t.new_zeros(len(seeds), t.numel()) for t in self.theta]
        rows = []
        for seed in seeds:
            found = torch.autograd.grad(z, self.theta, seed, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(t) if g is None else g for t, g in zip(self.theta, found, strict=True)])
        return [torch.stack(pieces) for pieces in zip(*rows, strict=True)]


def _width(root: LossRoot, num_columns: int | None) -> int:
    return root.width if num_columns is None else min(root.width, num_columns)
