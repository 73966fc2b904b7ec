"""Traced derivatives against torch.func.jvp, at the example and at other weights."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope.hessian.tracing import TangentProgram
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def differentiable_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def functional(model):
    """(weights, function of them and the inputs)."""
    names = [name for name, _ in model.named_parameters()]
    weights = tuple(p.detach() for p in model.parameters())

    def forward(*tensors):
        return functional_call(model, dict(zip(names, tensors, strict=False)), (tensors[len(names)],))

    return weights, forward


def moved(weights, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return tuple(w + 0.3 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights)


def directions(weights, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def check(function, weights, others=()):
    """Value and derivative at the example, at other weights, twice in a row, and of a linear map."""
    program = TangentProgram.trace(function, weights, others)
    for point in (weights, moved(weights), weights):
        linear = program.linearise(point, others)
        for seed in (5, 6, 5):
            v = directions(weights, seed)
            value, derivative = jvp(lambda *p: function(*p, *others), point, v)
            as_tuple = lambda found: found if isinstance(found, tuple) else (found,)
            assert_equal(linear(*v), as_tuple(derivative))
            assert_equal(linear.value, as_tuple(value))
        assert_equal(linear(*(3 * t for t in v)), tuple(3 * t for t in linear(*v)))


def test_prediction(problem):
    model, (inputs, _) = problem
    weights, forward = functional(model)
    check(forward, weights, (inputs,))


def test_gradient(problem):
    model, (inputs, targets) = problem
    weights, forward = functional(model)

    def loss(*tensors):
        return F.cross_entropy(forward(*tensors[:-1]), tensors[-1])

    check(grad(loss, argnums=tuple(range(len(weights)))), weights, (inputs, targets))


def test_one_trace_serves_other_data(mlp):
    model, (x, _) = mlp
    weights, forward = functional(model)
    program = TangentProgram.trace(forward, weights, (x,))
    v = directions(weights)
    other = torch.randn(x.shape, dtype=x.dtype)
    _, expected = jvp(lambda *p: forward(*p, other), weights, v)
    assert_equal(program.linearise(weights, (other,))(*v), (expected,))


def test_captured_tensors_stay_those_of_the_trace(mlp):
    model, (x, _) = mlp
    weights, forward = functional(model)
    check(lambda *p: forward(*p, x), weights)


def test_in_place_operations():
    table = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)

    def function(a, b):
        out = torch.zeros(3, 4, dtype=a.dtype)
        out[1] = a.square()
        out[2] += b.sin()
        out.mul_(table)
        rows = out[1:]
        rows.add_(a * b)
        return out.exp().div_(7.0), (out * a).sum(1)

    check(function, (torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)))


def test_batch_statistics_leave_the_buffers_alone(make_problem):
    model, (x, _) = make_problem("cnn")
    weights, _ = functional(model.train())
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    names = [name for name, _ in model.named_parameters()]

    def function(*tensors):
        held = {name: t.clone() for name, t in buffers.items()}
        return functional_call(model, {**dict(zip(names, tensors, strict=True)), **held}, (x,))

    check(function, weights)
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, buffers[name])


def test_a_value_that_no_weight_reaches_has_a_zero_derivative():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    check(lambda a, b: (a.square(), b.detach() * 2, torch.ones(3)), (a, a.clone()))


def test_shapes_that_depend_on_values():
    mask = torch.tensor([True, False, True])
    check(lambda a, keep: a[keep].square(), (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),), (mask,))


def test_the_same_tensor_twice():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    check(lambda a, b: a * b.square(), (a, a))


def test_numbers_read_from_the_weights_are_refused():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError):
        TangentProgram.trace(lambda a: a * float(a.norm()), (a,))


def test_errors_of_the_function_come_out():
    def fails(a):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        TangentProgram.trace(fails, (torch.ones(2),))


def test_errors_that_come_once_are_not_swallowed():
    calls = []

    def fails_once(a):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("my own")
        return a

    with pytest.raises(RuntimeError, match="my own"):
        TangentProgram.trace(fails_once, (torch.ones(2),))


def test_a_function_that_wants_values_is_traced_on_values():
    calls = []

    def fails_on_shapes(a):
        calls.append(1)
        if len(calls) <= 2:
            raise RuntimeError("values, please")
        return a.sin()

    check(fails_on_shapes, (torch.tensor([0.3, 1.0], dtype=torch.float64),))


def test_frozen_control_flow_shows_in_the_value():
    a = torch.tensor([1.0, 2.0], dtype=torch.float64)
    switch = {"power": 2}
    program = TangentProgram.trace(lambda a: a ** switch["power"], (a,))
    switch["power"] = 3
    assert torch.equal(program.linearise((a,)).value[0], a**2)


def test_wrong_number_of_tensors():
    program = TangentProgram.trace(torch.sin, (torch.ones(2),))
    with pytest.raises(ValueError, match="traced with 1 and 0"):
        program.linearise((torch.ones(2), torch.ones(2)))


def test_only_what_the_direction_reaches_is_computed_again():
    """The linear program of W2 tanh(W1 x) multiplies matrices twice for each weight, and never computes tanh."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    weights, forward = functional(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    program = TangentProgram.trace(forward, weights, (x,))
    names = [str(node.target) for node in program.linear.graph.nodes if node.op == "call_function"]
    assert sum("mm" in name for name in names) == 3
    assert not any("tanh.default" in name for name in names)
    assert len(program.linearise(weights, (x,)).kept) <= 5
