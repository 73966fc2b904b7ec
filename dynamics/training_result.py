"""What a training run ends with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .training_options import FULL_BATCH, TrainingOptions
from .trajectory import Trajectory
from .workloads.catalogue import Workload

MAX_BLOCKS = 12  # lines of a summary for one quantity


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        folder: With the trajectory, the checkpoints and run.json.
        workload: The network with its final weights, and its data.
        options: Of the run, complete.
        resumed_at: The step at which this process took over; None when it began the run.
        seconds: Spent by this process.
    """

    folder: Path
    workload: Workload
    options: TrainingOptions
    resumed_at: int | None
    seconds: float

    def trajectory(self) -> Trajectory:
        """The trajectory, open for reading."""
        return Trajectory.open(self.folder, mode="r")

    @cached_property
    def edge(self) -> Edge | None:
        """How the sharpness stood to the stability threshold; None where one of them was not measured."""
        with self.trajectory() as trajectory:
            return Edge.of(trajectory)

    def summary(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and its value."""
        job = self.workload
        lines = [
            ("workload", f"{job.name}: {sum(p.numel() for p in job.model.parameters()):,} parameters"),
            ("data", f"{job.train.num} examples, {job.source}"),
            ("optimizer", f"{self.options.optimizer} {_listed(self.options.optimizer_options)}".strip()),
            ("steps", f"{self.options.steps}, {_batches(self.options.batch_size)}"),
        ]
        with self.trajectory() as trajectory:
            for quantity in trajectory.quantities():
                for block in trajectory.blocks(quantity)[:MAX_BLOCKS]:
                    series = trajectory.series(quantity, block)
                    change = f"{series.values[0]:.5g} -> {series.values[-1]:.5g}"
                    if math.isfinite(series.errors[-1]) and series.errors[-1] > 0:
                        change += f" ± {series.errors[-1]:.1g}"
                    lines.append((quantity + (f" [{block}]" if block else ""), change))
        if self.edge is not None:
            lines.append(("sharpness / threshold", str(self.edge)))
        lines.append(
            ("accuracy", f"{job.accuracy(job.train):.1%} trained on, {job.accuracy(job.held_out):.1%} held out")
        )
        lines.append(
            ("time", f"{self.seconds:.1f} s" + ("" if self.resumed_at is None else f" since step {self.resumed_at}"))
        )
        return lines


@dataclass(frozen=True)
class Edge:
    """Sharpness that the optimizer feels over its stability threshold: at a run's start, and over its last third."""

    start: float
    mean: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, trajectory: Trajectory) -> Edge | None:
        known = set(trajectory.quantities())
        if "threshold_ratio" in known:
            felt = trajectory.series("threshold_ratio")
            steps, ratio = felt.steps, felt.values
        elif {"sharpness", "stability_threshold"} <= known:
            sharpness, threshold = trajectory.series("sharpness"), trajectory.series("stability_threshold")
            steps, i, j = np.intersect1d(sharpness.steps, threshold.steps, return_indices=True)
            ratio = sharpness.values[i] / threshold.values[j]
        else:
            return None
        if not len(steps):
            return None
        last = ratio[steps >= steps[-1] * 2 / 3]
        return cls(float(ratio[0]), float(last.mean()), float(last.min()), float(last.max()))

    def __str__(self) -> str:
        later = f"{self.mean:.3f} over the last third ({self.lowest:.2f} to {self.highest:.2f})"
        return f"{self.start:.2f} at the start, {later}"


def _batches(size: int | str) -> str:
    return "all examples at once" if size == FULL_BATCH else f"batches of {size}"


def _listed(options: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
