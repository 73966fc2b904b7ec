"""How little second moments vary along the dimensions of each tensor, and which of these can be averaged over."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from ..landscape.slim_divisions import Rule, Slice, slices
from ..landscape.spatial_snr import Average, snr
from ..landscape.structure import TensorRole, structure

if TYPE_CHECKING:
    from .trajectory import Trajectory

# Above it the variance along K is smaller than the squared mean.
CUTOFF = 1.0
NEVER_COMPRESSED = ("norm", "bias")


@dataclass(frozen=True)
class SliceSNR:
    """Of one slice along one set of dimensions: what was averaged in words, its role, its size and the block count."""

    key: str
    rule: str
    dims: tuple[int, ...]
    role: str
    size: int
    num_blocks: int
    mean: float
    median: float


def snr_of_slices(moments: Mapping[str, Tensor], roles: Mapping[str, TensorRole]) -> list[SliceSNR]:
    """SNR of every matrix, or larger tensor, along every set of its dimensions; fused ones slice by slice."""
    found = []
    for name, v in moments.items():
        if v.ndim < 2:
            continue
        for part in slices(roles.get(name, TensorRole(name, tuple(v.shape), "other"))):
            piece = _cut(v, part)
            for word, dims in part.subsets:
                num_blocks = math.prod(n for d, n in enumerate(piece.shape) if d not in dims)
                mean, median = (snr(piece, dims, average=average) for average in ("mean", "median"))
                found.append(SliceSNR(part.key, word, dims, part.role, piece.numel(), num_blocks, mean, median))
    return found


def _cut(v: Tensor, part: Slice) -> Tensor:
    if part.segment is None:
        return v
    assert part.tensor.axis is not None
    return v.narrow(part.tensor.axis, part.segment.start, part.segment.stop - part.segment.start)


@dataclass
class SNRProfile:
    """SNRs of slices at several steps of training.

    Attributes:
        steps: At which something was added.
        entries: What was measured, a list for each step.
    """

    steps: list[int] = field(default_factory=list)
    entries: list[list[SliceSNR]] = field(default_factory=list)

    def add(self, step: int, measured: Iterable[SliceSNR]) -> None:
        self.steps.append(step)
        self.entries.append(list(measured))

    def record(self, step: int, moments: Mapping[str, Tensor], model: nn.Module) -> None:
        """Adds the SNRs of second moments by parameter name, such as `second_moments(optimizer, model)`."""
        self.add(step, snr_of_slices(moments, structure(model)))

    def average(
        self, *, statistic: Average = "mean", after: int = 0, by: Literal["slice", "role"] = "slice"
    ) -> dict[str, dict[str, float]]:
        """SNR by slice (or by role, the mean over its slices) and rule, averaged over the steps from `after` on.

        An SNR that is not finite is left out; a rule with none left is absent.

        Args:
            statistic: "mean" takes the mean over a tensor's slices, then over steps; "median" their medians.
            after: The first steps say nothing: v is then a single squared gradient, whose SNR is 0.5 by chance.
        """
        values: dict[str, dict[str, list[float]]] = {}
        for step, measured in zip(self.steps, self.entries, strict=True):
            for entry in measured if step >= after else ():
                value = getattr(entry, statistic)
                if math.isfinite(value):
                    key = entry.role if by == "role" else entry.key
                    values.setdefault(key, {}).setdefault(entry.rule, []).append(value)
        combine = statistics.fmean if statistic == "mean" else statistics.median
        return {key: {rule: combine(found) for rule, found in rules.items()} for key, rules in values.items()}

    @classmethod
    def of(cls, trajectory: Trajectory, model: nn.Module, *, name: str = "second_moment_snr") -> SNRProfile:
        """What the measurement `SecondMomentSNR` recorded of this model."""
        parts = {part.key: part for role in structure(model).values() for part in slices(role)}
        by_step: dict[int, dict[tuple[str, str], list[float]]] = {}
        for block in trajectory.blocks(name):
            key, _, rule = block.rpartition(" over ")
            for index in trajectory.indices(name, block):
                series = trajectory.series(name, block, index)
                for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                    both = by_step.setdefault(step, {}).setdefault((key, rule), [math.nan, math.nan])
                    both[index] = value
        profile = cls()
        for step, found in sorted(by_step.items()):
            profile.add(step, [_entry(parts[key], rule, *both) for (key, rule), both in found.items() if key in parts])
        return profile


def _entry(part: Slice, rule: str, mean: float, median: float) -> SliceSNR:
    dims = dict(part.subsets)[rule]
    shape = list(part.tensor.shape)
    if part.segment is not None and part.tensor.axis is not None:
        shape[part.tensor.axis] = part.segment.stop - part.segment.start
    num_blocks = math.prod(n for d, n in enumerate(shape) if d not in dims)
    return SliceSNR(part.key, rule, dims, part.role, math.prod(shape), num_blocks, mean, median)


def derive_rules(
    profile: SNRProfile,
    *,
    cutoff: float = CUTOFF,
    prefer: Literal["snr", "saving"] = "snr",
    statistic: Average = "mean",
    after: int = 0,
    by: Literal["slice", "role"] = "slice",
) -> dict[str, Rule]:
    """Which dimensions of each slice to average over: those whose SNR exceeds the cutoff.

    Args:
        profile: Of a run of Adam; the paper advises a small model or a tenth of the learning rate.
        cutoff: 1 in the paper: the variance is smaller than the squared mean.
        prefer: Among several, "snr" takes the largest SNR, as the authors' code; "saving" the fewest numbers left.
        statistic, after: See `SNRProfile.average`.
        by: "slice": rules for the slices of this model; "role": for the roles, which carry over to other sizes.

    Returns:
        Rules for `SlimAdam`; norm weights and biases, and slices without a candidate, are not in it. Rules other than
        inputs, outputs and both are dimensions.
    """
    if prefer not in ("snr", "saving"):
        raise ValueError(f"`prefer` is {prefer!r}; it must be 'snr' or 'saving'")
    known = {(e.role if by == "role" else e.key, e.rule): e for measured in profile.entries for e in measured}
    rules: dict[str, Rule] = {}
    for key, found in profile.average(statistic=statistic, after=after, by=by).items():
        if known[key, next(iter(found))].role in NEVER_COMPRESSED:
            continue
        good = {rule: value for rule, value in found.items() if value > cutoff}
        if good:
            left = {rule: known[key, rule].num_blocks for rule in good}
            best = max(good, key=good.__getitem__) if prefer == "snr" else min(good, key=lambda r: (left[r], -good[r]))
            rules[key] = best if best in ("inputs", "outputs", "both") else known[key, best].dims  # type: ignore[assignment]
    return rules
