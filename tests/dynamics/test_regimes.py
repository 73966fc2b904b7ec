"""Regimes of hand-made curves, of the closed UV map and of a small network, each with what is known of it."""

import itertools
import math

import numpy as np
import pytest
import torch
from sharpscope.dynamics import Row, Trajectory
from sharpscope.dynamics.regimes import regimes
from sharpscope.dynamics.studies.descent import descend
from sharpscope.dynamics.studies.digit_problems import digit_examples, fully_connected, half_squares, one_hot
from sharpscope.dynamics.uv_model import uv_map, uv_sharpness
from sharpscope.landscape import Objective

FOUR = ["transient", "saturation", "progressive sharpening", "edge of stability"]
DENSE = np.unique(np.concatenate([np.arange(50), np.geomspace(50, 20000, 300).astype(int)]))
EVERY = np.arange(0, 20001, 20)


def four_regimes(steps, noise=0.0, seed=0):
    """λ falls from 20 to 5 in 20 steps, stays until 500, rises as step^0.8 to 50 and oscillates about 1.03 · 50."""
    sharpness = np.where(steps < 20, 20 * 4.0 ** (-steps / 20), 5.0)
    sharpness = np.where(steps > 500, 5 * (steps / 500) ** 0.8, sharpness)
    swing = 1.03 + 0.05 * np.where(np.arange(len(steps)) % 2, 1, -1)
    sharpness = np.where(sharpness >= 50, 50 * swing, sharpness)
    return sharpness * np.exp(noise * np.random.default_rng(seed).standard_normal(len(steps)))


def labels(found):
    return [regime.label for regime in found]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05, 0.1])
def test_four_regimes_are_found_where_they_were_put(noise):
    for seed in range(5):
        found = regimes(DENSE, None, four_regimes(DENSE, noise, seed), 50.0)
        assert labels(found) == FOUR
        transient, saturation, sharpening, edge = found
        assert transient.first_step == 0
        assert 12 <= transient.last_step <= 30
        assert 400 <= saturation.last_step <= 640
        # The smoothed noise may touch 95 % of the threshold before the curve does.
        assert 500 * 10 ** (1 / 0.8) * (0.94 - noise) ** (1 / 0.8) <= edge.first_step <= 500 * 10 ** (1 / 0.8) * 1.1
        assert edge.last_step == DENSE[-1]
        assert transient.change == pytest.approx(0.25, rel=0.05 + 3 * noise)
        assert sharpening.rate == pytest.approx(2**0.8, rel=0.05 + noise)
        assert edge.ratio == pytest.approx(1.03, rel=0.01 + noise / 2)


def test_regular_records_find_them_too():
    steps = np.arange(0, 20001, 10)
    assert labels(regimes(steps, None, four_regimes(steps, 0.02), 50.0)) == FOUR


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
def test_a_constant_is_saturation_whatever_the_noise(noise):
    for seed in range(5):
        level = 5 * np.exp(noise * np.random.default_rng(seed).standard_normal(len(DENSE)))
        assert labels(regimes(DENSE, None, level, 50.0)) == ["saturation"]


@pytest.mark.parametrize("num", [8, 12])
def test_few_noisy_records_seldom_show_a_change(num):
    """Their own noise is known from a few differences only, so that now and then chance looks smooth."""
    right = 0
    for seed in range(40):
        level = 5 * np.exp(0.3 * np.random.default_rng(seed).standard_normal(num))
        right += labels(regimes(np.arange(num) * 100 + 100, None, level, 500.0)) == ["saturation"]
    assert right >= 36


@pytest.mark.parametrize(("octaves", "wanted"), [(0.5, []), (3.0, ["saturation"])])
def test_a_turning_point_is_no_saturation(octaves, wanted):
    steps = np.unique(np.geomspace(1, 20001, 400).astype(int)) - 1
    x = np.log2(1 + steps)
    level = np.exp(np.interp(x, [0, 6, 6 + octaves, 14], [2, 0, 0, 2]))
    found = regimes(steps, None, level, 500.0)
    assert labels(found) == ["transient", *wanted, "progressive sharpening"]


def test_every_record_belongs_to_one_regime():
    found = regimes(DENSE, None, four_regimes(DENSE, 0.1, 3), 50.0)
    place = {step: i for i, step in enumerate(DENSE.tolist())}
    spans = [(place[regime.first_step], place[regime.last_step]) for regime in found]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(DENSE) - 1
    assert all(after == before + 1 for (_, before), (after, _) in itertools.pairwise(spans))


def test_a_catapult_of_the_sharpness_is_part_of_the_transient():
    sharpness = np.full(len(DENSE), 2.0)
    sharpness[:6] = [10, 15, 22, 12, 5, 3]
    found = regimes(DENSE, None, sharpness, 8.0)
    assert labels(found) == ["transient", "saturation"]
    assert found[0].last_step in (5, 6, 7)


def test_a_late_fall_is_no_transient():
    sharpness = np.where(DENSE < 2000, 5.0, 5.0 * (np.maximum(DENSE, 1) / 2000) ** -1.0)
    assert labels(regimes(DENSE, None, sharpness, 50.0)) == ["saturation", "progressive flattening"]


def test_an_early_fall_is_one_in_the_time_of_the_learning_rate():
    """At c = 0.01 the first thousand steps are early; at c = 1 they are not."""
    sharpness = 5.0 * np.exp(-np.clip(DENSE - 400, 0, 400) / 300)
    assert labels(regimes(DENSE, None, sharpness, 1000.0))[0] == "transient"
    assert labels(regimes(DENSE, None, sharpness, 10.0))[:2] == ["saturation", "progressive flattening"]


def test_time_is_the_sum_over_a_schedule():
    """λ falls from step 1000 on. At η = 0.02 that is late, with a warm-up, too; at η = 0.0004 it is early."""
    steps = np.arange(0, 2000, 5)
    sharpness = np.where(steps < 1000, 10.0, 10 * np.exp(-(steps - 1000) / 500))
    late = ["saturation", "progressive flattening"]
    warming = np.minimum(steps / 200, 1)
    with np.errstate(divide="ignore"):
        assert labels(regimes(steps, None, sharpness, 2 / (0.02 * warming))) == late
        found = regimes(steps, None, sharpness, 2 / (0.0004 * warming))
    # λ_0 Σ η = 10 · 0.0004 · (begin − 100); the fit may see the fall a little before.
    assert labels(found)[0] == "transient"
    begin, time = (float(found[0].reason.split(word)[1].split()[0]) for word in ("from step ", "τ = "))
    assert begin == pytest.approx(1000, abs=60)
    assert time == pytest.approx(10 * 0.0004 * (begin - 100), rel=0.01)


def test_time_counts_the_steps_before_the_first_record():
    steps = 400 + np.arange(0, 1000, 5)
    sharpness = 10 * np.exp(-np.arange(200) / 50)
    assert labels(regimes(steps, None, sharpness, 2 / 0.002))[0] == "transient"
    assert labels(regimes(steps, None, sharpness, 2 / 0.003))[0] == "progressive flattening"


def test_a_fall_through_the_threshold_is_not_the_edge():
    sharpness = 12.0 * np.exp(-np.arange(60) / 4) + 2.0
    found = regimes(np.arange(60), None, sharpness, 8.0)
    assert labels(found) == ["transient", "saturation"]


def test_the_edge_needs_steps_and_records():
    near = np.full(60, 2.0)
    near[30:34] = 8.0
    assert "edge of stability" not in labels(regimes(np.arange(60), None, near, 8.0))
    near[30:50] = 8.0
    assert "edge of stability" in labels(regimes(np.arange(60), None, near, 8.0))


def test_dips_do_not_end_the_edge_but_a_lower_threshold_does():
    steps = np.arange(2000)
    sharpness = np.full(2000, 10.1)
    sharpness[500:503] = 7.0
    assert labels(regimes(steps, None, sharpness, 10.0)) == ["edge of stability"]
    threshold = np.where(steps < 1000, 10.0, 30.0)  # the learning rate falls to a third
    found = regimes(steps, None, sharpness, threshold)
    assert labels(found) == ["edge of stability", "saturation"]
    assert found[1].first_step in range(998, 1003)


def test_the_edge_of_a_warming_learning_rate_follows_the_threshold():
    steps = np.arange(1, 2000)
    threshold = 2e4 / steps
    found = regimes(steps, None, np.minimum(threshold * 1.02, 50.0), threshold)
    assert labels(found)[-1] == "edge of stability"
    assert found[-1].first_step == pytest.approx(2e4 / 50 * 0.95, rel=0.05)
    assert found[-1].change < 0.3


def test_without_a_threshold_there_is_no_edge():
    found = regimes(DENSE, None, four_regimes(DENSE), None)
    assert "edge of stability" not in labels(found)
    assert labels(found)[:3] == FOUR[:3]
    assert math.isnan(found[0].ratio)


def test_the_loss_is_reported_and_decides_nothing():
    sharpness = four_regimes(DENSE)
    loss = 1.0 / (1 + DENSE)
    loss[-20::2] *= 1.5
    with_loss = regimes(DENSE, loss, sharpness, 50.0)
    without = regimes(DENSE, None, sharpness, 50.0)
    assert [(r.label, r.first_step, r.last_step) for r in with_loss] == [
        (r.label, r.first_step, r.last_step) for r in without
    ]
    assert with_loss[0].loss[0] == 1.0
    assert with_loss[0].rises == 0.0
    assert with_loss[-1].rises > 0
    assert math.isnan(without[0].rises)


# Runs known to be in a regime


def uv_run(F, L, Y, steps):
    """η λ along the exact dynamics of the UV model, with threshold 2, and the loss in its units."""
    sharpness, loss = [], []
    for _ in range(steps):
        sharpness.append(float(uv_sharpness(F, L, Y)))
        loss.append(0.5 * (F - Y) ** 2)
        F, L = uv_map(F, L, Y)
    return np.array(loss), np.array(sharpness)


@pytest.mark.parametrize("Y", [1.05, 1.1, 1.2, 1.5])
def test_the_uv_model_above_eta_c_sharpens_to_the_edge(Y):
    loss, sharpness = uv_run(0.0, 1e-3, Y, 4000)
    found = regimes(np.arange(4000), loss, sharpness, 2.0)
    assert labels(found)[-1] == "edge of stability"
    # The mean of η λ on the attractor is (3 + Y) / 2 while it has period 2. Beyond, the start is near the edge already:
    # its largest eigenvalue is the residual, η λ = Y.
    if Y < 1.23:
        assert "progressive sharpening" in labels(found)
        assert found[-1].ratio == pytest.approx((3 + Y) / 4, rel=0.02)


@pytest.mark.parametrize("Y", [0.1, 0.3, 0.5])
def test_the_uv_model_below_eta_c_sharpens_and_stays_below_the_edge(Y):
    loss, sharpness = uv_run(0.0, 0.1, Y, 4000)
    assert labels(regimes(np.arange(4000), loss, sharpness, 2.0))[-2:] == ["progressive sharpening", "saturation"]


def test_the_uv_model_with_a_large_output_has_a_transient():
    """Gradient flow lowers λ where the output lies outside [0, y]."""
    loss, sharpness = uv_run(0.7, 1.5, 0.05, 2000)
    found = regimes(np.arange(2000), loss, sharpness, 2.0)
    assert labels(found) == ["transient", "saturation"]
    assert found[0].change < 0.7


def test_a_network_on_shuffled_labels_trains_at_the_edge():
    inputs, labelled = digit_examples(60)
    shuffled = one_hot(labelled[torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    model = fully_connected(3, 32, activation=torch.nn.Tanh, seed=0)
    objective = Objective.supervised(model, half_squares, (inputs, shuffled))
    run = descend(model, objective, torch.optim.SGD(model.parameters(), lr=0.6), 1500, measure_every=15)
    found = regimes(run["step"], run["loss"], run["sharpness"], 2 / 0.6)
    assert labels(found)[-1] == "edge of stability"
    assert "progressive sharpening" in labels(found)
    assert found[-1].ratio == pytest.approx(1.0, abs=0.1)


# From a trajectory


@pytest.fixture
def trajectory(tmp_path):
    with Trajectory.open(tmp_path / "run") as table:
        for step, value in zip(DENSE.tolist(), four_regimes(DENSE).tolist(), strict=True):
            rows = [Row("sharpness", value), Row("loss", 1 / (1 + step)), Row("threshold_ratio", value / 50)]
            if step % 2 == 0 or step > 50:
                rows.append(Row("stability_threshold", 50.0))
            table.record(step, rows)
        yield table


def test_a_trajectory_gives_its_rows(trajectory):
    found = regimes(trajectory)
    assert labels(found) == FOUR
    assert found[0].loss[0] == 1.0
    kept = (DENSE % 2 == 0) | (DENSE > 50)
    plain = regimes(DENSE[kept], 1 / (1 + DENSE[kept]), four_regimes(DENSE)[kept], 50.0)
    assert found == plain
    assert labels(regimes(trajectory, sharpness="threshold_ratio", threshold=1.0)) == FOUR
    assert labels(regimes(trajectory, loss=None, threshold=50)) == FOUR


def test_an_unknown_quantity_is_refused_with_those_near(trajectory):
    with pytest.raises(ValueError, match="near it: 'sharpness'"):
        regimes(trajectory, sharpness="sharpnes")
    with pytest.raises(TypeError, match="`loss` is .*the name of one of its quantities"):
        regimes(trajectory, loss=[1.0])


# Refusals


@pytest.mark.parametrize(
    ("steps", "sharpness", "threshold", "message"),
    [
        ([0, 1, 2, 3], [1, 1, 1, 1], 2.0, "`run` has 4 records with .* regimes need 5"),
        (range(8), [1] * 4 + [math.nan] * 4, 2.0, "`run` has 4 records with .* regimes need 5"),
        (range(6), [1] * 5, 2.0, r"`sharpness` has shape \[5\] for \[6\] steps"),
        ([0, 1, 1, 2, 3], [1] * 5, 2.0, "do not ascend"),
        (range(6), [1, 1, -0.5, 1, 1, 1], 2.0, "`sharpness` is -0.5 at step 2; it must be positive"),
        (range(6), [1] * 6, 0.0, "`threshold` is 0 at step 0"),
    ],
)
def test_records_that_tell_nothing_are_refused(steps, sharpness, threshold, message):
    with pytest.raises(ValueError, match=message):
        regimes(list(steps), None, sharpness, threshold)


def test_names_without_a_trajectory_are_refused():
    with pytest.raises(TypeError, match="`loss` is 'loss'; beside steps give numbers"):
        regimes([0, 1, 2, 3, 4])


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`edge` 0.7"):
        regimes(list(range(6)), None, [1.0] * 6, 2.0, edge=0.7)
    with pytest.raises(ValueError, match="`early` nan"):
        regimes(list(range(6)), None, [1.0] * 6, 2.0, early=math.nan)


def test_records_without_a_sharpness_are_left_out():
    sharpness = four_regimes(DENSE)
    sharpness[::7] = math.nan
    assert labels(regimes(DENSE, None, sharpness, 50.0)) == FOUR


def test_records_without_a_threshold_are_left_out():
    some = np.full(len(DENSE), 50.0)
    some[-40] = some[3] = math.nan
    kept, loss = ~np.isnan(some), 1.0 / (1 + DENSE)
    found = regimes(DENSE, loss, four_regimes(DENSE), some)
    assert labels(found) == FOUR
    assert found == regimes(DENSE[kept], loss[kept], four_regimes(DENSE)[kept], 50.0)
    assert labels(regimes(DENSE, None, four_regimes(DENSE), np.full(len(DENSE), math.nan)))[:3] == FOUR[:3]


def test_an_infinite_threshold_is_one():
    threshold = np.full(len(DENSE), 50.0)
    threshold[0] = math.inf
    found = regimes(DENSE, None, four_regimes(DENSE), threshold)
    assert labels(found) == FOUR
    assert found[0].first_step == 0
