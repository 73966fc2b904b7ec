"""Measurements at stored checkpoints: of a run made here, or of the user's own model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..landscape.objective import Objective
from .replay import ReplayResult, replay
from .run_folder import CHECKPOINTS, RunFolder
from .settings import chosen_measurements
from .subject import subject
from .training_options import TrainingOptions
from .trajectory import Trajectory
from .workloads.catalogue import workload

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "analysis"
DEFAULT_MEASURE = ("loss", "sharpness")


@dataclass(frozen=True)
class Analysis:
    """Where the numbers are, and what became of each checkpoint."""

    folder: Path
    replay: ReplayResult

    def trajectory(self) -> Trajectory:
        """The numbers, open for reading."""
        return Trajectory.open(self.folder, mode="r")

    def table(self) -> pd.DataFrame:
        """Every number, as `Trajectory.to_pandas` gives them."""
        with self.trajectory() as trajectory:
            return trajectory.to_pandas()


def analyze(
    checkpoints: str | os.PathLike[str],
    *,
    model: nn.Module | Callable[[], nn.Module] | str | None = None,
    data: Any = None,
    criterion: Callable[..., Any] | str | None = None,
    loss: Callable[..., Any] | str | None = None,
    measure: str | Sequence[str] = DEFAULT_MEASURE,
    out: str | os.PathLike[str] | None = None,
    key: str | None = None,
    progress: bool = True,
) -> Analysis:
    """Measures curvature at stored checkpoints; what was measured before is not measured again.

    A checkpoint that cannot be read is reported in `.replay.failed` and skipped.

    Args:
        checkpoints: The folder of a run of `train`, whose workload is then known; or a file, folder or glob of
            checkpoints, torch (read with weights_only=True) or safetensors.
        model, data, criterion, loss: The user's own, as for `subject`; needed unless a run of `train` is analysed.
        measure: As for `train`.
        out: Folder of the new trajectory; default "analysis" in the run's folder or beside the checkpoints.
        key: Entry of a checkpoint that holds the weights; by default the one that fits the model.
        progress: Show a bar over checkpoints.
    """
    measurements = chosen_measurements(measure)
    place = Path(checkpoints).expanduser()
    run = _run_of(place)
    if model is None:
        if run is None:
            raise ValueError(
                f"{checkpoints} belongs to no run of sharpscope, so `model` (--model) and `data` (--data) are needed, "
                "with `criterion` (--criterion) or `loss` (--loss)"
            )
        objective = _objective_of(run)
    else:
        if data is None:
            raise ValueError("`data` (--data) is missing: the loss of your model is measured on it")
        objective = subject(model, data, criterion=criterion, loss=loss)
    own = run is not None and place.resolve() == run.path.resolve()
    source = place / CHECKPOINTS if own else place
    if own and not source.is_dir():
        raise ValueError(f"the run in {place} has no checkpoints yet")
    folder = Path(out).expanduser() if out is not None else _default_folder(place, run if model is None else None)
    with Trajectory.open(
        folder, provenance={"checkpoints": str(checkpoints), "measure": list(_texts(measure))}
    ) as table:
        found = replay(objective, source, measurements, table, key=key, progress=progress)
    return Analysis(folder, found)


def _run_of(place: Path) -> RunFolder | None:
    """The run to which a folder, a checkpoint or a glob of checkpoints belongs."""
    for folder in (place, *list(place.parents)[:2]):
        if (run := RunFolder(folder)).exists:
            return run
    return None


def _objective_of(run: RunFolder) -> Objective:
    stored, _ = run.read_options()
    options = TrainingOptions.resolve(stored)
    job = workload(options.workload, seed=options.seed, data=options.data, num_examples=options.num_examples)
    return job.to(options.device).objective(options.num_measured)


def _default_folder(place: Path, run: RunFolder | None) -> Path:
    if run is not None:
        return run.path / FOLDER
    return (place if place.is_dir() else place.parent) / FOLDER


def _texts(measure: str | Sequence[str]) -> Sequence[str]:
    return [measure] if isinstance(measure, str) else measure
