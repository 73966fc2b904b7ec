"""A run at the edge of stability, made up: sharpness rises to 2/η and oscillates there."""

import math
from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import pytest
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.trajectory import Trajectory

ETA = 0.2
UNSURE = 120  # the step whose sharpness did not converge


@pytest.fixture(autouse=True)
def _headless() -> Iterator[None]:
    """No window opens, every figure is closed, and matplotlib's settings are as they were."""
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    before = dict(matplotlib.rcParams)
    yield
    after = dict(matplotlib.rcParams)
    plt.close("all")
    plt.switch_backend(backend)
    assert after == before


def edge_rows(step: int, *, eta: float = ETA, num: int = 1) -> list[Row]:
    limit = 2 / eta
    rows = [Row("stability_threshold", limit, error=0.0), Row("loss", math.exp(-step / 100) + 0.01)]
    for i in range(num):
        rise = min(1.0, 0.3 + step / (150 * (1 + i)))
        swing = 0.03 * math.sin(step) if rise == 1.0 else 0.0
        sure = step != UNSURE
        rows.append(Row("sharpness", limit * (rise + swing), error=0.1 if sure else 0.8, index=i, converged=sure))
    return rows


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows(step) -> list of Row, steps, **provenance) -> Trajectory."""

    def make(name="run", rows=edge_rows, steps=range(0, 400, 20), **provenance) -> Trajectory:
        trajectory = Trajectory.open(tmp_path / name, mode="x", provenance=provenance)
        for step in steps:
            trajectory.record(step, rows(step))
        return trajectory

    return make


@pytest.fixture
def run(make_run) -> Trajectory:
    return make_run(lr=ETA)
