"""The g-SNR of SGD-SaI: how large a gradient is over how much its entries vary, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ...landscape.blocks import Partition
from ...landscape.spatial_snr import Form, gsnr_of
from .option_checks import check_choice, check_number


class BlockSNR(NamedTuple):
    """The spatial signal-to-noise ratio of one block of a gradient.

    Attributes:
        name: Of the block.
        size: d, its number of entries.
        value: G = ‖g‖ / std(g), with eps as the form says.
        relative: G / √d = √(1 + mean² / variance) up to eps; what G says beyond the size of the block.
        squared_mean_over_variance: mean(g)² / var(g), population variance; infinite for a constant block.
    """

    name: str
    size: int
    value: float
    relative: float
    squared_mean_over_variance: float


def gsnr(
    gradients: Mapping[str, Tensor], partition: Partition | None = None, *, eps: float = 1e-8, form: Form = "code"
) -> list[BlockSNR]:
    """G of every block: of every tensor, or per head, output or any other block.

    Spatial: mean and variance run over the entries of one gradient. (The signal-to-noise ratio across batches, mean
    over variance of the same entry, is another quantity.)

    Args:
        gradients: By parameter name.
        partition: Blocks of these tensors; None takes each tensor as one.
        eps: See `form`.
        form: "paper": ‖g‖ / √(var + eps) with the population variance; "code": ‖g‖ / (std + eps) with the sample
            standard deviation, 0 for a single entry.

    Source: Xu et al., No More Adam: Learning Rate Scaling at Initialization is All You Need, 2024; the
    authors' package sgd-sai 1.0.3 for "code".
    """
    check_number("eps", eps, least=0)
    check_choice("form", form, ("paper", "code"))
    if partition is None:
        blocks = {name: g.detach().reshape(-1) for name, g in gradients.items()}
    else:
        blocks = {name: block.gather(gradients).detach() for name, block in partition.items()}
    return [_block_snr(name, g, eps, form) for name, g in blocks.items()]


def _block_snr(name: str, g: Tensor, eps: float, form: Form) -> BlockSNR:
    value = float(gsnr_of(g, eps, form))
    g = g.double()
    variance, mean = float(g.var(correction=0)), float(g.mean())
    ratio = mean**2 / variance if variance else (math.inf if mean else math.nan)
    return BlockSNR(name, g.numel(), value, value / math.sqrt(g.numel()), ratio)


def spread_over_size(g: Tensor) -> float:
    """std(g) / √(mean(g²)), between 0 for a constant gradient and 1 for one of mean zero; NaN for a zero gradient."""
    g = g.detach().double()
    size = float(g.square().mean())
    return math.sqrt(float(g.var(correction=0)) / size) if size else math.nan
