"""Gradient signal-to-noise ratios: over examples, by entry or block, and over the entries of one gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .blocks import Partition, partition
from .selection import near_names
from .spatial_snr import gsnr_of, snr

if TYPE_CHECKING:
    from .per_example_statistics import PerExampleStatistics

Definition = Literal["ratio", "mean", "spatial", "second_moment"]
DEFINITIONS = ("ratio", "mean", "spatial", "second_moment")
# Blocks that only the module tree tells.
OF_MODULES = ("head", "neuron", "adam-mini")


def signal_to_noise(
    statistics: PerExampleStatistics, by: Any, definition: str, dims: Sequence[int] | None, eps: float
) -> Tensor | dict[str, float] | float:
    """See `PerExampleStatistics.snr`."""
    if definition not in DEFINITIONS:
        near = near_names(str(definition), DEFINITIONS)
        raise ValueError(f"`definition` is {definition!r}; choose among {DEFINITIONS} (near: {near})")
    if definition == "second_moment":
        return _of_second_moments(statistics, by, dims)
    if dims is not None:
        raise ValueError(f"`dims` is {dims} but `definition` is {definition!r}; only 'second_moment' takes it")
    signal = statistics.mean / float(statistics.weights.sum())
    if definition == "spatial":
        if by == "element":
            raise ValueError("`by` is 'element'; the spatial ratio compares entries: give 'parameter' or larger blocks")
        values = {"": signal} if by == "whole" else _blocks(statistics, by, signal)
        found = {name: float(gsnr_of(g, eps, "code")) for name, g in values.items()}
        return found[""] if by == "whole" else found
    noise = statistics.variance()
    signal.square_()
    if by == "element":
        return _by_element(signal, noise)
    if definition == "mean":
        elements = _by_element(signal, noise)
        elements[statistics.second_moment == 0] = math.nan
        if by == "whole":
            return float(elements.nanmean(dtype=torch.float64))
        return {name: float(e.nanmean(dtype=torch.float64)) for name, e in _blocks(statistics, by, elements).items()}
    if by == "whole":
        return _ratio(_total(signal), _total(noise))
    pairs = zip(_blocks(statistics, by, signal).items(), _blocks(statistics, by, noise).values(), strict=True)
    return {name: _ratio(_total(s), _total(v)) for (name, s), v in pairs}


def _of_second_moments(statistics: PerExampleStatistics, by: Any, dims: Sequence[int] | None) -> dict[str, float]:
    if by != "parameter":
        raise ValueError(f"`by` is {by!r}; the ratio of second moments runs over a tensor's axes: by='parameter'")
    found = {}
    for name, v in statistics.layout.unflatten(statistics.second_moment).items():
        axes = range(v.ndim) if dims is None else dims
        if v.ndim > 0 and all(-v.ndim <= d < v.ndim for d in axes):
            found[name] = snr(v, tuple(axes))
    if not found:
        raise ValueError(f"`dims` is {dims}, which no parameter has; name axes of the tensors, such as (1,)")
    return found


def _blocks(statistics: PerExampleStatistics, by: Any, flat: Tensor) -> dict[str, Tensor]:
    """The entries of every block."""
    layout = statistics.layout
    if isinstance(by, str) and by in OF_MODULES:
        raise ValueError(f"`by` is {by!r}, which needs the model: give by=partition(objective, {by!r})")
    try:
        blocks = by if isinstance(by, Partition) else partition(statistics, by)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`blocks`", "`by`", 1)) from None
    if (blocks.layout.names, blocks.layout.shapes) != (layout.names, layout.shapes):
        raise ValueError("`by` is a partition of other parameters; make it with partition(objective, ...)")
    tensors = layout.unflatten(flat)
    return {name: block.gather(tensors) for name, block in blocks.items()}


def _by_element(signal: Tensor, noise: Tensor) -> Tensor:
    return torch.where(signal > 0, signal / noise, 0.0)


def _total(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))


def _ratio(signal: float, noise: float) -> float:
    if noise > 0:
        return signal / noise
    return math.inf if signal > 0 else 0.0
