"""What the Lie groups of PSGD share: a factor Q of P = Qᵀ Q that is fitted by multiplicative steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...hessian.preconditioned import Root
from .streams import generator

State = Mapping[str, Tensor]
NORMALIZERS = ("2nd", "1st")

# How often factors that share a scale are brought to the same size.
BALANCE_PROBABILITY = 0.01


@dataclass(frozen=True)
class Coins:
    """The random choices of one fit, the same for all its factors.

    Attributes:
        update: Uniform in [0, 1): the fit takes place when it is below the probability.
        balance: Whether factors that share a scale are brought to the same size.
        first: Whether the first of two factors moves, else the second.
    """

    update: float
    balance: bool
    first: bool

    @classmethod
    def tossed(cls, seed: int, number: int) -> Coins:
        """Those of fit `number` of the optimizer with this seed."""
        draws = torch.rand(3, dtype=torch.float64, generator=generator(seed, -1, number, "cpu")).tolist()
        return cls(draws[0], draws[1] < BALANCE_PROBABILITY, draws[2] < 0.5)


class Factor(Root):
    """Q [n, n] in a connected Lie group, with P = Qᵀ Q ≈ the inverse of the curvature.

    It minimises c(P) = E[hᵀ P h + vᵀ P⁻¹ v] over pairs v ~ N(0, I), h = H v, whose minimum is P = (H²)^(-1/2) = |H|⁻¹;
    with gradients h = g, independent of v, it is E[g gᵀ]^(-1/2). With A = Q h and B = Q⁻ᵀ v the two terms are |A|² and
    |B|², and a step is Q ← Q − μ 𝓔 Q, 𝓔 the projection of A Aᵀ − B Bᵀ on the group's Lie algebra. μ divides the rate
    by the size of A Aᵀ + B Bᵀ ("2nd") or of 𝓔 ("1st"): with rates below 1/2, I − μ 𝓔 and so Q stay invertible.

    Source: Li, Preconditioned Stochastic Gradient Descent, 2018, equations 11 and 12; Pooladzandi and Li,
    Curvature-Informed SGD via General Purpose Lie-Group Preconditioners, 2024, sections 2 and 3.
    """

    @classmethod
    @abstractmethod
    def initial(cls, p: Tensor, scale: Tensor, options: Mapping[str, Any], draw: torch.Generator) -> dict[str, Tensor]:
        """What the state of a parameter begins with: Q ≈ scale · I on its coordinates."""

    @classmethod
    @abstractmethod
    def gathered(cls, states: Sequence[State]) -> Factor:
        """The factor of one vector, the coordinates of these parameters in order."""

    @abstractmethod
    def slices(self, params: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Its parts by parameter, as `gathered` takes them."""

    @abstractmethod
    def inverse_transposed(self, v: Tensor) -> Tensor:
        """Q⁻ᵀ v for v [n]."""

    @abstractmethod
    def moved(self, v: Tensor, h: Tensor, A: Tensor, B: Tensor, rate: float, normalizer: str, coins: Coins) -> Factor:
        """The factor after one step of the fit to the pair v, h [n] with its images A and B."""

    def images(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) = (Q h, Q⁻ᵀ v); the criterion is |A|² + |B|²."""
        return self.apply(h.unsqueeze(1)).squeeze(1), self.inverse_transposed(v)

    def fitted(self, v: Tensor, h: Tensor, rate: float, normalizer: str, coins: Coins) -> Factor:
        """The factor after one step of the fit to the pair v, h [n]."""
        return self.moved(v, h, *self.images(v, h), rate, normalizer, coins)

    @property
    @abstractmethod
    def log_det(self) -> Tensor:
        """log |det Q|; log det P is twice this."""

    def precondition(self, g: Tensor) -> Tensor:
        """P g = Qᵀ Q g for g [n]."""
        columns = g.unsqueeze(1)
        return self.transposed(self.apply(columns)).squeeze(1)


def sizes_of(params: Sequence[Tensor]) -> list[int]:
    return [p.numel() for p in params]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One vector [n] of tensors in order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def initial_scale(h: Tensor, v: Tensor | None) -> Tensor:
    """mean(v²)^{1/4} mean(h⁴)^{-1/8}, for a h [n] that is not all zero; without v for gradients.

    The fourth moment lets the largest entries decide, which begin with a small P.
    """
    largest = h.abs().max()  # a fourth power of it might overflow
    scale = largest.rsqrt() * (h / largest).square().square().mean() ** (-1 / 8)
    return scale if v is None else scale * v.square().mean() ** (1 / 4)


def dtype_of(params: Sequence[Tensor]) -> torch.dtype:
    """Of the fit: at least float32."""
    dtype = torch.float32
    for other in {p.dtype for p in params}:
        dtype = torch.promote_types(dtype, other)
    return dtype


def normal(n: int, block: Sequence[Tensor], draw: torch.Generator) -> Tensor:
    return torch.randn(n, dtype=dtype_of(block), device=block[0].device, generator=draw)


def split(v: Tensor, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """A vector [n] as tensors of the parameters' shapes."""
    pieces = v.split(sizes_of(params))
    return {p: piece.view(p.shape) for p, piece in zip(params, pieces, strict=True)}
