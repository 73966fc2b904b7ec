"""Rounding weights to a grid of few bits per group: the differentiable map, and its derivative in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import moment_dtype

SMALLEST_SCALE = {"float16": 1e-5, "float32": 1e-8}


class Scales(NamedTuple):
    """Of each group: its step s (negative where a symmetric group is turned round) and its zero point z [rows, G]."""

    step: Tensor
    zero: Tensor


class Derivative(NamedTuple):
    """Of a loss by the offsets V [rows, columns] and by the two scale factors [rows, G]."""

    offset: Tensor
    min_scale: Tensor
    max_scale: Tensor


@dataclass(frozen=True)
class WeightGrid:
    r"""The weights that b bits per element can express, one scale and zero point per group of a row.

    A weight of shape [rows, ...] is seen as [rows, columns]; each row is cut into groups of `group_size` columns, the
    last one padded. With an offset V per element and two factors α, β in [0, 1] per group, lo = α min(0, min W) and
    hi = β max(0, max W):

        asymmetric:  s = (hi − lo) / (2^b − 1),  z = round(−lo / s)
        symmetric:   s = ± max(−lo, hi) / 2^(b−1), z = 2^(b−1); the sign puts the larger side on the code 0, which
                     reaches one step further than the other end: s < 0 where hi >= −lo
        W~ = s (q − z),  q = clip(round(W / s + V) + z, 0, 2^b − 1)

    |s| is at least 1e-5 (1e-8 for float32 scales). s is rounded to `scale_dtype` first and that value is used
    throughout, so that the stored numbers decode to W~ exactly. round goes half to even; z is kept within the codes.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: Columns of a group; -1 is the whole row.
        symmetric: Which of the two.
        scale_dtype: "float16", as such weights are deployed, or "float32".

    Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023,
    section 3; the signed full-range symmetric form and float16 scales are those of its official code (2026).
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    scale_dtype: str = "float16"

    @property
    def largest_code(self) -> int:
        return 2**self.bits - 1

    def scales(self, W: Tensor, min_scale: Tensor, max_scale: Tensor) -> Scales:
        """Steps and zero points for weights [rows, columns] and factors [rows, G]; differentiable by the factors."""
        return self._scales(*self._ends(W, min_scale, max_scale))

    def codes(self, W: Tensor, offset: Tensor, scales: Scales) -> Tensor:
        """q as uint8 [rows, columns]."""
        q = self._codes(self.grouped(W), self.grouped(offset), scales)[0]
        return self.flat(q, W.shape[1]).to(torch.uint8)

    def fake_quantize(self, W: Tensor, offset: Tensor, min_scale: Tensor, max_scale: Tensor) -> Tensor:
        """W~ [rows, columns], differentiable by offset and factors with both roundings straight-through."""
        scales = self.scales(W, min_scale, max_scale)
        q = self._codes(self.grouped(W), self.grouped(offset), scales)[0]
        return self.flat(scales.step.unsqueeze(-1) * (q - scales.zero.unsqueeze(-1)), W.shape[1])

    @torch.no_grad()
    def derivative(self, G: Tensor, W: Tensor, offset: Tensor, min_scale: Tensor, max_scale: Tensor) -> Derivative:
        r"""What autograd finds through `fake_quantize`, for G = dL/dW~ [rows, columns], in closed form.

        With I = 1 where the code was not clipped: dW~/dV = s I; dW~/ds = q − z − I W/s, less (1 − I) lo/s in the
        asymmetric form, whose z moves with lo: dW~/dlo = 1 − I at fixed s. Then ds/dhi = −ds/dlo = 1/(2^b − 1), or
        ds by the larger side alone = ±1/2^(b−1) in the symmetric form; none where s is at its floor.
        """
        lo, hi = self._ends(W, min_scale, max_scale)
        scales = self._scales(lo, hi)
        groups = self.grouped(W)
        q, unclipped = self._codes(groups, self.grouped(offset), scales)
        s, z = scales.step.unsqueeze(-1), scales.zero.unsqueeze(-1)
        G3, inside = self.grouped(G.to(W.dtype)), unclipped.to(W.dtype)
        by_step = q - z - inside * groups / s
        least, most = self._range(W)
        if self.symmetric:
            turned = hi >= -lo
            free = torch.maximum(-lo, hi) / 2 ** (self.bits - 1) >= self._floor
            d_step = (G3 * by_step).sum(-1) * free / 2 ** (self.bits - 1)
            d_lo = torch.where(turned, 0.0, -d_step)  # s = −lo / 2^(b−1)
            d_hi = torch.where(turned, -d_step, 0.0)  # s = −hi / 2^(b−1)
        else:
            by_step = by_step - (1 - inside) * lo.unsqueeze(-1) / s
            free = (hi - lo) / self.largest_code >= self._floor
            d_step = (G3 * by_step).sum(-1) * free / self.largest_code
            d_lo = (G3 * (1 - inside)).sum(-1) - d_step
            d_hi = d_step
        return Derivative(self.flat(G3 * inside * s, W.shape[1]), d_lo * least, d_hi * most)

    def grouped(self, X: Tensor) -> Tensor:
        """[rows, columns] -> [rows, G, size], zeros at the end of the last group."""
        rows, columns = X.shape
        size = columns if self.group_size == -1 else self.group_size
        missing = -columns % size
        return (F.pad(X, (0, missing)) if missing else X).reshape(rows, -1, size)

    def flat(self, groups: Tensor, columns: int) -> Tensor:
        """The reverse of `grouped`."""
        return groups.reshape(len(groups), -1)[:, :columns]

    @property
    def _floor(self) -> float:
        return SMALLEST_SCALE[self.scale_dtype]

    def _range(self, W: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.grouped(W)
        return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)

    def _ends(self, W: Tensor, min_scale: Tensor, max_scale: Tensor) -> tuple[Tensor, Tensor]:
        least, most = self._range(W)
        return least * min_scale, most * max_scale

    def _scales(self, lo: Tensor, hi: Tensor) -> Scales:
        dtype = getattr(torch, self.scale_dtype)
        if self.symmetric:
            turned = hi >= -lo
            step = (torch.where(turned, hi, -lo) / 2 ** (self.bits - 1)).clamp(min=self._floor)
            step = _straight_through(step, step.to(dtype).to(step.dtype))
            return Scales(torch.where(turned, -step, step), torch.full_like(step, 2 ** (self.bits - 1)))
        step = ((hi - lo) / self.largest_code).clamp(min=self._floor)
        step = _straight_through(step, step.to(dtype).to(step.dtype))
        zero = -lo / step
        return Scales(step, _straight_through(zero, zero.round().clamp(0, self.largest_code)))

    def _codes(self, groups: Tensor, offset: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """q and where it was not clipped."""
        wanted = groups / scales.step.unsqueeze(-1) + offset
        shifted = _straight_through(wanted, wanted.round()) + scales.zero.unsqueeze(-1)
        unclipped = (shifted >= 0) & (shifted <= self.largest_code)
        return shifted.clamp(0, self.largest_code), unclipped


def as_matrix(p: Tensor) -> Tensor:
    """A weight [rows, ...] as [rows, columns], in float32 at least."""
    return p.detach().flatten(1).to(moment_dtype(p))


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient handed to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    return _StraightThrough.apply(x, value) if x.requires_grad else value.detach()  # type: ignore[return-value]
