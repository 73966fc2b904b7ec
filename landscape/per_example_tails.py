"""The tail index of gradient noise, parameter by parameter."""

from __future__ import annotations

import statistics as of_numbers
from dataclasses import dataclass
from typing import Any

import torch

from .layout import Layout
from .per_example_rows import SAMPLED_COLUMNS, GradientRows
from .tail_index import LEAST_SAMPLES, TailIndex, tail_index


@dataclass(frozen=True)
class GradientTails:
    """Tail indices of the scatter of single examples' gradients.

    Attributes:
        parameters: Of each parameter's sampled entries together, by name.
        whole: Of the sampled entries of all parameters together, with its interval.
        skipped: Parameters without one, and why: those that no example moves, for instance.
    """

    parameters: dict[str, TailIndex]
    whole: TailIndex
    skipped: dict[str, str]

    @property
    def median(self) -> float:
        """Median of the parameters' estimates."""
        return of_numbers.median(found.estimate for found in self.parameters.values())

    def __float__(self) -> float:
        return self.median

    def __str__(self) -> str:
        return f"{self.median:.4g}, together {self.whole}"


def gradient_tails(rows: GradientRows, layout: Layout, columns: int, options: dict[str, Any]) -> GradientTails:
    """See `PerExampleStatistics.tail_index`."""
    integer = isinstance(columns, int) and not isinstance(columns, bool)
    if not integer or columns < 1 or (columns > SAMPLED_COLUMNS and not rows.exact):
        raise ValueError(f"`columns` is {columns!r}; give from 1 to {SAMPLED_COLUMNS} (more where rows are kept whole)")
    if rows.num_examples < LEAST_SAMPLES:
        raise ValueError(f"a tail index needs at least {LEAST_SAMPLES} examples; there are {rows.num_examples}")
    parameters, skipped, usable = {}, {}, []
    for k, name in enumerate(layout.names):
        entries = rows.columns(k, columns)
        try:
            parameters[name] = tail_index(entries, **options)
        except ValueError as error:
            if "no column" not in str(error):
                raise
            skipped[name] = str(error)
        else:
            usable.append(entries.cpu())
    if not usable:
        raise ValueError("no parameter has entries whose gradients vary over the examples as a tail index needs")
    return GradientTails(parameters, tail_index(torch.cat(usable, 1), **options), skipped)
