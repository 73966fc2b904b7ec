"""The character model that studies train: seeds, batches, optimizers of every kind, divergence."""

import math

import pytest
import torch
from sharpscope.dynamics.studies.character_training import CharacterTraining, curve_line, summary, trained, tuned


def test_the_seed_decides_weights_and_order():
    one, same, other = CharacterTraining(3), CharacterTraining(3), CharacterTraining(4)
    state = torch.get_rng_state()
    assert torch.equal(one.loss(5), same.loss(5))
    assert not torch.equal(one.loss(5), one.loss(6))
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    assert torch.equal(torch.get_rng_state(), state)
    untied = CharacterTraining(3, tied=False)
    assert untied.model.head.weight is not untied.model.embedding.weight
    torch.testing.assert_close(untied.loss(0), one.loss(0))


def test_training_is_reproducible_and_descends():
    runs = [trained("AdamW", {"lr": 3e-3}, seed=0, steps=20, batch_size=8) for _ in range(2)]
    assert runs[0] == runs[1]
    curve = runs[0]["curve"]
    assert [step for step, _ in curve] == list(range(1, 21))
    assert curve[-1][1] < curve[0][1] - 0.5
    assert runs[0]["train"] == pytest.approx((curve[-1][1] + curve[-2][1]) / 2)
    assert 2.0 < runs[0]["held_out"] < 4.2


def test_a_closure_is_handed_to_those_that_need_one():
    found = trained("LBFGS", {"lr": 0.1, "max_iter": 1}, seed=0, steps=3, batch_size=4)
    assert math.isfinite(found["held_out"])


def test_what_diverges_is_infinite_and_ends_early():
    found = trained("SGD", {"lr": 1e6}, seed=0, steps=50, batch_size=4)
    assert found["train"] == math.inf
    assert found["held_out"] == math.inf
    assert len(found["curve"]) < 50


def test_the_best_rate_of_the_first_seed_is_taken_for_all():
    found = tuned("SGD", {}, [1e-4, 0.3, 1e6], seeds=[0, 1], steps=6, batch_size=4)
    assert found["lr"] == 0.3
    assert not found["at_edge"]
    assert found["losses"][1] == trained("SGD", {"lr": 0.3}, seed=1, steps=6, batch_size=4)["held_out"]
    assert found["table"]["1000000.0"] == math.inf
    assert "(lr 0.3; 2 seeds)" in summary(found)
    assert curve_line("SGD", found).x == [1, 2, 3, 4, 5, 6]
