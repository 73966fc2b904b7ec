"""Replay over stored weights: the same numbers as live, the model untouched, nothing measured twice."""

import copy
import math
import shutil
from dataclasses import dataclass, field

import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from sharpscope.dynamics.measurements import GradientNorm, Loss
from sharpscope.dynamics.monitor import Monitor
from sharpscope.dynamics.replay import replay
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.schema import TrajectoryError
from sharpscope.dynamics.spectra_measurements import Density, Sharpness
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.landscape.objective import Objective
from torch import nn

CALLS = []


@dataclass(frozen=True)
class SquaredNorm:
    """‖θ‖² of the whole model, for the price of three products; says when it is measured."""

    every: int | None = None
    scale: float = 1.0
    name: str = "squared_norm"

    def measure(self, point):
        CALLS.append(point.step)
        model = point.objective.model
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        point.state["times"] = point.state.get("times", 0) + 1
        yield Row(self.name, self.scale * (weights @ weights), products=3, arrays={"weights": weights})


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


@pytest.fixture
def trajectory(tmp_path):
    with Trajectory.open(tmp_path / "replayed") as opened:
        yield opened


def make_objective():
    """A small network with BatchNorm, whose buffers belong to a checkpoint too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = (torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,)))
    model(data[0])
    return Objective.supervised(model, nn.CrossEntropyLoss(), data)


@pytest.fixture
def objective():
    return make_objective()


def random_state(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t.clone()
        for name, t in model.state_dict().items()
    }


def squared_norm(model, state):
    return sum(float((state[name] ** 2).sum()) for name, _ in model.named_parameters())


@pytest.fixture
def folder(tmp_path, objective):
    """Three checkpoints, named so that only natural order is the order of steps."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    for step in (2, 9, 10):
        torch.save({"model": random_state(objective.model, step), "step": step}, path / f"{step}.pt")
    return path


def snapshot(model):
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def unchanged(model, before):
    return all(torch.equal(t, before[name]) for name, t in [*model.named_parameters(), *model.named_buffers()])


# The numbers


def test_a_folder_gives_the_numbers_at_its_weights(objective, folder, trajectory):
    result = replay(objective, folder, [SquaredNorm()], trajectory)
    assert (result.measured, result.cached, result.failed, result.products) == ([2, 9, 10], [], [], 9)
    assert CALLS == [2, 9, 10]
    steps, values, _ = trajectory.series("squared_norm")
    expected = [squared_norm(objective.model, random_state(objective.model, step)) for step in (2, 9, 10)]
    assert steps.tolist() == [2, 9, 10]
    assert values.tolist() == pytest.approx(expected, rel=1e-14)
    assert all(trajectory.is_complete(step) for step in steps.tolist())


@pytest.mark.parametrize("kind", ["glob", "files", "safetensors", "pairs", "mapping", "generator"])
def test_every_form_of_checkpoints_gives_the_same(objective, folder, trajectory, kind):
    states = {step: random_state(objective.model, step) for step in (2, 9, 10)}
    for step, state in states.items():
        safetensors.torch.save_file(state, folder / f"step_{step}.safetensors")
    forms = {
        "glob": str(folder / "*.pt"),
        "files": [folder / "2.pt", str(folder / "9.pt"), folder / "10.pt"],
        "safetensors": folder / "*.safetensors",
        "pairs": list(states.items()),
        "mapping": states,
        "generator": (pair for pair in states.items()),
    }
    replay(objective, forms[kind], [SquaredNorm()], trajectory)
    expected = [squared_norm(objective.model, state) for state in states.values()]
    assert trajectory.series("squared_norm").values.tolist() == pytest.approx(expected, rel=1e-14)


def test_replay_equals_the_live_monitor(tmp_path, objective):
    model, data = objective.model, (torch.randn(30, 4).double(), torch.randint(0, 3, (30,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    measurements = [Loss(), GradientNorm(), Sharpness(tol=1e-8, num=2), Density(num_steps=5, num_probes=2)]
    checkpoints = []
    with Trajectory.open(tmp_path / "live") as live:
        with Monitor(objective, optimizer, measurements, live) as monitor:
            for step in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(data[0]), data[1]).backward()
                # Here, since the forward pass has moved the running statistics that the monitor sees.
                checkpoints.append((step, copy.deepcopy(model.state_dict())))
                monitor.step()
                optimizer.step()
            checkpoints.append((4, copy.deepcopy(model.state_dict())))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        with Trajectory.open(tmp_path / "replayed") as replayed:
            replay(objective, checkpoints, measurements, replayed)
            columns = ["step", "quantity", "block", "index", "converged"]
            pd.testing.assert_frame_equal(live.to_pandas()[columns], replayed.to_pandas()[columns])
            for quantity in ("loss", "gradient_norm", "density"):  # the same arithmetic at the same weights
                assert live.series(quantity).values.tolist() == replayed.series(quantity).values.tolist()
            for index in (0, 1):  # residual bounds of 1e-8 relative
                ours, theirs = (t.series("sharpness", index=index).values for t in (live, replayed))
                assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-7)
            nodes = [t.arrays(2, "density")["nodes"] for t in (live, replayed)]
            torch.testing.assert_close(*nodes, rtol=0, atol=0)


def test_measurements_remember_from_checkpoint_to_checkpoint(objective, folder, trajectory):
    seen = []

    @dataclass(frozen=True)
    class Remembering(SquaredNorm):
        name: str = "remembering"

        def measure(self, point):
            yield from super().measure(point)
            seen.append(point.state["times"])

    replay(objective, folder, [SquaredNorm(), Remembering()], trajectory)
    assert seen == [1, 2, 3]


# Leaving the model as found


def test_the_model_is_left_as_found_to_the_last_bit(objective, folder, trajectory):
    model = objective.model
    model.train()
    model[0].weight.grad = torch.ones(6, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[3].bias[0] = math.nan
    before, rng = snapshot(model), torch.get_rng_state()
    bits = {name: t.view(torch.int64) for name, t in before.items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    replay(objective, folder, [SquaredNorm(), Loss()], trajectory)
    assert all(torch.equal(t.view(torch.int64), bits[name]) for name, t in snapshot(model).items())
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(module.training for module in model.modules())
    assert model[0].weight.grad.eq(1).all()
    assert model[3].bias.grad is None
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_found_after_an_exception(objective, folder, trajectory, error):
    class Failing:
        name, every = "failing", None

        def measure(self, point):
            raise error("stop")

    before = snapshot(objective.model)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            replay(objective, folder, [Failing()], trajectory)
    else:
        assert len(replay(objective, folder, [Failing()], trajectory).failed) == 3
    assert unchanged(objective.model, before)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_replay_works_inside_any_context(objective, folder, trajectory, around):
    before = snapshot(objective.model)
    with around():
        result = replay(objective, folder, [GradientNorm()], trajectory)
    assert result.failed == []
    assert unchanged(objective.model, before)


def test_a_live_run_may_be_measured_while_it_trains(objective, trajectory):
    """A generator that trains between its yields keeps what it trained."""
    model = objective.model

    def train():
        for step in range(3):
            yield step, model.state_dict()
            with torch.no_grad():
                model[0].weight += 1.0

    start = model[0].weight.detach().clone()
    replay(objective, train(), [SquaredNorm()], trajectory)
    assert torch.equal(model[0].weight, start + 1 + 1 + 1)
    values = trajectory.series("squared_norm").values
    rest = squared_norm(model, model.state_dict()) - float((model[0].weight.detach() ** 2).sum())
    assert values.tolist() == pytest.approx([rest + float(((start + i) ** 2).sum()) for i in range(3)], rel=1e-13)


# Bad checkpoints


def test_bad_checkpoints_are_reported_and_skipped(objective, folder, trajectory):
    (folder / "1.pt").write_bytes(b"garbage")
    torch.save({"model": {"x": torch.zeros(3)}}, folder / "5.pt")
    torch.save(objective.model, folder / "6.pt")
    torch.save({"model": random_state(objective.model, 0)}, folder / "final.pt")
    result = replay(objective, folder, [SquaredNorm()], trajectory)
    assert result.measured == [2, 9, 10]
    assert [path for path, _ in result.failed] == [str(folder / f"{name}.pt") for name in (1, 5, 6, "final")]
    expected = ["refused", "not a checkpoint of this model", "or holds a torch.nn", "there is no step"]
    assert all(text in reason for text, (_, reason) in zip(expected, result.failed, strict=True))


def test_a_checkpoint_of_nan_weights_is_reported_and_the_others_are_measured(objective, trajectory):
    states = {step: random_state(objective.model, step) for step in (1, 2, 3)}
    states[2]["0.weight"][0, 0] = math.nan
    result = replay(objective, states, [Loss(), SquaredNorm()], trajectory)
    ((label, reason),) = result.failed
    assert label == "step 2"
    assert "measuring 'loss' failed: ValueError" in reason
    assert result.measured == [1, 2, 3]
    assert [math.isnan(v) for v in trajectory.series("loss").values] == [False, True, False]
    table = trajectory.to_pandas().set_index(["step", "quantity"])
    assert not table.loc[(2, "loss"), "converged"]
    assert [trajectory.is_complete(step) for step in (1, 2, 3)] == [True, False, True]
    again = replay(objective, states, [Loss(), SquaredNorm()], trajectory)
    assert (again.measured, again.cached) == ([], [1, 3])
    assert [label for label, _ in again.failed] == ["step 2"]


def test_two_files_of_one_step(objective, folder, trajectory):
    shutil.copy(folder / "2.pt", folder / "copy-of-2.pt")
    torch.save({"model": random_state(objective.model, 99), "step": 9}, folder / "other.pt")
    result = replay(objective, folder, [SquaredNorm()], trajectory)
    ((label, reason),) = result.failed
    assert label == str(folder / "other.pt")
    assert f"its step 9 is that of {folder / '9.pt'} too, with other weights; tell them apart with `step_of`" in reason
    assert CALLS == [2, 9, 10]


def test_step_of_decides(objective, folder, trajectory):
    result = replay(objective, folder, [SquaredNorm()], trajectory, step_of=lambda path: 100 * int(path.stem))
    assert result.measured == [200, 900, 1000]
    result = replay(objective, folder, [SquaredNorm()], trajectory, step_of=lambda path: {"2": 0}[path.stem])
    assert [reason for _, reason in result.failed] == [f"`step_of` failed for it: KeyError: '{i}'" for i in (9, 10)]
    ((_, reason),) = replay(objective, folder / "2.pt", [SquaredNorm()], trajectory, step_of=lambda path: -1).failed
    assert "the step is -1" in reason


def test_a_single_file_needs_no_step(objective, tmp_path, trajectory):
    torch.save(random_state(objective.model, 0), tmp_path / "best.pt")
    assert replay(objective, tmp_path / "best.pt", [SquaredNorm()], trajectory).measured == [0]


def test_key_is_passed_on(objective, trajectory):
    state = {"model": random_state(objective.model, 0), "ema": random_state(objective.model, 1)}
    replay(objective, [(0, state)], [SquaredNorm()], trajectory, key="ema")
    expected = squared_norm(objective.model, state["ema"])
    assert trajectory.series("squared_norm").values.tolist() == pytest.approx([expected])


# Live state dicts kept without a copy


@pytest.mark.parametrize("form", [list, dict, iter])
def test_state_dicts_that_alias_the_live_weights_are_refused(objective, trajectory, form):
    model, kept = objective.model, []
    for step in range(3):
        kept.append((step, model.state_dict()))
        with torch.no_grad():
            model[0].weight += 1.0
    with pytest.raises(ValueError, match=r"steps 0 and 1 that share their memory.*copy.deepcopy"):
        replay(objective, form(kept), [SquaredNorm()], trajectory)


def test_aliased_buffers_alone_are_refused_too(objective, trajectory):
    model = objective.model
    buffers = {name for name, _ in model.named_buffers()}
    kept = [(i, {n: t if n in buffers else t.clone() for n, t in model.state_dict().items()}) for i in range(2)]
    with pytest.raises(ValueError, match="share their memory"):
        replay(objective, kept, [SquaredNorm()], trajectory)


def test_equal_copies_are_no_aliases(objective, trajectory):
    state = random_state(objective.model, 0)
    for form in (list, iter):
        replay(objective, form([(0, copy.deepcopy(state)), (1, copy.deepcopy(state))]), [SquaredNorm()], trajectory)
    assert trajectory.steps() == [0, 1]
    assert CALLS == [0]  # the second is served by content


# The cache


def test_a_second_run_is_served_from_the_cache(objective, folder, trajectory):
    measurements = [SquaredNorm(), Sharpness()]
    replay(objective, folder, measurements, trajectory)
    table = trajectory.to_pandas()
    CALLS.clear()
    result = replay(make_objective(), folder, [Sharpness(every=5), SquaredNorm(every=7)], trajectory)
    assert (result.measured, result.cached, result.failed, result.products) == ([], [2, 9, 10], [], 0)
    assert CALLS == []
    pd.testing.assert_frame_equal(trajectory.to_pandas(), table, check_exact=True)
    weights = trajectory.arrays(9, "squared_norm")["weights"]
    assert float(weights @ weights) == trajectory.series("squared_norm").values[1]


def test_another_setting_or_datum_or_weight_is_measured_anew(objective, folder, trajectory):
    replay(objective, folder, [SquaredNorm()], trajectory)
    assert replay(objective, folder, [SquaredNorm(scale=2.0)], trajectory).measured == [2, 9, 10]
    assert replay(objective, folder, [SquaredNorm()], trajectory).cached == [2, 9, 10]
    other = make_objective()
    data = (torch.ones(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,)))
    other = Objective.supervised(other.model, nn.CrossEntropyLoss(), data)
    assert replay(other, folder, [SquaredNorm()], trajectory).measured == [2, 9, 10]
    state = random_state(objective.model, 9)
    state["1.running_mean"] += 1  # a buffer decides the loss as much as a weight
    torch.save({"model": state, "step": 9}, folder / "9.pt")
    result = replay(objective, folder, [SquaredNorm()], trajectory)
    assert (result.measured, result.cached) == ([9], [2, 10])


def test_an_interrupted_replay_goes_on_where_it_stopped(objective, folder, trajectory):
    @dataclass(frozen=True)
    class Interrupted:
        name: str = "interrupted"
        every: int | None = None
        stops: list = field(default_factory=lambda: [9], repr=False)

        def measure(self, point):
            if point.step in self.stops:
                raise KeyboardInterrupt
            yield Row(self.name, float(point.step), products=1)

    with pytest.raises(KeyboardInterrupt):
        replay(objective, folder, [SquaredNorm(), Interrupted()], trajectory)
    assert CALLS == [2, 9]
    assert not trajectory.is_complete(9)
    result = replay(objective, folder, [SquaredNorm(), Interrupted(stops=[])], trajectory)
    assert CALLS == [2, 9, 10]  # what was measured at 9 before the interruption is kept
    assert trajectory.series("interrupted").values.tolist() == [2.0, 9.0, 10.0]
    assert result.measured[-1] == 10


def test_rows_of_other_weights_do_not_linger(objective, trajectory):
    @dataclass(frozen=True)
    class Several:
        num: int
        name: str = "several"
        every: int | None = None

        def measure(self, point):
            yield from (Row(self.name, float(i), index=i) for i in range(self.num))

    replay(objective, {0: random_state(objective.model, 0)}, [Several(3)], trajectory)
    replay(objective, {0: random_state(objective.model, 1)}, [Several(1)], trajectory)
    assert trajectory.indices("several") == [0]


def test_a_measurement_whose_settings_cannot_be_told_is_never_cached(objective, folder, trajectory):
    class Opaque:
        name, every = "opaque", None

        def measure(self, point):
            CALLS.append(point.step)
            yield Row("opaque", 1.0)

    @dataclass(frozen=True)
    class Long:
        vector: torch.Tensor = field(default_factory=lambda: torch.zeros(5000))
        name: str = "long"
        every: int | None = None

        def measure(self, point):
            yield Row("long", 1.0)

    for _ in range(2):
        assert replay(objective, folder, [Opaque(), Long()], trajectory).measured == [2, 9, 10]
    assert CALLS == [2, 9, 10] * 2


# Bad arguments


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        ([], ValueError, "`checkpoints` is empty; give a folder"),
        ({}, ValueError, "`checkpoints` is empty"),
        (3, TypeError, "`checkpoints` is a int"),
        ([3], TypeError, "`checkpoints` holds a int"),
        ({"weight": torch.zeros(1)}, TypeError, "`checkpoints` holds a tuple"),
        ([("a", {})], TypeError, "names the step 'a'"),
        ([(-1, {})], ValueError, "names the step -1"),
    ],
)
def test_bad_checkpoints_argument(objective, trajectory, checkpoints, error, message):
    with pytest.raises(error, match=message):
        replay(objective, checkpoints, [SquaredNorm()], trajectory)


def test_an_objective_without_a_model_is_refused(trajectory):
    objective = Objective.from_closure(lambda x: (x**2).sum(), torch.ones(2))
    with pytest.raises(ValueError, match="`objective` has no model"):
        replay(objective, {0: {}}, [SquaredNorm()], trajectory)


def test_a_sharded_model_is_refused(objective, trajectory, monkeypatch):
    monkeypatch.setitem(replay.__globals__, "sharding_group", lambda model: object())
    with pytest.raises(ValueError, match="sharded model"):
        replay(objective, {0: {}}, [SquaredNorm()], trajectory)


def test_two_measurements_of_one_name_are_refused(objective, folder, trajectory):
    with pytest.raises(ValueError, match="two named 'squared_norm'"):
        replay(objective, folder, [SquaredNorm(), SquaredNorm(scale=2.0)], trajectory)


def test_a_trajectory_that_cannot_be_written_stops_the_replay(objective, folder, trajectory):
    trajectory.record(0)
    before = snapshot(objective.model)
    with Trajectory.open(trajectory.path, mode="r") as reader, pytest.raises(TrajectoryError, match='mode="r"'):
        replay(objective, folder, [SquaredNorm()], reader)
    assert unchanged(objective.model, before)
