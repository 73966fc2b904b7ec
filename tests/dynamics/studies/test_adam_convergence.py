"""The cheap parts of the study, and the claims that must hold."""

import numpy as np
import pytest
from sharpscope.dynamics.studies import adam_convergence as module
from sharpscope.dynamics.studies.laboratory import Laboratory


@pytest.fixture
def lab():
    return Laboratory(quick=True)


def held(claims, part_of_statement):
    (claim,) = [claim for claim in claims if part_of_statement in claim.statement]
    assert claim.holds, claim
    return claim


def test_exact_statements_hold(lab):
    claims = module._exactness(lab)
    held(claims, "those of torch.optim.Adam")
    held(claims, "affine variance")


def test_the_phase_transition_is_where_the_paper_has_it(lab):
    claims, panel = module._phases(lab)
    for statement in ("converges once β₂ is large", "diverges where β₂ is small", "critical β₂", "sign method"):
        held(claims, statement)
    assert [len(line.x) for line in panel.lines] == [100] * len(module.BETA2S)


def test_the_critical_beta2_rises_with_the_number_of_minibatches():
    found = [module.critical(n, steps=20_000, seeds=2) for n in (5, 50)]
    assert found[0][1] <= found[1][0]


def test_cyclic_order_has_the_transition_too(lab):
    held(module._cyclic(lab), "cyclic order too")


def test_without_noise_at_the_minimum_the_gradient_goes_to_zero():
    noise, none = np.array(module.least_squares(steps=20_000, seeds=2))
    assert noise.mean(1)[0] > noise.mean(1)[2]
    assert noise[0].mean() > 3 * noise[2].mean()
    assert (none.mean(1) < 0.2 * noise.mean(1)).all()


def test_a_run_on_digits_depends_on_its_arguments_only():
    losses = [module.digits_loss(64, 0.99, 40, seed) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] < 1.0
