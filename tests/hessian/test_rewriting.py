"""Rewritten programs compute the same numbers in fewer operations."""

import torch
import torch.nn.functional as F
from sharpscope.hessian import rewriting
from sharpscope.hessian.rewriting import rewrite
from sharpscope.hessian.tracing import TangentProgram
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

ATEN = torch.ops.aten


def rewritten(function, *inputs, tangents=0):
    """(program before, program after), each checked against the function at other inputs."""
    before, after = make_fx(function)(*inputs), make_fx(function)(*inputs)
    places = [node for node in after.graph.nodes if node.op == "placeholder"]
    rewrite(after.graph, places[len(places) - tangents :])
    after.graph.lint()
    after.recompile()
    others = [torch.randn_like(t) for t in inputs]
    torch.testing.assert_close(after(*others), function(*others), rtol=1e-12, atol=1e-12)
    return before, after


def calls(program, target):
    return sum(node.target is target for node in program.graph.nodes)


def matrices(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_zeros_are_not_added_and_get_memory(monkeypatch):
    # Forward mode alone leaves sums with zeros that have no memory in a trace; here ordinary ones stand for them.
    monkeypatch.setattr(rewriting, "ZEROS", ATEN.zeros.default)
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)
    for function, left in (
        (lambda x: (x + zeros(4, 3)) * (zeros(4, 3) + x) - zeros(4, 3), 0),
        (lambda x: zeros(4, 3) - x, 1),
        (lambda x: x[0] + zeros(4, 3), 1),  # broadcast
        (lambda x: x.float() + zeros(4, 3), 1),  # promoted
        (lambda x: torch.add(zeros(4, 3), x, alpha=2), 1),  # scaled
    ):
        _, after = rewritten(function, *matrices((4, 3)))
        assert sum(calls(after, target) for target in (ATEN.add.Tensor, ATEN.sub.Tensor)) == left


def test_zeros_of_forward_mode_are_not_kept_without_memory():
    loss = lambda a: nn.functional.mse_loss(a.sin(), torch.zeros_like(a), reduction="sum")
    a = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    linear = TangentProgram.trace(torch.func.grad(loss), (a,)).linearise((a,))
    assert not any(t._is_zerotensor() for t in linear.kept)
    torch.testing.assert_close(linear(torch.ones_like(a))[0], 2 * (2 * a).cos())


def test_equal_operations_are_done_once_but_random_ones_are_not():
    _, after = rewritten(lambda x: (x - x.mean(0)) * (x - x.mean(0)), *matrices((4, 3)))
    assert (calls(after, ATEN.mean.dim), calls(after, ATEN.sub.Tensor)) == (1, 1)
    program = make_fx(lambda x: torch.rand_like(x) - torch.rand_like(x))(torch.zeros(9))
    rewrite(program.graph, [])
    program.recompile()
    assert bool((program(torch.zeros(9)) != 0).any())


def test_slopes_of_activations_are_taken_where_the_tangent_is_not_needed():
    def derivative_of(activation):
        return lambda x, t: torch.func.jvp(activation, (x,), (t,))[1]

    for activation in (F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.mish, F.softplus, F.hardswish):
        _, after = rewritten(derivative_of(activation), *matrices((6,), (6,)), tangents=1)
        tangent = [node for node in after.graph.nodes if node.op == "placeholder"][1]
        if calls(after, ATEN.gelu_backward.default):
            assert [user.target for user in tangent.users] == [ATEN.mul.Tensor]


def test_copies_that_convert_stay():
    _, after = rewritten(lambda x: x.to(torch.float32).to(torch.float64), *matrices((4,)))
    assert calls(after, ATEN._to_copy.default) == 2
