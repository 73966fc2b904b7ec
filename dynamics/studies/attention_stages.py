"""The four stages in which attention on signal and noise is learned by signs, read from order parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGES = ("I", "II", "III", "IV")


@dataclass(frozen=True)
class StageThresholds:
    """Where one stage ends and the next begins.

    Attributes:
        query_growth: II begins when the query noise is this many times its first value.
        noise_attention: III begins when s_21, of the noise query on the signal key, is below this.
        signal_attention: IV begins when s_11, of the signal query on the signal key, is below this; it starts at 1/2.
    """

    query_growth: float = 1.15
    noise_attention: float = 0.01
    signal_attention: float = 0.4


def detect_stages(
    series: Mapping[str, Sequence[float]], thresholds: StageThresholds | None = None
) -> dict[str, float | None]:
    """The step at which each stage begins; None where it is not reached, or begins before the one in front of it.

    - I: the values fit the noise, queries and keys are still near their first weights.
    - II: query and key noise grow and align; the noise attends to the noise, s_21 → 0.
    - III: the signs of the query and key signals follow the vote of the noise; s_11 is still near 1/2.
    - IV: the signal queries leave the signal, s_11 → 0.

    Steps are interpolated linearly between measured ones.

    Args:
        series: Equally long "step", "query_noise", "s21" and "s11", steps increasing.
        thresholds: Defaults to `StageThresholds()`.

    Raises:
        ValueError: `series` is empty or its lengths differ.

    Source: the stages: Li et al., On the Optimization and Generalization of Two-layer Transformers with Sign Gradient
    Descent, 2025; the thresholds are ours.
    """
    limits = StageThresholds() if thresholds is None else thresholds
    steps, query, s21, s11 = (list(series[name]) for name in ("step", "query_noise", "s21", "s11"))
    if not steps or len({len(steps), len(query), len(s21), len(s11)}) > 1:
        lengths = ", ".join(str(len(part)) for part in (steps, query, s21, s11))
        raise ValueError(
            f"`series` has step, query_noise, s21 and s11 of the lengths {lengths}; give as many of each, at least one"
        )
    starts = [
        float(steps[0]),
        first_below(steps, [-value for value in query], -limits.query_growth * query[0]),
        first_below(steps, s21, limits.noise_attention),
        first_below(steps, s11, limits.signal_attention),
    ]
    found: dict[str, float | None] = {}
    last: float | None = -math.inf
    for stage, start in zip(STAGES, starts, strict=True):
        last = start if start is not None and last is not None and start >= last else None
        found[stage] = last
    return found


def first_below(steps: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The step at which a curve first falls below a level, interpolated linearly; None where it never does."""
    for i, value in enumerate(values):
        if value < level:
            if i == 0:
                return float(steps[0])
            share = (values[i - 1] - level) / (values[i - 1] - value)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None
