"""Measurements of gradient noise: the numbers of the statistics behind them, from one pass."""

import pytest
import torch
from sharpscope import Objective, per_example_statistics
from sharpscope.dynamics import gradient_noise
from sharpscope.dynamics.gradient_noise import (
    BatchSharpness,
    GradientAlignment,
    GradientNoiseScale,
    GradientSNR,
    GradientTailIndex,
)
from sharpscope.dynamics.monitor import Monitor
from sharpscope.dynamics.point import Point
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.hessian.batch_sharpness import batch_sharpness
from torch import nn

MEASUREMENTS = [GradientSNR(), GradientNoiseScale(), GradientAlignment(), GradientTailIndex()]


@pytest.fixture
def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = torch.randn(64, 4, dtype=torch.float64), torch.randint(0, 3, (64,))
    return Objective.supervised(model, nn.CrossEntropyLoss(), data)


def rows_of(measurement, objective):
    return {(row.quantity, row.block): row for row in measurement.measure(Point(0, objective))}


def test_numbers_are_those_of_the_statistics(objective):
    statistics = per_example_statistics(objective)
    assert rows_of(GradientSNR(), objective)["gradient_snr", ""].value == statistics.snr()
    parts = rows_of(GradientSNR(by="parameter", definition="mean"), objective)
    assert {block: row.value for (_, block), row in parts.items()} == statistics.snr("parameter", "mean")

    scale, rows = statistics.noise_scale(), rows_of(GradientNoiseScale(), objective)
    assert (rows["noise_scale", ""].value, rows["noise_scale", ""].error) == (scale.estimate, scale.stderr)
    assert (rows["noise_scale_low", ""].value, rows["noise_scale_high", ""].value) == (scale.low, scale.high)

    alignment, rows = statistics.alignment(), rows_of(GradientAlignment(), objective)
    for name in ("mean_cosine", "diversity", "negative_share"):
        row = rows[f"gradient_alignment_{name}", ""]
        assert (row.value, row.error) == (getattr(alignment, name), getattr(alignment, f"{name}_stderr"))
    assert rows["gradient_alignment_confusion", ""].value == alignment.confusion

    tails, rows = statistics.tail_index(), rows_of(GradientTailIndex(), objective)
    assert rows["tail_index", ""].value == tails.median
    assert {block for _, block in rows} == {"", *tails.parameters}
    for name, index in tails.parameters.items():
        row = rows["tail_index", name]
        assert (row.value, row.error) == (index.estimate, (index.high - index.low) / 2)

    sharpness = batch_sharpness(objective, 16, num_batches=5)
    [row] = rows_of(BatchSharpness(batch_size=16, num_batches=5), objective).values()
    assert (row.value, row.error, row.products) == (sharpness.estimate, sharpness.stderr, 5)


def test_one_pass_serves_all(objective, monkeypatch):
    passes = []

    def counted(*args, **options):
        passes.append(options)
        return per_example_statistics(*args, **options)

    monkeypatch.setattr(gradient_noise, "per_example_statistics", counted)
    point = Point(0, objective)
    for measurement in MEASUREMENTS:
        assert list(measurement.measure(point.with_state({})))
    assert len(passes) == 1
    list(GradientSNR(memory_budget=1 << 24).measure(point))
    assert passes[1] == {"memory_budget": 1 << 24}
    list(GradientSNR().measure(Point(1, objective)))
    assert len(passes) == 3


def test_along_a_training(objective, tmp_path):
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1)
    measurements = [*MEASUREMENTS, BatchSharpness(batch_size=8, num_batches=4)]
    with Trajectory.open(tmp_path) as trajectory:
        monitor = Monitor(objective, optimizer, measurements, trajectory)
        for _ in range(2):
            monitor.step()
            optimizer.zero_grad()
            objective.model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
            optimizer.step()
        for quantity in ("gradient_snr", "noise_scale", "gradient_alignment_diversity", "batch_sharpness"):
            series = trajectory.series(quantity)
            assert list(series.steps) == [0, 1]
            assert series.values[0] != series.values[1]


@pytest.mark.parametrize(
    ("measurement", "options", "match"),
    [
        (GradientSNR, {"by": "element"}, "element"),
        (GradientSNR, {"by": "head"}, "`by` is 'head'"),
        (GradientSNR, {"by": 3}, "`by` is 3"),
        (GradientSNR, {"definition": "spatia"}, "`definition` is 'spatia'; choose among .*near: 'spatial'"),
        (GradientSNR, {"definition": "second_moment"}, "`by` is 'whole' but .* give by='parameter'"),
        *((kind, {"memory_budget": -3}, "`memory_budget` is -3") for kind in map(type, MEASUREMENTS)),
        (GradientAlignment, {"memory_budget": True}, "`memory_budget` is True"),
        (GradientTailIndex, {"method": "hil"}, "`method` is 'hil'; choose among .*near: 'hill'"),
        (BatchSharpness, {"batch_size": 0}, "`batch_size` is 0"),
        (BatchSharpness, {"batch_size": 2.5}, "`batch_size` is 2.5"),
        (BatchSharpness, {"num_batches": 0}, "`num_batches` is 0"),
    ],
)
def test_what_cannot_work_is_refused_at_once(measurement, options, match):
    with pytest.raises(ValueError, match=match):
        measurement(every=1, **options)


def test_second_moments_by_parameter(objective):
    rows = rows_of(GradientSNR(by="parameter", definition="second_moment"), objective)
    expected = per_example_statistics(objective).snr("parameter", "second_moment")
    assert {block: row.value for (_, block), row in rows.items()} == expected
