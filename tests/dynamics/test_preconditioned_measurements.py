"""Curvature in the optimizer's geometry against dense linear algebra, and nothing changed by measuring it."""

import copy
import warnings

import pytest
import torch
from sharpscope.dynamics.measurements import StabilityThreshold, UpdateCurvature
from sharpscope.dynamics.monitor import Monitor
from sharpscope.dynamics.optimizers import GIAdam
from sharpscope.dynamics.optimizers.preconditioners import preconditioner_of
from sharpscope.dynamics.point import Point
from sharpscope.dynamics.preconditioned_measurements import (
    EffectiveSharpness,
    PreconditionedSharpness,
    ThresholdRatio,
)
from sharpscope.dynamics.spectra_measurements import Sharpness
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.hessian import Hessian
from sharpscope.landscape.objective import Objective
from torch import nn, optim

TORCH = {
    "sgd": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "asgd": lambda params: optim.ASGD(params, lr=0.1),
    "adam": lambda params: optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: optim.AdamW(params, lr=0.01),
    "adamax": lambda params: optim.Adamax(params, lr=0.01),
    "nadam": lambda params: optim.NAdam(params, lr=0.01),
    "radam": lambda params: optim.RAdam(params, lr=0.01),
    "adagrad": lambda params: optim.Adagrad(params, lr=0.01),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01, centered=True),
    "adadelta": lambda params: optim.Adadelta(params),
    "adafactor": lambda params: optim.Adafactor(params),
    "rprop": lambda params: optim.Rprop(params, lr=0.001),
    "lbfgs": lambda params: optim.LBFGS(params, max_iter=2),
    "muon": lambda params: optim.Muon([p for p in params if p.ndim == 2]),
}


class Case:
    """A tanh network in float64 that trains on all of its data."""

    def __init__(self, optimizer=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        self.data = torch.randn(25, 4, dtype=torch.float64), torch.randint(0, 3, (25,))
        self.objective = Objective.supervised(self.model, nn.functional.cross_entropy, self.data)
        self.optimizer = None if optimizer is None else optimizer(list(self.model.parameters()))
        self.update = None

    def loss(self):
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.data[0]), self.data[1])
        loss.backward()
        return loss

    def train(self, steps):
        for _ in range(steps):
            before = nn.utils.parameters_to_vector(self.model.parameters()).detach()
            self.optimizer.step(self.loss)
            self.update = nn.utils.parameters_to_vector(self.model.parameters()).detach() - before
        return self

    def point(self, **options):
        return Point(7, self.objective, self.optimizer, update=self.update, **options)

    def dense(self):
        return Hessian(self.objective).dense()


def rows_of(measurement, point):
    return list(measurement.measure(point))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamax", "nadam", "radam", "adagrad", "rmsprop", "adadelta"])
def test_sharpness_ratio_and_curvature_are_the_dense_ones(name):
    case = Case(TORCH[name]).train(5)
    point = case.point()
    P = preconditioner_of(case.optimizer, case.objective).diagonal
    H = case.dense()
    eigenvalues = torch.linalg.eigvalsh(H / P.sqrt() / P.sqrt()[:, None])
    rows = rows_of(PreconditionedSharpness(num=2, tol=1e-8), point)
    assert [row.quantity for row in rows] == ["preconditioned_sharpness"] * 2 + ["zero_second_moment"]
    for i in range(2):
        assert rows[i].value == pytest.approx(float(eigenvalues[-1 - i]), rel=1e-6)
        assert rows[i].index == i
        assert rows[i].converged
    assert rows[2].value == 0.0
    [ratio] = rows_of(ThresholdRatio(tol=1e-8), point)
    threshold = preconditioner_of(case.optimizer, case.objective).threshold
    assert threshold is not None
    assert ratio.value == pytest.approx(float(eigenvalues[-1]) / threshold, rel=1e-6)
    [effective] = rows_of(EffectiveSharpness(), point)
    current = preconditioner_of(case.optimizer, case.objective, which="current").diagonal
    u = case.update
    assert effective.value == pytest.approx(float(u @ H @ u / (u @ (current * u))), rel=1e-9)
    assert effective.error < 1e-6 * abs(effective.value) + 1e-9


def test_for_gradient_descent_they_are_the_plain_ones():
    case = Case(lambda params: optim.SGD(params, lr=0.3)).train(3)
    sharpness = rows_of(Sharpness(tol=1e-10), case.point())[0].value
    [threshold] = rows_of(StabilityThreshold(), case.point())
    [ratio] = rows_of(ThresholdRatio(tol=1e-10), case.point())
    assert ratio.value == pytest.approx(sharpness / threshold.value, rel=1e-9)
    assert rows_of(PreconditionedSharpness(tol=1e-10), case.point())[0].value == pytest.approx(sharpness, rel=1e-9)
    [plain] = rows_of(UpdateCurvature(), case.point())
    [effective] = rows_of(EffectiveSharpness(), case.point())
    assert effective.value == pytest.approx(plain.value, rel=1e-12)


def test_weight_decay_in_the_gradient_is_part_of_the_ratio():
    case = Case(lambda params: optim.SGD(params, lr=0.3, weight_decay=0.7)).train(3)
    largest = float(torch.linalg.eigvalsh(case.dense())[-1])
    [ratio] = rows_of(ThresholdRatio(tol=1e-10), case.point())
    assert ratio.value == pytest.approx((largest + 0.7) * 0.3 / 2, rel=1e-8)


def test_next_is_the_step_that_comes():
    """Adam's first step: P = (1 − β₁)(|g| + ε)."""
    case = Case(TORCH["adam"])
    g = case.objective.gradient()
    P = 0.1 * (g.abs() + 1e-8)
    largest = float(torch.linalg.eigvalsh(case.dense() / P.sqrt() / P.sqrt()[:, None])[-1])
    assert rows_of(PreconditionedSharpness(tol=1e-8), case.point())[0].value == pytest.approx(largest, rel=1e-6)
    assert rows_of(PreconditionedSharpness(which="current"), case.point()) == []
    case.train(1)
    [first] = rows_of(EffectiveSharpness(), case.point())
    u = case.update
    # For the first step P u = −η m with m = (1 − β₁) g.
    assert first.value == pytest.approx(float(u @ case.dense() @ u / (u @ (-0.01 * 0.1 * g))), rel=1e-6)


def test_products_are_shared_and_both_remember():
    case = Case(TORCH["adam"]).train(2)
    states = {}, {}
    point = case.point()
    first = rows_of(PreconditionedSharpness(), point.with_state(states[0]))
    [second] = rows_of(ThresholdRatio(), point.with_state(states[1]))
    assert first[0].products > 0
    assert second.products == 0
    assert second.value == pytest.approx(first[0].value / 3800.0, rel=1e-12)
    assert states[0].keys() == states[1].keys()
    assert torch.equal(states[0]["vectors"], states[1]["vectors"])
    later = case.train(1).point()
    [alone] = rows_of(ThresholdRatio(), later.with_state(states[1]))
    assert 0 < alone.products < first[0].products


def test_groups_that_differ_in_learning_rate_have_one_ratio():
    def grouped(params):
        return optim.Adam([{"params": params[:2], "lr": 0.05}, {"params": params[2:]}], lr=0.01)

    case = Case(grouped).train(3)
    P = preconditioner_of(case.optimizer, case.objective).diagonal
    lr = torch.tensor([0.05] * 35 + [0.01] * 24, dtype=torch.float64)
    scaled = (lr / P).sqrt()
    largest = float(torch.linalg.eigvalsh(case.dense() * scaled * scaled[:, None])[-1])
    [ratio] = rows_of(ThresholdRatio(tol=1e-8), case.point())
    assert ratio.value == pytest.approx(largest / 38, rel=1e-6)


def test_root_that_is_no_diagonal():
    """Muon on the matrices only: biases are not held."""
    case = Case(lambda params: optim.Muon([p for p in params if p.ndim == 2], nesterov=False, weight_decay=0.0)).train(
        2
    )
    P = preconditioner_of(case.optimizer, case.objective)
    R, H = P.root.apply(torch.eye(59, dtype=torch.float64)), case.dense()
    largest = float(torch.linalg.eigvalsh(R @ H @ R.T)[-1])
    assert rows_of(PreconditionedSharpness(tol=1e-8), case.point())[0].value == pytest.approx(largest, rel=1e-6)
    current = preconditioner_of(case.optimizer, case.objective, which="current").root
    inverse = current.transposed(current.apply(torch.eye(59, dtype=torch.float64)))
    u = torch.where(P.moves, case.update, 0.0)
    [effective] = rows_of(EffectiveSharpness(), case.point())
    expected = float(u @ H @ u / (u @ torch.linalg.pinv(inverse, hermitian=True) @ u))
    assert effective.value == pytest.approx(expected, rel=1e-4)
    assert effective.converged
    with pytest.warns(UserWarning, match="no stability threshold"):
        assert rows_of(ThresholdRatio(), case.point()) == []


@pytest.mark.parametrize("name", ["lbfgs", "rprop"])
def test_without_a_geometry_there_is_a_warning_and_no_row(name):
    case = Case(TORCH[name]).train(1)
    for measurement in (PreconditionedSharpness(), ThresholdRatio(), EffectiveSharpness()):
        with pytest.warns(UserWarning, match="records nothing"):
            assert rows_of(measurement, case.point()) == []


def test_only_weights_known():
    case = Case()
    for measurement in (PreconditionedSharpness(), ThresholdRatio(), EffectiveSharpness()):
        assert rows_of(measurement, case.point()) == []


def test_dead_units_are_left_out_and_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    data = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 2, (30,))
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    point = Point(0, objective, optim.Adam(model.parameters()))
    rows = rows_of(PreconditionedSharpness(tol=1e-6), point)
    assert rows[-1].quantity == "zero_second_moment"
    assert rows[-1].value == pytest.approx((2 * 4 + 2 + 2 * 2) / objective.num_parameters)
    P = preconditioner_of(point.optimizer, objective)
    scaled = torch.where(P.moves, P.diagonal.rsqrt(), 0.0)
    largest = float(torch.linalg.eigvalsh(Hessian(objective).dense() * scaled * scaled[:, None])[-1])
    assert rows[0].value == pytest.approx(largest, rel=1e-5)


@pytest.mark.filterwarnings("ignore:measurement")
@pytest.mark.parametrize("name", TORCH)
def test_measuring_leaves_the_training_bit_for_bit(name, tmp_path):
    def run(measured):
        case = Case(TORCH[name])
        measurements = [PreconditionedSharpness(), ThresholdRatio(), EffectiveSharpness()]
        if not measured:
            case.train(6)
            return case
        with Trajectory.open(tmp_path / "run") as trajectory:
            with Monitor(case.objective, case.optimizer, measurements, trajectory, on_error="raise") as monitor:
                for _ in range(6):
                    before = copy.deepcopy(case.optimizer.state_dict())
                    monitor.step()
                    assert_same(before, case.optimizer.state_dict())
                    case.train(1)
        return case

    plain, watched = run(False), run(True)
    assert_same(plain.optimizer.state_dict(), watched.optimizer.state_dict())
    for p, q in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    elif not callable(first):
        assert first == second


def test_gi_adam_starts_lower_by_the_bias_correction():
    """v₀ = g₀² under the usual correction: P of the first step is 1/√(1 − β₂) times Adam's, but for ε."""
    values = []
    for kind in (optim.Adam, GIAdam):
        case = Case(lambda params, kind=kind: kind(params, lr=0.01, betas=(0.9, 0.999), eps=1e-12))
        values.append(rows_of(PreconditionedSharpness(tol=1e-8), case.point())[0].value)
    assert values[1] / values[0] == pytest.approx(0.001**0.5, rel=1e-5)


def test_nothing_warns_for_a_known_optimizer():
    case = Case(TORCH["adam"]).train(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(ThresholdRatio(), case.point())
