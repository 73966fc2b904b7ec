"""What the kernels are to reach on a GPU, as ratios of times measured in one run."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A figure and its border."""

    name: str
    rule: str
    border: float

    def status(self, figures: Mapping[str, float]) -> str:
        """met, missed or not run."""
        if self.name not in figures:
            return "not run"
        reached = {">=": operator.ge, "<=": operator.le}[self.rule]
        return "met" if reached(figures[self.name], self.border) else "missed"


TARGETS = (
    Target("block fp32 step: times faster than torch fused AdamW", ">=", 1.5),
    Target("block fp32 step: time over a copy of 14.125 B/parameter", "<=", 1.33),
    Target("block bf16 step: time over a copy of 8.125 B/parameter", "<=", 1.8),
    Target("rank-1 fp32 step: times faster than torch fused AdamW", ">=", 1.15),
    Target("1000 small tensors in one step: times faster than our step on each, tables cached", ">=", 20),
    Target("1000 small tensors in one step: times faster than torch AdamW on each (foreach=False)", ">=", 20),
    Target("ragged Lanczos, 100 blocks, n = 1e6, m = 64: times faster than a loop of torch.mv", ">=", 5),
    Target("ragged Lanczos, n = 1e7, m = 64: vector work over a copy of 6 n m² bytes", "<=", 1.25),
    Target("quadrature (256, 64): times faster than torch.linalg.eigh", ">=", 50),
    Target("quadrature (256, 64): times faster than cupy.linalg.eigh", ">=", 2),
)


def judged(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every target with what was found."""
    return [
        {
            "name": target.name,
            "rule": f"{target.rule} {target.border:g}",
            "value": figures.get(target.name),
            "status": target.status(figures),
        }
        for target in TARGETS
    ]
