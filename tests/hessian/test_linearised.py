"""J v by a traced program inside GGN and Fisher: the same matrix, chosen only where it pays, never silently wrong."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope import GGN, Fisher, GradientCovariance, Objective
from sharpscope.hessian import linearised
from sharpscope.hessian.tracing import Linear, TangentProgram
from torch import nn
from torch.utils.checkpoint import checkpoint

MANY = 10**9
IN_USE = "by a traced program"


def uneven(data):
    rows = len(data[0])
    return list(zip(*(t.split((rows // 5 * 3, rows - rows // 5 * 3)) for t in data), strict=True))


def vectors(operator, count=3):
    return torch.randn(operator.shape[0], count, dtype=operator.dtype, generator=torch.Generator().manual_seed(1))


def pair(make, data, **options):
    """The same operator by the kept graph alone and with a trace."""
    kept, traced = (make(Objective.supervised(data=data, **options)) for _ in range(2))
    traced.expect(MANY)
    return kept, traced


def assert_equal(kept, traced, rtol=1e-10):
    V = vectors(kept)
    torch.testing.assert_close(traced @ V, kept @ V, rtol=rtol, atol=1e-13)
    assert IN_USE in traced.reason, traced.reason
    assert IN_USE not in kept.reason


@pytest.mark.parametrize("make", [GGN, Fisher, lambda o: Fisher(o, "monte-carlo", num_samples=2)])
def test_the_same_matrix_at_all_weights(problem, make):
    model, data = problem
    kept, traced = pair(make, uneven(data), model=model, criterion=nn.CrossEntropyLoss())
    assert_equal(kept, traced)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():  # running statistics as well
                tensor.mul_(1.1)
    assert_equal(kept, traced)


def test_chunks_that_are_kept_and_chunks_that_are_not(mlp):
    for options in ({"chunk_size": 20}, {"chunk_size": 20, "memory_budget": 1}):
        kept, traced = pair(GGN, uneven(mlp[1]), model=mlp[0], criterion=nn.CrossEntropyLoss(), **options)
        assert_equal(kept, traced)


def test_one_trace_serves_all_weights_and_all_chunks_of_a_shape(mlp, monkeypatch):
    traces = []
    trace = TangentProgram.trace
    monkeypatch.setattr(TangentProgram, "trace", lambda *args: traces.append(1) or trace(*args))
    model, data = mlp
    ggn = GGN(Objective.supervised(model, nn.CrossEntropyLoss(), data, chunk_size=20))  # 20, 20, 20, 10
    ggn.expect(MANY)
    for _ in range(3):
        ggn @ vectors(ggn)
        with torch.no_grad():
            model[0].weight.add_(0.1)
    assert len(traces) == 2


def test_frozen_parameters_and_unused_ones(mlp):
    model, data = mlp
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    for params in (["2.*", "unused"], "4.weight"):
        kept, traced = pair(GGN, data, model=model, criterion=nn.CrossEntropyLoss(), params=params)
        assert_equal(kept, traced)
        with torch.no_grad():
            model[0].weight.mul_(1.2)  # frozen, but not constant
        assert_equal(kept, traced)


def test_a_switch_in_the_middle_of_a_run(mlp, monkeypatch):
    """The products that went without a trace are what decides."""
    monkeypatch.setattr(linearised, "TRACE_SECONDS", 1e-6)
    model, data = mlp
    ggn = GGN(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    V = vectors(ggn, 1)
    first, count = ggn @ V, 1
    assert IN_USE not in ggn.reason
    while IN_USE not in ggn.reason:
        product = ggn @ V
        count += 1
        assert count < 10_000
        torch.testing.assert_close(product, first, rtol=1e-10, atol=1e-13)
    shape = next(iter(ggn._linearisations._shapes.values()))
    assert shape.trace_seconds < shape.seconds_lost <= shape.trace_seconds + shape.seconds_saved
    assert all(isinstance(factor.jacobian, Linear) for factor in ggn._factors)


def test_a_short_run_is_not_traced(mlp, monkeypatch):
    monkeypatch.setattr(TangentProgram, "trace", lambda *args: pytest.fail("traced"))
    ggn = GGN(Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1]))
    ggn.expect(20)
    for _ in range(20):
        ggn @ vectors(ggn, 1)


class Switching(nn.Module):
    """Another function once its weight is large: a decision that a trace does not see."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3).double()

    def forward(self, x):
        large = bool((self.inner.weight.detach() ** 2).sum().item() > 100)
        z = self.inner(x)
        return z**3 if large else z


class Counting(nn.Module):
    """Uses a number kept outside its tensors."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 3).double(), 1.0

    def forward(self, x):
        return self.scale * self.inner(x)


def test_a_model_that_depends_on_more_than_its_tensors_is_noticed(mlp):
    torch.manual_seed(0)
    model = Counting()
    kept, traced = pair(GGN, mlp[1], model=model, criterion=nn.CrossEntropyLoss())
    assert_equal(kept, traced)
    model.scale = 2.0
    with torch.no_grad():
        model.inner.weight.add_(0.1)
    V = vectors(kept)
    torch.testing.assert_close(traced @ V, kept @ V, rtol=1e-10, atol=1e-13)
    assert "depends on more than its tensors" in traced.reason


def test_a_decision_that_reads_a_number_cannot_be_traced_or_is_noticed(mlp):
    torch.manual_seed(0)
    model = Switching()
    kept, traced = pair(GGN, mlp[1], model=model, criterion=nn.CrossEntropyLoss())
    V = vectors(kept)
    for _ in range(2):
        torch.testing.assert_close(traced @ V, kept @ V, rtol=1e-10, atol=1e-13)
        with torch.no_grad():
            model.inner.weight.mul_(30.0)
    assert IN_USE not in traced.reason


def test_a_derivative_that_is_not_that_of_the_kept_graph_is_noticed(mlp, monkeypatch):
    """Equal values, another J: only the identity between J v and Jᵀ u can tell."""
    wrong = Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda self, *v: tuple(1.01 * t for t in wrong(self, *v)))
    kept, traced = pair(GGN, mlp[1], model=mlp[0], criterion=nn.CrossEntropyLoss())
    V = vectors(kept)
    torch.testing.assert_close(traced @ V, kept @ V, rtol=1e-10, atol=1e-13)
    assert "not the transpose" in traced.reason


def test_custom_functions_are_not_traced(first_order_square, mlp):
    model, data = mlp
    predict = lambda model, x: first_order_square(model(x)) + model(x)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, predict=predict)
    ggn = GGN(objective)
    ggn.expect(MANY)
    with pytest.raises(RuntimeError, match=r"J v is wrong through .*FirstOrderSquare"):
        ggn @ vectors(ggn)
    assert "custom autograd functions" in ggn.reason


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(checkpoint(lambda t: torch.tanh(self.first(t)), x, use_reentrant=False))


def test_checkpointed_layers_and_batch_statistics(mlp):
    torch.manual_seed(0)
    model = Checkpointed().double()
    kept, traced = pair(GGN, mlp[1], model=model, criterion=nn.CrossEntropyLoss())
    V = vectors(kept)
    torch.testing.assert_close(traced @ V, kept @ V, rtol=1e-10, atol=1e-13)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept, traced = pair(GGN, mlp[1], model=model, criterion=nn.CrossEntropyLoss(), mode="train")
    torch.testing.assert_close(traced @ vectors(kept), kept @ vectors(kept), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_losses_of_examples_are_not_traced(mlp):
    objective = Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1])
    for operator in (GradientCovariance(objective), Fisher(objective, "empirical")):
        operator.expect(MANY)
        operator @ vectors(operator)
        assert "single examples" in operator.reason


def test_everything_is_left_as_found(make_problem):
    model, data = make_problem("cnn", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()
    ggn = GGN(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    ggn.expect(MANY)
    with torch.inference_mode():
        ggn @ vectors(ggn)
    assert IN_USE in ggn.reason
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert [set(vars(module)) for module in model.modules()] == [set(a) for a in attributes]


def test_batches_of_dictionaries(make_problem):
    model, (x, y) = make_problem("transformer")
    objective = lambda: Objective.supervised(
        model,
        F.cross_entropy,
        {"tokens": x, "labels": y, "note": "text"},
        split=lambda batch: (batch["tokens"], batch["labels"]),
    )
    kept, traced = GGN(objective()), GGN(objective())
    traced.expect(MANY)
    assert_equal(kept, traced)
