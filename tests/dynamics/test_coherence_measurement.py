"""The measurement along a training run, against the function that it calls."""

import pytest
import torch
from sharpscope import Objective
from sharpscope.dynamics.coherence_measurement import Coherence
from sharpscope.dynamics.point import Point, checked_measurements, measured_rows
from sharpscope.hessian.coherence import coherence
from torch import nn


@pytest.fixture
def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    return Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))


def test_rows_are_those_of_the_function(objective):
    [measurement] = checked_measurements([Coherence(batch_size=4, name="sgd")])
    rows = {row.quantity: row for row in measured_rows(measurement, Point(0, objective))}
    found = coherence(objective)
    assert rows["sgd"].value == pytest.approx(found.sigma)
    assert rows["sgd"].seconds > 0
    torch.testing.assert_close(rows["sgd"].arrays["matrix"], found.S)
    assert rows["sgd_lambda1"].value == pytest.approx(found.lambda1)
    thresholds = found.thresholds(4, "without_replacement")
    assert rows["sgd_lr_exact"].value == pytest.approx(thresholds.exact)
    assert rows["sgd_lr_gradient_descent"].value == pytest.approx(thresholds.gradient_descent)
    assert len(rows) == 9


def test_the_probe_is_fixed_and_follows_the_weights(objective):
    measurement = Coherence(num_examples=6)
    first = measured_rows(measurement, Point(0, objective))
    again = measured_rows(measurement, Point(1, objective))
    assert [row.value for row in first] == [row.value for row in again]
    assert first[0].arrays["matrix"].shape == (6, 6)
    assert len(first) == 5
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.mul_(1.5)
    moved = measured_rows(measurement, Point(2, objective))
    assert moved[0].value != first[0].value


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_examples": 0}, "`num_examples` is 0; give a whole number, 2 or more"),
        ({"num_examples": 1}, "`num_examples` is 1"),
        ({"num_examples": 8.0}, "`num_examples` is 8.0"),
        ({"num_columns": 0}, "`num_columns` is 0"),
        ({"factor": "gnn"}, "`factor` is 'gnn'; choose among .*near: 'ggn'"),
        ({"outputs": "q"}, "`outputs` is 'q'; choose among"),
        ({"sampling": "z"}, "`sampling` is 'z'; choose among"),
        ({"factor": "hessian_psd", "outputs": "sketch"}, "`outputs` is 'sketch'"),
        ({"num_examples": 8, "batch_size": 9}, "`batch_size` is 9; .*`num_examples` = 8 .*raise it"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": True}, "`batch_size` is True"),
        ({"batch_size": 2.5}, "`batch_size` is 2.5"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(wrong, message):
    with pytest.raises(ValueError, match=message):
        Coherence(**wrong)


def test_batches_drawn_by_chance_may_have_a_fraction_of_an_example():
    assert Coherence(batch_size=2.5, sampling="bernoulli").batch_size == 2.5
