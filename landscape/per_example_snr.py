"""Gradient signal-to-noise ratios: over examples, by entry or block, and over the entries of one gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .blocks import Partition, partition
from .per_example_noise import moment_rounding
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
    if not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"`eps` is {eps!r}; it is added to a standard deviation: give a number of at least 0, as 1e-8")
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
    noise, floor = statistics.variance(), _rounding_of_variance(statistics)
    signal.square_()
    if by == "element":
        return _by_element(signal, noise, floor)
    if definition == "mean":
        elements = _by_element(signal, noise, floor)
        elements[statistics.second_moment == 0] = math.nan
        if by == "whole":
            return float(elements.nanmean(dtype=torch.float64))
        return {name: float(e.nanmean(dtype=torch.float64)) for name, e in _blocks(statistics, by, elements).items()}
    if by == "whole":
        return _ratio(_total(signal), _total(noise), _total(floor))
    top, bottom, least = (_blocks(statistics, by, flat) for flat in (signal, noise, floor))
    return {name: _ratio(_total(top[name]), _total(bottom[name]), _total(least[name])) for name in top}


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


def _rounding_of_variance(statistics: PerExampleStatistics) -> Tensor:
    """Variances [n] up to which they may be the rounding of second moments."""
    p = statistics.weights / statistics.weights.sum()
    relative = moment_rounding(torch.finfo(statistics.second_moment.dtype).eps, len(p))
    return statistics.second_moment * (relative / (float(statistics.weights.sum()) * (1 - float(p @ p))))


def _by_element(signal: Tensor, noise: Tensor, floor: Tensor) -> Tensor:
    ratio = torch.where(noise > floor, signal / noise, math.nan)
    return torch.where(signal > 0, ratio, 0.0)


def _total(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))


def _ratio(signal: float, noise: float, floor: float) -> float:
    if signal == 0:
        return 0.0
    return signal / noise if noise > floor else math.nan
