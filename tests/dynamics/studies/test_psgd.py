"""The parts of the study of PSGD, shortened."""

import pytest
import torch
from sharpscope.dynamics.studies import psgd_parts as psgd
from sharpscope.dynamics.studies.psgd_problems import (
    absolute_inverse,
    low_rank_hessian,
    rosenbrock,
    square_root,
    x_shaped_hessian,
)


def test_the_x_shaped_problem_is_as_it_says():
    H = x_shaped_hessian(10, 86.0, seed=0)
    assert torch.equal(H, H.T)
    assert float(torch.linalg.cond(H)) == pytest.approx(86, rel=1e-9)
    off = ~(torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool).flip(1))
    assert not H[off].any()
    mixed = torch.linalg.eigvalsh(x_shaped_hessian(10, 86.0, seed=0, indefinite=True))
    assert int((mixed < 0).sum()) == 5
    torch.testing.assert_close(mixed.abs().sort().values, torch.linalg.eigvalsh(H))


def test_roots_and_inverses_are_what_they_are_called():
    H = x_shaped_hessian(6, 9.0, seed=1, indefinite=True)
    inverse = absolute_inverse(H)
    torch.testing.assert_close(inverse @ H @ inverse @ H, torch.eye(6, dtype=H.dtype))
    torch.testing.assert_close(absolute_inverse(H, 0.5).matrix_power(-2), H @ H + 0.25 * torch.eye(6, dtype=H.dtype))
    torch.testing.assert_close(square_root(inverse) @ square_root(inverse), inverse)
    values = torch.linalg.eigvalsh(low_rank_hessian(30, 3, seed=0))
    assert int((values > 1.5).sum()) == 3


def test_rosenbrock_starts_at_fifty_and_ends_at_zero():
    assert rosenbrock(torch.zeros(100)) == 50
    assert rosenbrock(torch.ones(100)) == 0


@pytest.mark.parametrize("normalizer", ["2nd", "1st"])
def test_two_coordinate_systems_give_the_same_path(normalizer):
    assert psgd.equivariance(normalizer, steps=50, seeds=2) <= 1e-10


def test_a_definite_x_shaped_hessian_is_inverted():
    (curve,) = psgd.x_shaped(indefinite=False, decay=False, instances=1, marks=[10, 3000])
    assert curve[0] > 0.1
    assert curve[1] <= 1e-3


def test_fluctuations_follow_the_root_of_the_rate_and_bfgs_does_not_survive():
    found = psgd.noise_response(rates=[0.1, 0.05], probes=3000, noise=43.0, instance=0)
    assert 1.3 <= found["fluctuation"][0] / found["fluctuation"][1] <= 1.75
    assert max(found["worst"]) < 1
    assert found["secant"] > 10


def test_the_valleys_are_descended():
    curve = psgd.rosenbrock_descent("xmat", steps=600, every=100, seed=0)
    losses = [loss for _, loss in curve]
    assert losses[0] == 50
    assert losses[-1] < 10
