"""The monitor measures what is due, remembers what it must, and leaves training bit for bit alone."""

import contextlib
import copy
import gc
import io
import math
import random
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from sharpscope.dynamics import monitor as monitor_module
from sharpscope.dynamics.measurements import (
    GradientCurvature,
    GradientNorm,
    Loss,
    StabilityThreshold,
    UpdateCurvature,
)
from sharpscope.dynamics.monitor import MeasurementFailedWarning, Monitor
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.spectra_measurements import BlockSpectra, BottomEigenvalue, Density, Sharpness, Trace
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.landscape.objective import Objective
from torch import nn

EVERYTHING = (
    Loss(),
    GradientNorm(),
    Sharpness(num=2),
    BottomEigenvalue(),
    Trace(num_probes=4),
    Density(num_steps=5, num_probes=2),
    BlockSpectra(num_steps=5, num_probes=1),
    GradientCurvature(),
    UpdateCurvature(),
    StabilityThreshold(),
)
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}


@dataclass(frozen=True)
class Probe:
    """Calls `function(point)` and records its value."""

    function: Any = field(default=lambda point: point.step, repr=False)
    every: int | None = None
    name: str = "probe"

    def measure(self, point):
        yield Row(self.name, self.function(point))


@pytest.fixture
def trajectory(tmp_path):
    with Trajectory.open(tmp_path / "run") as opened:
        yield opened


def noisy_run(make_optimizer) -> tuple:
    """A model with batch statistics and dropout, its data and its optimizer, all from one seed."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
    data = torch.randn(24, 3), torch.randint(0, 2, (24,))
    return model, data, make_optimizer(model.parameters())


def train(model, data, optimizer, num_steps, monitor=None, around_step=contextlib.nullcontext, forward=None):
    """Minibatch training that draws from all three random streams; the monitor is called within `around_step`."""
    forward = forward or contextlib.nullcontext
    model.train()
    for _ in range(num_steps):
        chosen = torch.from_numpy(np.random.permutation(24)[: random.randint(8, 16)])
        optimizer.zero_grad()
        with forward():
            loss = nn.functional.cross_entropy(model(data[0][chosen]), data[1][chosen])
        loss.backward()
        if monitor is not None:
            with around_step():
                monitor.step()
        optimizer.step()


def flattened(value) -> list:
    """Every leaf of nested containers, in order."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *flattened(value[key]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flattened(item)]
    return [value]


def traces(model, optimizer) -> list:
    """Whatever a monitor could have disturbed."""
    state = copy.deepcopy(
        [
            model.state_dict(),
            [parameter.grad for parameter in model.parameters()],
            [parameter.requires_grad for parameter in model.parameters()],
            [module.training for module in model.modules()],
            [sorted(module.__dict__) for module in model.modules()],
            optimizer.state_dict(),
        ]
    )
    streams = [torch.get_rng_state(), list(np.random.get_state(legacy=True)), random.getstate()]
    switches = [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()]
    return flattened([state, streams, switches])


def assert_identical(first: list, second: list):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, np.ndarray):
            assert np.array_equal(a, b)
        else:
            assert a == b


BLOCK_QUANTITIES = ("sharpness", "effective_rank", "negative_mass")
HETEROGENEITY_QUANTITIES = ("max", "linear", "scale_ratio", "scale_spread")


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, autocast])
def test_training_is_bit_identical_with_everything_measured(make_optimizer, around, trajectory):
    forward = autocast if around is autocast else None
    model, data, optimizer = noisy_run(make_optimizer)
    train(model, data, optimizer, 6, forward=forward)
    expected = traces(model, optimizer)

    model, data, optimizer = noisy_run(make_optimizer)
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    monitor = Monitor(objective, optimizer, EVERYTHING, trajectory, every=2)
    train(model, data, optimizer, 6, monitor, around, forward)
    with around():
        monitor.close()
    assert_identical(traces(model, optimizer), expected)

    quantities = {m.name for m in EVERYTHING} | {f"block_{kind}" for kind in BLOCK_QUANTITIES}
    quantities |= {f"heterogeneity_{kind}" for kind in HETEROGENEITY_QUANTITIES}
    if not isinstance(optimizer, torch.optim.SGD):
        quantities.remove("stability_threshold")
    assert set(trajectory.quantities()) == quantities
    assert trajectory.steps() == [0, 2, 4, 6]
    assert not trajectory.to_pandas()["value"].isna().any()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, autocast])
def test_numbers_do_not_depend_on_the_context_of_the_loop(around, trajectory):
    model, data, optimizer = noisy_run(OPTIMIZERS["sgd"])
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    measurements = [Loss(), GradientNorm(), Sharpness()]
    plain = Monitor(objective, optimizer, measurements, trajectory).step()
    with around():
        inside = Monitor(objective, optimizer, measurements, trajectory).step()
    assert [(row.quantity, row.value, row.error) for row in inside] == [
        (row.quantity, row.value, row.error) for row in plain
    ]


def test_live_gradients_stay_the_same_objects(trajectory):
    model, data, optimizer = noisy_run(OPTIMIZERS["sgd"])
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    before = [parameter.grad for parameter in model.parameters()]
    Monitor(objective, optimizer, EVERYTHING, trajectory).step()
    assert all(parameter.grad is found for parameter, found in zip(model.parameters(), before, strict=True))


def quadratic(start=(1.0, 1.0)):
    """x ↦ (x₀² + 3 x₁²)/2 with its live tensor: Hessian diag(1, 3)."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    return Objective.from_closure(lambda x: (scale * x**2).sum() / 2, [x]), x


def descend(monitor, x, optimizer, num_steps):
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    for _ in range(num_steps):
        x.grad = scale * x.detach()
        monitor.step()
        optimizer.step()


def test_what_is_due_and_the_final_point(trajectory):
    objective, x = quadratic()
    optimizer = torch.optim.SGD([x], lr=0.1)
    measurements = [Probe(every=2, name="twos"), Probe(every=3, name="threes"), Probe(name="default")]
    with Monitor(objective, optimizer, measurements, trajectory, every=4) as monitor:
        descend(monitor, x, optimizer, 7)
        assert monitor.next_step == 7
    assert trajectory.series("twos").steps.tolist() == [0, 2, 4, 6, 7]
    assert trajectory.series("threes").steps.tolist() == [0, 3, 6, 7]
    assert trajectory.series("default").steps.tolist() == [0, 4, 7]
    assert all(trajectory.is_complete(step) for step in trajectory.steps())


def test_step_t_means_the_weights_after_t_updates(trajectory):
    objective, x = quadratic((1.0, 0.0))
    optimizer = torch.optim.SGD([x], lr=0.5)
    with Monitor(objective, optimizer, [Loss()], trajectory) as monitor:
        descend(monitor, x, optimizer, 4)
    # x halves at each update, so that the loss x²/2 falls by 4: exact in binary.
    assert trajectory.series("loss").values.tolist() == [0.5 / 4**t for t in range(5)]


def test_step_returns_its_rows(trajectory):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [Probe(lambda point: 7.0, every=2)], trajectory)
    assert [(row.quantity, row.value) for row in monitor.step()] == [("probe", 7.0)]
    assert monitor.step() == []


def test_an_exception_in_the_loop_is_not_masked_and_nothing_is_measured(trajectory):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [Probe()], trajectory)

    def loop():
        with monitor:
            monitor.step()
            raise KeyError("from the loop")

    with pytest.raises(KeyError, match="from the loop"):
        loop()
    assert trajectory.steps() == [0]
    assert monitor.close() == []
    with pytest.raises(RuntimeError, match="closed"):
        monitor.step()


def test_values_are_computed_once_for_all_measurements_of_a_point(trajectory, monkeypatch):
    objective, _ = quadratic()
    calls = []
    original = objective.gradient
    monkeypatch.setattr(objective, "gradient", lambda: calls.append(1) or original())
    Monitor(objective, None, [GradientNorm(), GradientCurvature(), Sharpness()], trajectory).step()
    assert len(calls) == 1


def test_graphs_of_a_step_are_freed_at_once(trajectory):
    """A reference cycle would keep the double-backward graphs of many steps until the garbage collector runs."""
    objective, _ = quadratic()
    held = []

    def curvature(point):
        held.append(weakref.ref(point.hessian()))
        return float((point.hessian() @ point.gradient()).sum())

    gc.disable()
    try:
        Monitor(objective, None, [Probe(curvature), Sharpness()], trajectory).step()
        assert held[0]() is None
    finally:
        gc.enable()


def test_update_is_the_last_change_and_only_kept_when_asked_for(trajectory):
    objective, x = quadratic((1.0, 0.0))
    optimizer = torch.optim.SGD([x], lr=0.5)
    updates = []

    class Watcher(Probe):
        needs_update = True

    def watch(point):
        updates.append(None if point.update is None else point.update.tolist())
        return 0.0

    with Monitor(objective, optimizer, [Watcher(watch, every=2)], trajectory) as monitor:
        descend(monitor, x, optimizer, 3)
        assert monitor.state_dict()["previous"].tolist() == [0.25, 0.0]
    assert updates == [None, [-0.25, 0.0], [-0.125, 0.0]]

    plain = Monitor(objective, optimizer, [Probe()], trajectory)
    plain.load_state_dict(monitor.state_dict())
    plain.step()
    assert plain.state_dict()["previous"] is None


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def without_times(trajectory):
    return trajectory.to_pandas().drop(columns=["seconds"])


@pytest.mark.parametrize("killed_at", [2, 3])
def test_a_resumed_run_repeats_the_very_same_numbers(killed_at, tmp_path):
    def start(folder):
        model, data, optimizer = noisy_run(OPTIMIZERS["sgd"])
        objective = Objective.supervised(model, nn.functional.cross_entropy, data)
        trajectory = Trajectory.open(tmp_path / folder)
        return model, data, optimizer, trajectory, Monitor(objective, optimizer, EVERYTHING, trajectory, every=2)

    model, data, optimizer, trajectory, monitor = start("undisturbed")
    train(model, data, optimizer, 6, monitor)
    monitor.close()
    expected = without_times(trajectory)

    model, data, optimizer, trajectory, monitor = start("killed")
    train(model, data, optimizer, killed_at, monitor)
    saved = saved_and_loaded(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "monitor": monitor.state_dict(),
            "torch": torch.get_rng_state(),
        }
    )
    streams = np.random.get_state(), random.getstate()
    train(model, data, optimizer, 2, monitor)  # work that the kill undoes
    trajectory.record(99, [Row("loss", 0.0)])
    trajectory.close()

    model, data, optimizer, trajectory, monitor = start("killed")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    monitor.load_state_dict(saved["monitor"])
    torch.set_rng_state(saved["torch"])
    np.random.set_state(streams[0])
    random.setstate(streams[1])
    train(model, data, optimizer, 6 - killed_at, monitor)
    monitor.close()
    assert without_times(trajectory).equals(expected)


def test_saved_state_is_no_alias_of_the_live_one(trajectory):
    objective, x = quadratic()
    optimizer = torch.optim.SGD([x], lr=0.1)
    monitor = Monitor(objective, optimizer, [Sharpness(), UpdateCurvature()], trajectory)
    descend(monitor, x, optimizer, 2)
    saved = monitor.state_dict()
    kept = copy.deepcopy(saved)
    descend(monitor, x, optimizer, 2)
    assert_identical(flattened(saved), flattened(kept))
    monitor.load_state_dict(saved)
    descend(monitor, x, optimizer, 2)
    assert_identical(flattened(saved), flattened(kept))


class Clock:
    """Time that passes only when told."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor_module, "perf_counter", clock)
    return clock


def a_second(clock):
    def slow(point):
        clock.now += 1.0
        return point.step

    return Probe(slow, name="slow")


def test_overhead_is_capped_by_a_longer_spacing(trajectory, clock):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [a_second(clock), Loss()], trajectory, max_overhead=0.25)
    for _ in range(200):
        monitor.step()
        clock.now += 0.5  # training
        assert monitor.overhead <= 0.25 or len(trajectory.series("slow").steps) == 1
    measured = trajectory.series("slow").steps
    # 1 s of measuring for 3 s of training, which is 6 steps, and a little more than that: 8. The second waits until
    # both are paid for, which is at step 12.
    assert measured[:2].tolist() == [0, 12]
    assert (measured[2:] % 8 == 0).all()
    assert set(np.diff(measured)[-10:]) == {8}
    assert monitor.cadence == {"slow": 8, "loss": 1}
    # One row where the spacing changed, none for what was left out meanwhile; the count of that stands at the end.
    assert trajectory.series("cadence", "slow")[:2] == ([13], [8.0])
    assert "skipped" not in trajectory.quantities()
    assert monitor.skipped["slow"] == 200 - len(measured)
    assert len(trajectory.series("loss").steps) == 200 - monitor.skipped["loss"]
    assert monitor.skipped["loss"] < 12  # until the first of the slow one is paid for
    monitor.close()
    assert trajectory.series("slow").steps[-1] == 200
    assert trajectory.series("skipped", "slow")[:2] == ([200], [200.0 - len(measured)])


def test_the_cadence_survives_a_kill(tmp_path, clock):
    """Killed at any step, the resumed run measures at the same steps as the one left alone."""

    def run(folder, kill=None):
        clock.now = 0.0
        objective, _ = quadratic()
        trajectory = Trajectory.open(tmp_path / folder)
        monitor = Monitor(objective, None, [a_second(clock), Loss()], trajectory, max_overhead=0.25)
        for step in range(60):
            if step == kill:
                saved = saved_and_loaded(monitor.state_dict())
                clock.now += 1e6  # the time between two processes is nobody's
                monitor = Monitor(objective, None, [a_second(clock), Loss()], trajectory, max_overhead=0.25)
                monitor.load_state_dict(saved)
                assert monitor.overhead == pytest.approx(saved["measuring"] / saved["elapsed"])
            monitor.step()
            clock.now += 0.5
        monitor.close()
        return trajectory.to_pandas(costs=False), monitor

    expected, alone = run("alone")
    for kill in (1, 12, 13, 30):
        table, resumed = run(f"killed-{kill}", kill)
        assert table.equals(expected)
        assert (resumed.cadence, resumed.skipped) == (alone.cadence, alone.skipped)


def test_a_state_from_before_there_were_spacings_is_read(trajectory, clock):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [a_second(clock)], trajectory, max_overhead=0.25)
    monitor.step()
    state = monitor.state_dict()
    del state["cadence"]
    monitor.load_state_dict(state | {"version": 1, "costs": {"slow": 3.0}})
    assert monitor.state_dict()["cadence"] == {"factors": {"slow": 1}, "costs": {"slow": 3.0}, "counts": {"slow": 1}}


def diverge_at(*steps):
    def value(point):
        if point.step in steps:
            raise ValueError("the loss of batch 3 is nan")
        point.state["count"] = point.state.get("count", 0) + 1
        return point.state["count"]

    return value


def test_a_late_failure_leaves_a_nan_row_and_one_warning(trajectory):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [Probe(diverge_at(2, 3)), Loss()], trajectory)
    monitor.step()
    monitor.step()
    with pytest.warns(MeasurementFailedWarning, match=r"'probe' failed at step 2 .* batch 3 is nan") as caught:
        monitor.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step()  # fails for the same reason: said already
        monitor.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    table = trajectory.to_pandas().query("quantity == 'probe'")
    assert table["converged"].tolist() == [True, True, False, False, True]
    np.testing.assert_array_equal(table["value"], [1, 2, math.nan, math.nan, 3])  # failures left its state alone
    assert len(trajectory.series("loss").steps) == 5


def test_a_diverged_run_trains_on_and_says_which_batch(trajectory):
    model = nn.Linear(2, 1)
    batches = [(torch.ones(4, 2), torch.ones(4, 1)), (torch.ones(4, 2), torch.ones(4, 1))]
    objective = Objective.supervised(model, nn.functional.mse_loss, batches)
    monitor = Monitor(objective, None, [Loss(), Sharpness()], trajectory)
    monitor.step()
    with torch.no_grad():
        model.weight.fill_(math.inf)
    with pytest.warns(MeasurementFailedWarning, match="loss of batch 0 is (nan|inf)"):
        monitor.step()
    assert math.isnan(trajectory.series("loss").values[1])


def test_a_first_failure_raises_and_names_the_measurement(trajectory):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [Probe(diverge_at(0))], trajectory)
    with pytest.raises(ValueError, match="batch 3") as caught:
        monitor.step()
    assert caught.value.__notes__ == ["while measuring 'probe' at step 0"]
    assert trajectory.steps() == []


def test_on_error_raise_stops_at_any_failure(trajectory):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [Probe(diverge_at(1))], trajectory, on_error="raise")
    monitor.step()
    with pytest.raises(ValueError, match="batch 3"):
        monitor.step()
    monitor.step()
    assert trajectory.series("probe").steps.tolist() == [0, 2]


def test_a_second_run_does_not_mix_into_the_first(trajectory):
    objective, _ = quadratic()
    first = Monitor(objective, None, [Probe()], trajectory)
    for _ in range(3):
        first.step()
    second = Monitor(objective, None, [Probe()], trajectory)
    with pytest.raises(ValueError, match=r"already reaches step 2 .*discard_after\(-1\)"):
        second.step()
    trajectory.discard_after(-1)
    second.step()
    assert trajectory.steps() == [0]


def test_two_monitors_share_a_trajectory(trajectory):
    objective, _ = quadratic()
    first = Monitor(objective, None, [Probe(name="train")], trajectory)
    second = Monitor(objective, None, [Probe(name="test")], trajectory)
    for _ in range(3):
        first.step()
        second.step()
    states = first.state_dict(), second.state_dict()
    first, second = (Monitor(objective, None, [Probe(name=name)], trajectory) for name in ("train", "test"))
    first.load_state_dict(states[0])
    second.load_state_dict(states[1])
    first.step()
    second.step()
    assert trajectory.series("train").steps.tolist() == trajectory.series("test").steps.tolist() == [0, 1, 2, 3]


def test_a_foreign_optimizer_is_noticed(trajectory):
    objective, x = quadratic()
    other = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    with pytest.warns(UserWarning, match="trains none of the objective's parameters"):
        Monitor(objective, other, [Loss()], trajectory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Monitor(objective, torch.optim.SGD([x], lr=0.1), [Loss()], trajectory)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"measurements": Loss()}, TypeError, "pass a list"),
        ({"measurements": [Loss]}, TypeError, r"write Loss\(\)"),
        ({"measurements": ["loss"]}, TypeError, "'loss'"),
        ({"measurements": [Loss(), Loss(every=5)]}, ValueError, "two named 'loss'"),
        ({"measurements": [Loss(every=0)]}, ValueError, "`every of 'loss'` is 0"),
        ({"measurements": [Loss(every=2.5)]}, TypeError, "`every of 'loss'` is 2.5"),
        ({"every": -1}, ValueError, "`every` is -1"),
        ({"max_overhead": 10}, ValueError, "`max_overhead` is 10"),
        ({"on_error": "ignore"}, ValueError, "`on_error` is 'ignore'"),
        ({"optimizer": 0.1}, TypeError, "`optimizer` is a float"),
        ({"trajectory": "runs/a"}, TypeError, r"Trajectory.open\(path\)"),
    ],
)
def test_bad_arguments(arguments, error, message, trajectory):
    objective, _ = quadratic()
    good = {"optimizer": None, "measurements": [Loss()], "trajectory": trajectory}
    with pytest.raises(error, match=message):
        Monitor(objective, **(good | arguments))


def test_rows_and_state_of_a_measurement_are_checked(trajectory):
    objective, _ = quadratic()

    @dataclass(frozen=True)
    class Bad(Probe):
        def measure(self, point):
            return self.function(point)

    with pytest.raises(TypeError, match=r"'probe' yielded 3\.0"):
        Monitor(objective, None, [Bad(lambda point: [3.0])], trajectory).step()
    with pytest.raises(TypeError, match="'probe' keeps 'history': list"):
        Monitor(objective, None, [Bad(lambda point: point.state.update(history=[]) or [])], trajectory).step()


def test_bad_states(trajectory):
    objective, _ = quadratic()
    monitor = Monitor(objective, None, [Loss()], trajectory)
    good = monitor.state_dict()
    with pytest.raises(ValueError, match="`state` lacks"):
        monitor.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="newer than"):
        monitor.load_state_dict(good | {"version": 99})
    with pytest.raises(ValueError, match="7 parameters; the objective has 2"):
        monitor.load_state_dict(good | {"num_parameters": 7})
