"""Measurements of SAM's sharpness at points of a run."""

import math

import pytest
import torch
from sharpscope.dynamics.optimizers.sam import SAM
from sharpscope.dynamics.point import Measurement, Point, measured_rows
from sharpscope.dynamics.sam_sharpness import AverageSharpness, SAMEdge, SAMSharpness
from sharpscope.landscape.objective import Objective
from sharpscope.landscape.sharpness import average_sharpness, sam_sharpness
from torch import nn


@pytest.fixture
def quadratic():
    H = torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))
    x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    return Objective.from_closure(lambda y: 0.5 * y @ H @ y, {"x": x}), x


@pytest.mark.parametrize("kind", [SAMSharpness, AverageSharpness, SAMEdge])
def test_each_is_a_measurement(kind):
    assert isinstance(kind(), Measurement)
    assert kind(every=7, name="other").every == 7
    assert "other" in repr(kind(name="other"))


def test_sam_sharpness_is_that_of_the_point(quadratic):
    objective, x = quadratic
    point = Point(0, objective)
    (row,) = measured_rows(SAMSharpness(rho=0.3), point)
    g = torch.tensor([3.0, -2.0, 0.1], dtype=torch.float64)
    unit = g / g.norm()
    curvature = float((unit**2 * torch.tensor([3.0, 1.0, 0.2])).sum())
    assert row.value == pytest.approx(0.3 * float(g.norm()) + 0.3**2 / 2 * curvature, rel=1e-7)
    assert row.quantity == "sam_sharpness"
    assert row.seconds > 0
    (row,) = measured_rows(SAMSharpness(rho=0.3, adaptive=True, ascent_steps=2), point)
    assert row.value == sam_sharpness(objective, 0.3, True, 2)
    assert torch.equal(x.detach(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def test_average_sharpness_comes_with_its_error(quadratic):
    (row,) = measured_rows(AverageSharpness(sigma=0.1, num_pairs=5, seed=3), Point(0, quadratic[0]))
    assert (row.value, row.error) == average_sharpness(quadratic[0], 0.1, 5, seed=3)[:2]
    assert row.error > 0


def test_the_edge_of_sam(quadratic):
    objective, x = quadratic
    lr, rho = 0.1, 0.05
    sam = SAM(torch.optim.SGD([x], lr=lr), rho=rho)
    (row,) = measured_rows(SAMEdge(), Point(0, objective, sam))
    length = math.sqrt(9 + 4 + 0.01)
    assert row.value == pytest.approx(length / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * length)) - 1), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: SAM(torch.optim.SGD(p, lr=0.1), enabled=False),
        lambda p: SAM(torch.optim.SGD(p, lr=0.1), normalize=False),
        lambda p: SAM(torch.optim.SGD(p, lr=0.1), adaptive=True),
        lambda p: SAM(torch.optim.Adam(p, lr=0.1)),
        lambda p: SAM(torch.optim.SGD(p, lr=0.0)),
    ],
)
def test_no_edge_of_sam(quadratic, make):
    objective, x = quadratic
    assert measured_rows(SAMEdge(), Point(0, objective, make([x]))) == []
    assert measured_rows(SAMEdge(), Point(0, objective)) == []
