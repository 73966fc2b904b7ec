"""The two-layer transformer, its order parameters and stages, and the readings that the claims rest on."""

import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics.optimizers.sign import SignSGD
from sharpscope.dynamics.studies.attention_stages import StageThresholds, detect_stages, first_below
from sharpscope.dynamics.studies.order_curves import at, between, curves_apart, differences, last_move, line_fit
from sharpscope.dynamics.studies.sign_comparison_claims import descent_claims
from sharpscope.dynamics.studies.sign_stage_claims import CURVES, later_stages_claims, rounding_claims, scaling_claims
from sharpscope.dynamics.studies.sign_transformer_experiments import digit_tokens, made, patches_run
from sharpscope.dynamics.studies.two_layer_attention import (
    SignalNoiseTokens,
    TwoLayerAttention,
    logistic_loss,
    order_parameters,
    signal_noise_tokens,
)

DOUBLE = torch.float64


def disjoint(num=3, size=40, support=12, seed=0):
    """Examples whose noise supports do not overlap."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(num, 2, size, dtype=DOUBLE)
    labels = torch.tensor([1.0, -1.0, 1.0], dtype=DOUBLE)[:num]
    tokens[:, 0, 0] = labels
    for i in range(num):
        first = 1 + i * support
        tokens[i, 1, first : first + support] = torch.randn(support, generator=random, dtype=DOUBLE)
    return SignalNoiseTokens(tokens, labels)


def small_model(size=40, scale=1e-3, seed=0):
    return TwoLayerAttention(size, rows=8, value_rows=4, scale=scale, seed=seed, dtype=DOUBLE)


# --- data and model -------------------------------------------------------------------------------------------------


def test_the_noise_is_sparse_fresh_and_never_on_the_signal():
    data = signal_noise_tokens(200, 50, 10, 2.0, seed=0, dtype=DOUBLE)
    tokens, labels = data.tokens, data.labels
    assert set(labels.tolist()) == {-1.0, 1.0}
    assert torch.equal(tokens[:, 0, 0], labels)
    assert bool((tokens[:, 0, 1:] == 0).all())
    assert bool(((tokens[:, 1] != 0).sum(1) == 10).all())
    assert bool((tokens[:, 1, 0] == 0).all())
    values = tokens[:, 1][tokens[:, 1] != 0]
    # 2000 numbers: the standard error of their deviation is 2/√4000.
    assert float(values.std()) == pytest.approx(2.0, abs=5 * 2 / math.sqrt(4000))
    supports = tokens[:, 1] != 0
    assert len(torch.unique(supports, dim=0)) == 200
    assert bool((supports.double().mean(0)[1:] > 0).all())
    with pytest.raises(ValueError, match="`support` is 50"):
        signal_noise_tokens(2, 50, 50, 1.0, seed=0)


def test_the_model_is_the_sum_over_queries_of_attended_values():
    model, data = small_model(scale=0.5), disjoint()
    for X, found in zip(data.tokens, model(data.tokens), strict=True):
        columns = X.T  # [d, 2] as in the paper
        total = 0.0
        for sign, W in ((1, model.positive), (-1, model.negative)):
            for l in range(2):
                attention = torch.softmax(columns.T @ model.key.T @ model.query @ columns[:, l], 0)
                total += sign * float((W @ columns @ attention).sum().detach()) / len(W)
        assert float(found.detach()) == pytest.approx(total, rel=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    data = disjoint()
    shapes = [p.shape for p in small_model().parameters()]
    names = [name for name, _ in small_model().named_parameters()]
    model = small_model(scale=0.3)

    def loss(*weights):
        found = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (data.tokens,))
        return logistic_loss(found, data.labels)

    random = torch.Generator().manual_seed(1)
    weights = [0.3 * torch.randn(shape, generator=random, dtype=DOUBLE) for shape in shapes]
    assert torch.autograd.gradcheck(loss, [w.requires_grad_() for w in weights], fast_mode=True)


def test_the_loss_neither_overflows_nor_rounds_to_zero():
    assert float(logistic_loss(torch.tensor([80.0], dtype=DOUBLE), torch.tensor([1.0]))) == pytest.approx(math.exp(-80))
    assert float(logistic_loss(torch.tensor([80.0]), torch.tensor([1.0]))) == pytest.approx(math.exp(-80), rel=1e-5)
    assert float(logistic_loss(torch.tensor([1e4]), torch.tensor([-1.0]))) == 1e4


def test_without_overlap_the_value_noise_of_an_example_moves_by_its_l1_norm():
    model, data = small_model(), disjoint()
    optimizer, lr = SignSGD(model.parameters(), lr=1e-3), 1e-3
    noise = data.labels[:, None] * data.tokens[:, 1]
    before = noise @ model.value()
    for step in range(1, 6):
        optimizer.zero_grad()
        logistic_loss(model(data.tokens), data.labels).backward()
        optimizer.step()
        moved = noise @ model.value() - before
        expected = 2 * lr * step * noise.abs().sum(1)
        assert torch.allclose(moved, expected, rtol=1e-10, atol=0)
    # Coordinates that no example has stay where they are.
    assert bool((model.positive.grad[:, 37:] == 0).all())


def test_adam_without_memory_makes_the_steps_of_signs():
    models = [small_model() for _ in range(2)]
    data = disjoint()
    rules = [
        SignSGD(models[0].parameters(), lr=1e-3),
        torch.optim.Adam(models[1].parameters(), lr=1e-3, betas=(0.0, 0.0), eps=1e-30),
    ]
    for _ in range(5):
        for model, rule in zip(models, rules, strict=True):
            rule.zero_grad()
            logistic_loss(model(data.tokens), data.labels).backward()
            rule.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-13)


def test_order_parameters_of_weights_made_by_hand():
    data = disjoint(num=2)
    model = small_model()
    xi = data.tokens[:, 1]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.query[0], model.key[0] = 2 * xi[0], 3 * xi[0]
        model.query[1], model.key[1] = xi[0], -xi[0]
        model.query[0, 0], model.key[0, 0], model.query[1, 0] = 0.5, -0.25, 0.5
        model.positive[:] = xi[0]
    found = order_parameters(model, data)
    square = float(xi[0] @ xi[0])
    assert found["value_noise"] == pytest.approx(square / 2)
    assert found["value_signal"] == 0.0
    assert found["query_noise"] == pytest.approx(3 * square / 16)
    assert found["key_noise"] == pytest.approx(4 * square / 16)
    assert found["query_signal"] == pytest.approx(2 * 0.5 / 8)
    assert found["key_signal"] == pytest.approx(0.25 / 8)
    assert found["aligned"] == 15 / 16  # zeros agree; row 1 has opposite signs on the first example
    assert found["query_vote"] == 7 / 8  # the key of row 1 votes against its query signal
    assert found["key_vote"] == 6 / 8
    # Noise query of example 0 on its signal: score 2 xi.xi * key . mu.
    weights = model.attention(data.tokens)
    assert found["s21"] == pytest.approx(float(weights[:, 1, 0].mean().detach()))
    assert found["s11"] == pytest.approx(float(weights[:, 0, 0].mean().detach()))
    scores = torch.tensor([2 * square * -0.25, 2 * square * 3 * square - square * square])
    assert float(weights[0, 1, 0].detach()) == pytest.approx(float(torch.softmax(scores, 0)[0]), rel=1e-6)


# --- stages ---------------------------------------------------------------------------------------------------------


def made_curves(noise_at=10, signal_at=40, growth_at=2, steps=60):
    step = list(range(steps + 1))
    return {
        "step": step,
        "query_noise": [1.0 if t < growth_at else 2.0 for t in step],
        "s21": [0.5 if t < noise_at else 0.0 for t in step],
        "s11": [0.5 if t < signal_at else 0.0 for t in step],
    }


def test_stages_of_curves_made_by_hand():
    found = detect_stages(made_curves())
    # The crossing is interpolated within the step of the jump.
    assert found == pytest.approx({"I": 0, "II": 1 + 0.15, "III": 9 + 0.49 / 0.5, "IV": 39 + 0.1 / 0.5})
    later = detect_stages(made_curves(), StageThresholds(signal_attention=0.05))
    assert later["IV"] == pytest.approx(39 + 0.45 / 0.5)


def test_a_stage_that_is_not_reached_or_comes_too_early_has_no_beginning():
    assert detect_stages(made_curves(signal_at=100))["IV"] is None
    early = detect_stages(made_curves(noise_at=50, signal_at=20))
    assert early["III"] is not None
    assert early["IV"] is None
    assert detect_stages(made_curves(growth_at=100)) == {"I": 0.0, "II": None, "III": None, "IV": None}
    with pytest.raises(ValueError, match="lengths 61, 61, 61, 2"):
        detect_stages({**made_curves(), "s11": [0.5, 0.5]})
    with pytest.raises(ValueError, match="at least one"):
        detect_stages({name: [] for name in made_curves()})


def test_first_below():
    assert first_below([0, 10], [1.0, 0.0], 0.25) == 7.5
    assert first_below([5, 10], [0.0, 0.0], 0.25) == 5.0
    assert first_below([0, 10], [1.0, 0.5], 0.25) is None


def test_signs_and_gradient_descent_differ_on_a_small_task():
    def trained(optimizer, lr, steps):
        data = signal_noise_tokens(8, 200, 30, 2.0, seed=1, dtype=DOUBLE)
        model = TwoLayerAttention(200, rows=20, value_rows=4, scale=0.1 / math.sqrt(200), seed=1, dtype=DOUBLE)
        rule, series = made(optimizer, model, lr), {"step": []}
        for step in range(steps):
            rule.zero_grad()
            logistic_loss(model(data.tokens), data.labels).backward()
            series["step"].append(step)
            for name, value in order_parameters(model, data).items():
                series.setdefault(name, []).append(value)
            rule.step()
        return series

    signs = trained("SignGD", 1e-3, 150)
    stages = detect_stages(signs)
    assert None not in stages.values()
    assert stages["IV"] > 1.5 * stages["III"]
    assert max(signs["aligned"]) > 0.9
    assert signs["query_vote"][-1] > 0.9
    assert signs["key_vote"][-1] < 0.1
    gd = trained("GD", 0.1, 100)
    assert gd["s11"][-1] > 0.4
    assert gd["value_signal"][-1] / gd["value_noise"][-1] > 1.5 * signs["value_signal"][-1] / signs["value_noise"][-1]


# --- readings -------------------------------------------------------------------------------------------------------


def test_readings_of_curves():
    run = {"step": [0, 1, 2, 4], "x": [0.0, 2.0, 4.0, 8.0]}
    assert at(run, "x", 3) == 6.0
    assert between(run, "x", 1, 2) == ([1, 2], [2.0, 4.0])
    assert line_fit([0, 1, 2], [1.0, 3.0, 5.0]) == pytest.approx((2.0, 1.0))
    random = np.random.default_rng(0).normal(size=200)
    assert line_fit(range(200), random)[1] < 0.1
    slow = {"step": [0, 2, 4, 8], "x": [0.0, 2.0, 4.4, 8.0]}
    found = differences(run, slow, "x", 4, stretch=2)
    assert [share for share, _ in found] == pytest.approx([0.0, 0.0, 0.05, 0.0])
    assert [t for _, t in found] == [0, 1, 2, 4]
    # Where the other was not measured, nothing is compared.
    assert [t for _, t in differences(run, {"step": [0, 4], "x": [0.0, 4.0]}, "x", 4, stretch=2)] == [0, 2]
    assert curves_apart(run, {**run, "x": [0.0, 2.0, 4.4, 8.0]}, "x", 4) == pytest.approx((0.05, 2))
    assert curves_apart(run, run, "x", 4)[0] == 0.0
    flat = {"step": [0, 1], "x": [1.0, 1.0]}
    assert curves_apart(flat, flat, "x", 1)[0] == 0.0
    assert curves_apart(flat, {"step": [0, 1], "x": [1.0, 1.1]}, "x", 1) == (math.inf, 1)
    assert last_move([0, 1, 2, 3], [1.0, 2.0, 2.0, 2.0]) == 1
    assert last_move([0, 1], [1.0, 1.0]) == 0


def test_digits_are_cut_into_patches_beside_noise():
    tokens, labels = digit_tokens(500, 3.0, 0)
    again, _ = digit_tokens(500, 0.0, 0)
    assert tokens.shape == (500, 8, 16)
    assert bool((again[:, 4:] == 0).all())
    assert torch.equal(tokens[:, :4], again[:, :4])
    assert float(tokens[:, 4:].std()) == pytest.approx(3.0, rel=0.02)
    from sharpscope.dynamics.studies.digit_problems import digit_examples

    pixels, targets = digit_examples(500, seed=0, dtype=torch.float32)
    image = pixels[0].view(8, 8)
    assert torch.equal(tokens[0, 1], image[:4, 4:].reshape(-1))
    assert torch.equal(tokens[0, 2], image[4:, :4].reshape(-1))
    assert torch.equal(labels, targets)


def test_a_transformer_on_patches_stops_when_it_fits():
    found = patches_run("Adam", 3e-3, 0.0, 0, 200, num_train=60)
    assert found["loss"] < 0.1
    assert 0 < found["steps"] < 200
    assert found["accuracy"] > 40
    short = patches_run("SignGD", 1e-3, 0.0, 0, 2, num_train=60)
    assert short["steps"] == 2
    assert short["loss"] > 1


# --- verdicts -------------------------------------------------------------------------------------------------------


def curves(η=1.0, steps=200, **changed):
    """A run whose curves are all lines in η t."""
    step, clock = list(range(steps + 1)), list(range(0, steps + 1, 10))
    found = {name: [1 + η * t for t in (clock if name.startswith("test") else step)] for name in CURVES}
    return {"step": step, "test_step": clock, **found, **changed}


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_has_to_scale(name):
    run, slow = curves(), curves(0.5, 400)
    claim = scaling_claims([run, run], [slow, slow])[0]
    assert claim.holds
    assert claim.note == ""
    # By 6 % of the range.
    off = {**slow, name: [slow[name][0] + 12.0, *slow[name][1:]]}
    claim = scaling_claims([run, run], [slow, off])[0]
    assert claim.holds is False
    assert f"in the first 20 steps only: {name} (last at t = 0)" in claim.note
    late = {**slow, name: [*slow[name][:-1], slow[name][-1] + 12.0]}
    assert f"later: {name} (last at t = 200)" in scaling_claims([run], [late])[0].note


def test_gradient_descent_has_to_end_within_the_limits_themselves():
    def claim(*errors, sign=0.5):
        runs = [curves(test_error=[error] * 21) for error in errors]
        return descent_claims(runs, [curves(test_error=[sign] * 21)] * len(runs))[1]

    assert claim(0.43, 0.46).holds
    assert claim(0.43, 0.46).note == ""
    assert "mean 0.445 ± 0.018 (standard error)" in claim(0.43, 0.46).measured
    above = claim(0.45, 0.46)
    assert above.holds is False
    assert above.note == "0.3 standard errors outside"
    assert claim(0.42).holds is False
    assert claim(0.44, sign=0.43).holds is False


def test_the_freeze_is_told_and_judged_from_every_seed_in_float64():
    single, double = curves(query_noise=[1.0] * 201), curves(query_noise=[1.0 + t / 50 for t in range(201)])
    half = curves(query_noise=[2.0 + t / 50 for t in range(201)])  # from 4 to 5
    frozen = next(claim for claim in later_stages_claims([single], [double]) if "freezes" in claim.statement)
    assert frozen.holds
    assert "in float64 |query noise| changes by 67 %" in frozen.note
    assert rounding_claims([single], [curves(query_noise=[max(1.0, t / 50) for t in range(201)])])[0].holds is False
    steep = curves(query_noise=[1.0 + t**2 for t in range(201)])
    assert rounding_claims([single] * 2, [steep, steep])[0].holds
    assert rounding_claims([single] * 2, [steep, half])[0].holds is False
