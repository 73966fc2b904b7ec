"""The cheap parts of the study, and the claims that must hold."""

import numpy as np
import pytest
from sharpscope.dynamics.studies import generic_adam as module
from sharpscope.dynamics.studies.laboratory import Laboratory


@pytest.fixture
def lab():
    return Laboratory(quick=True)


def test_members_of_the_family_are_those_of_torch(lab):
    (claim,) = module._limits(lab)
    assert claim.holds, claim


def test_a_short_memory_stays_at_the_wrong_end_and_the_longest_turns():
    means = np.array(module.counterexample((0.0, 0.25, 1.0), (0.0,), steps=100_000, seeds=32, stretches=100))
    tail = means[-10:].mean(0)[:, 0]  # [r, seeds]
    assert (tail[:2] > 0.9).all()
    assert tail[2].mean() < 0.2
    assert (tail[2] < 0).mean() >= 0.5


def test_the_condition_is_decided_and_its_ratio_falls_as_the_corollary_says(lab):
    claims, panel = module._conditions(lab)
    assert all(claim.holds for claim in claims), claims
    assert len(panel.lines) == len(module.SHOWN)


def test_a_constant_theta_leaves_a_neighbourhood(lab):
    (claim,) = module._neighbourhood(lab)
    assert claim.holds, claim


def test_the_noise_has_mean_zero_variance_one_and_a_long_tail():
    noise = module.skewed_noise(4, 5, 0)(50_000)
    assert noise.mean() == pytest.approx(0, abs=4e-3)
    assert noise.var() == pytest.approx(1, abs=0.04)
    assert (noise > 9).mean() == pytest.approx(0.01, abs=1e-3)


def test_larger_batches_need_fewer_steps():
    horizons = [64, 256, 1024]
    one, sixteen = (module.mean_square_gradients(s, 1, horizons, 8) for s in (1, 16))
    assert all(b < 0.6 * a for a, b in zip(one, sixteen, strict=True))
    assert module._crossing([1, 10, 100], [1.0, 0.1, 0.01], 0.03) == pytest.approx(33.3, rel=1e-2)
    assert module._crossing([1, 10], [1.0, 0.1], 0.01) == pytest.approx(100)
