"""The compiled engine: right at every weights, and never silently wrong where a trace cannot be."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Hessian, Objective
from sharpscope.hessian import compiled_engine, engine_choice
from sharpscope.hessian.graph_engine import DoubleBackward
from sharpscope.hessian.tracing import Linear
from torch import nn


def objective_of(problem, **options):
    return Objective.supervised(problem[0], nn.CrossEntropyLoss(), problem[1], **options)


def assert_exact(hessian, problem, dense_hessian, rtol=1e-9):
    model, (x, y) = problem
    exact = dense_hessian(lambda: F.cross_entropy(model(x), y), [p for p in model.parameters() if p.requires_grad])
    V = torch.randn(exact.shape[0], 2, dtype=torch.float64)
    assert float((hessian @ V - exact @ V).norm()) <= rtol * float(torch.linalg.matrix_norm(exact, 2) * V.norm())


def test_one_trace_serves_changing_weights_buffers_and_frozen_parameters(make_problem, dense_hessian):
    problem = model, (x, y) = make_problem("cnn")
    model[0].weight.requires_grad_(False)
    data = [(x[:20], y[:20]), (x[20:], y[20:])]
    hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data), engine="compiled")
    for change in (
        lambda: None,
        lambda: model[4].weight.data.mul_(1.3),
        lambda: model[1].running_mean.add_(0.5),
        lambda: model[0].weight.data.mul_(0.5),
        lambda: x.data.mul_(0.7),
    ):
        change()
        assert_exact(hessian, problem, dense_hessian)
        assert not hessian.engine.refused
        assert len(hessian.engine._programs) == 1
    assert "traced product takes" in hessian.engine.reason


@pytest.mark.slow
def test_compiled_by_torch(mlp, dense_hessian, monkeypatch):
    monkeypatch.setattr(compiled_engine, "COMPILE_SECONDS", 0.0)
    hessian = Hessian(objective_of(mlp), engine="compiled")
    hessian.expect(10**9)
    for factor in (1.0, 1.2):
        mlp[0][0].weight.data.mul_(factor)
        assert_exact(hessian, mlp, dense_hessian)
    assert "of the time of one by double backward" in hessian.engine.reason


@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_compiler_the_rest_works(mlp, dense_hessian, monkeypatch, compiled):
    def fails(*args, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda *a, **k: fails)
    monkeypatch.setattr(compiled_engine, "COMPILE_SECONDS", 0.0)
    hessian = Hessian(objective_of(mlp), engine="compiled")
    hessian.expect(10**9 if compiled else 0)
    assert_exact(hessian, mlp, dense_hessian)
    assert ("no compiler here" in hessian.engine.reason) == compiled


class Switched(nn.Module):
    """A layer whose formula depends on an attribute, which a trace holds as it was."""

    def __init__(self):
        super().__init__()
        self.linear, self.power = nn.Linear(5, 3).double(), 1.0

    def forward(self, x):
        return self.linear(x).tanh() * self.power


@pytest.mark.parametrize("power", [3.0, 1.00001])
def test_settings_frozen_in_a_trace_are_noticed(mlp, dense_hessian, caplog, power):
    torch.manual_seed(0)
    problem = (Switched(), mlp[1])
    hessian = Hessian(objective_of(problem), engine="compiled")
    assert_exact(hessian, problem, dense_hessian)
    problem[0].power = power
    problem[0].linear.bias.data.add_(0.1)
    assert_exact(hessian, problem, dense_hessian)
    assert "traced gradient of batch 0 differs" in hessian.engine.reason
    assert_exact(hessian, problem, dense_hessian)
    assert sum(record.name == "sharpscope" for record in caplog.records) == 1


class Branching(nn.Module):
    """Another formula where the weights are large: no trace can hold both."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3).double()

    def forward(self, x):
        z = self.linear(x)
        return z.tanh() if float(self.linear.weight.detach().norm()) < 5 else z.sin()


def test_control_flow_on_the_weights(mlp, dense_hessian):
    problem = (Branching(), mlp[1])
    hessian = Hessian(objective_of(problem), engine="compiled")
    assert_exact(hessian, problem, dense_hessian)
    problem[0].linear.weight.data.mul_(20)
    assert_exact(hessian, problem, dense_hessian)
    assert "takes over" in hessian.engine.reason


def test_wrong_products_are_noticed(mlp, dense_hessian, monkeypatch):
    run = compiled_engine.Compiled._run
    monkeypatch.setattr(compiled_engine.Compiled, "_run", lambda *arguments: 1.001 * run(*arguments))
    hessian = Hessian(objective_of(mlp), engine="compiled")
    assert_exact(hessian, mlp, dense_hessian)
    assert "traced products differ" in hessian.engine.reason


def test_a_memory_budget_that_is_too_small(mlp, dense_hessian):
    hessian = Hessian(objective_of(mlp, chunk_size=10, memory_budget=20_000), engine="compiled")
    assert_exact(hessian, mlp, dense_hessian)
    assert "memory budget of 20000" in hessian.engine.reason


def test_a_program_that_fails_hands_over(mlp, dense_hessian, monkeypatch):
    hessian = Hessian(objective_of(mlp), engine="compiled")
    assert_exact(hessian, mlp, dense_hessian)

    def fails(*tensors):
        raise AssertionError("expected stride 3")

    next(iter(hessian.engine._programs.values())).run = fails
    assert_exact(hessian, mlp, dense_hessian)
    assert "expected stride 3" in hessian.engine.reason


def test_intermediates_are_not_copies_of_the_weights(mlp):
    model, (x, _) = mlp
    linear = Linear(lambda *t: t, (), (model[0].weight.detach().T, x))
    assert linear.num_bytes(tuple(model.parameters())) == x.numel() * 8


class Picky(nn.Module):
    """Raises under a trace, and for good once told to."""

    def __init__(self):
        super().__init__()
        self.linear, self.closed = nn.Linear(5, 3).double(), False

    def forward(self, x):
        if self.closed or torch._C._functorch.is_gradtrackingtensor(self.linear.weight):
            raise RuntimeError("closed")
        return self.linear(x).tanh()


def test_errors_under_the_trace_alone_are_none_of_the_users(mlp, dense_hessian):
    problem = (Picky(), mlp[1])
    hessian = Hessian(objective_of(problem), engine="compiled")
    assert_exact(hessian, problem, dense_hessian)
    assert "RuntimeError: closed" in hessian.engine.reason
    hessian = Hessian(objective_of(problem), engine="compiled")
    hessian.objective.loss()
    problem[0].closed = True
    with pytest.raises(RuntimeError, match="closed"):
        hessian @ torch.ones(hessian.shape[0], dtype=torch.float64)
    assert not hessian.engine.refused


@pytest.mark.parametrize("ratio", [0.97, 1.03])
def test_what_is_hardly_faster_is_not_taken(mlp, dense_hessian, monkeypatch, ratio):
    monkeypatch.setattr(engine_choice, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(engine_choice, "SECONDS_PER_NODE", 0.0)
    seconds = iter([1e-6, 9e-9] + [1e-6, ratio * 1e-6] * 2 + [5e-6, 1e-6] + [1e-6, ratio * 1e-6] * 50)
    monkeypatch.setattr(compiled_engine, "_timed", lambda function, v: (function(v), next(seconds)))
    hessian = Hessian(objective_of(mlp))
    assert_exact(hessian, mlp, dense_hessian)
    hessian.expect(1000)
    assert_exact(hessian, mlp, dense_hessian)
    assert hessian.engine.name == "double-backward"


def test_a_long_run_makes_the_choice_fall_on_it(mlp, dense_hessian, monkeypatch):
    monkeypatch.setattr(engine_choice, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(engine_choice, "SECONDS_PER_NODE", 0.0)
    seconds = iter([2e-3, 1e-3] * 50)  # double backward, traced
    monkeypatch.setattr(compiled_engine, "_timed", lambda function, v: (function(v), next(seconds)))
    hessian = Hessian(objective_of(mlp))
    assert_exact(hessian, mlp, dense_hessian)
    assert hessian.engine.name == "double-backward"
    hessian.expect(1000)
    assert_exact(hessian, mlp, dense_hessian)
    assert hessian.engine.name == "compiled"
    assert "double backward" in hessian.engine.reason


def test_a_short_run_does_not(mlp):
    hessian = Hessian(objective_of(mlp))
    v = torch.ones(hessian.shape[0], dtype=torch.float64)
    hessian.expect(20)
    for _ in range(3):
        hessian @ v
    assert hessian.engine.name == "double-backward"


def test_the_choice_keeps_double_backward_where_it_is_faster(mlp, dense_hessian, monkeypatch):
    monkeypatch.setattr(engine_choice, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(engine_choice, "SECONDS_PER_NODE", 0.0)
    seconds = iter([1e-6, 2e-6] * 50)
    monkeypatch.setattr(compiled_engine, "_timed", lambda function, v: (function(v), next(seconds)))
    hessian = Hessian(objective_of(mlp))
    assert_exact(hessian, mlp, dense_hessian)
    hessian.expect(1000)
    assert_exact(hessian, mlp, dense_hessian)
    assert hessian.engine.name == "double-backward"
    assert "2.00 of the time" in hessian.engine.reason


def test_the_choice_goes_back_when_the_trace_fails(mlp, dense_hessian, monkeypatch):
    monkeypatch.setattr(engine_choice, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(engine_choice, "SECONDS_PER_NODE", 0.0)
    problem = (Branching(), mlp[1])
    hessian = Hessian(objective_of(problem))
    hessian.expect(1000)
    for _ in range(3):
        assert_exact(hessian, problem, dense_hessian)
    assert hessian.engine.name == "double-backward"
    assert "takes over" in hessian.engine.reason


def test_no_product_is_spent_on_a_choice(mlp, monkeypatch):
    calls = []
    products = DoubleBackward.local_products
    monkeypatch.setattr(DoubleBackward, "local_products", lambda self, parts: calls.append(1) or products(self, parts))
    hessian = Hessian(objective_of(mlp))
    hessian @ torch.ones(hessian.shape[0], dtype=torch.float64)
    assert hessian.engine.name == "double-backward"
    assert len(calls) == 1


@pytest.mark.parametrize("engine", ["auto", *engine_choice.ENGINES])
def test_the_start_vector_is_the_gradient(mlp, engine):
    objective = objective_of(mlp, chunk_size=30)
    torch.testing.assert_close(Hessian(objective, engine=engine).start_vector(), objective.gradient())


def test_training_state_is_left_alone(make_problem):
    model, (x, y) = make_problem("cnn")
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    hessian = Hessian(objective_of((model, (x, y)), mode="train"), engine="compiled")
    hessian @ torch.ones(hessian.shape[0], dtype=torch.float64)
    assert not hessian.engine.refused
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_under_autocast_and_inference_mode(mlp, dense_hessian):
    hessian = Hessian(objective_of(mlp), engine="compiled")
    v = torch.ones(hessian.shape[0], dtype=torch.float64)
    expected = hessian @ v
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = hessian @ v
    assert torch.equal(found, expected)
