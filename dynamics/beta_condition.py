"""Measurement of whether Adam's two betas suit the problem: what theory asks of them, and where the steps drift."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from ..kernels.accurate import dot
from .point import Point
from .row import Row


@dataclass(frozen=True)
class BetaCondition:
    """√β₂ − β₁, which theory wants above 0, and whether the steps go downhill on average.

    With too small a β₂ Adam diverges slowly and without any overflow: rare large gradients are divided by themselves,
    and the many small ones against them win. The steps then lead uphill on average, which is what is looked at here:
    with D_t = −⟨θ_t − θ_(t−1), ∇L(θ_t)⟩, the first-order descent of the last step,

        descent = ΣD / Σ|D|

    over the points measured so far, older ones fading with the time constant `window`. It lies in [−1, 1]; well below
    0 is divergence; near 0, within its standard error, noise. Single steps say little: most of them may lead the wrong
    way in a run that converges.

    Rows: "beta_condition" for each group (index) with betas, without error; "descent" of the whole model with its
    standard error, from the second point on, for any optimizer.

    Args:
        every: Period in steps. Over a whole number of epochs the noise averages out best.
        window: Points over which the average reaches.

    Source: Zhang, Chen, Shi, Sun, Luo, Adam Can Converge Without Any Modification On Update Rules, NeurIPS 2022, the
    condition of the convergence theorem and the mechanism of the divergence theorem; `descent` is ours.
    """

    every: int | None = None
    window: int = 200
    _: KW_ONLY
    name: str = "beta_condition"

    needs_update: ClassVar[bool] = True

    def measure(self, point: Point) -> Iterator[Row]:
        for i, group in enumerate([] if point.optimizer is None else point.optimizer.param_groups):
            betas = group.get("betas")
            if isinstance(betas, tuple | list) and len(betas) == 2:
                yield Row(self.name, math.sqrt(float(betas[1])) - float(betas[0]), index=i)
        if point.update is not None:
            yield from self._descent(point, -float(dot(point.update, point.gradient().to(point.update))))

    def _descent(self, point: Point, descent: float) -> Iterator[Row]:
        kept = 1 - 1 / self.window
        # The variance of a sum with weights w is the sum of w² times that of a term.
        sums = {"total": (kept, descent), "size": (kept, abs(descent)), "squares": (kept**2, descent**2)}
        for key, (share, value) in sums.items():
            point.state[key] = share * float(point.state.get(key, 0.0)) + value
        total, size, squares = (point.state[key] for key in sums)
        yield Row("descent", total / size if size else 0.0, error=math.sqrt(squares) / size if size else math.nan)
