"""Short second derivatives against autograd's own, in float64."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope.hessian.second_derivatives import SHORT, ShortSecondDerivatives
from torch import nn
from torch.utils.checkpoint import checkpoint

ROUNDING = {"atol": 1e-12, "rtol": 1e-10}


def tensors(*shapes, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


CASES = {
    "gelu": (lambda x: F.gelu(x), [(4, 5)]),
    "gelu module": (nn.GELU(), [(4, 5)]),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [(4, 5)]),
    "silu": (F.silu, [(4, 5)]),
    "silu in place": (lambda x: F.silu(x * 2, inplace=True), [(4, 5)]),
    "softmax": (lambda x: F.softmax(x, dim=1), [(3, 4, 5)]),
    "softmax method": (lambda x: x.softmax(-1), [(3, 4, 5)]),
    "softmax function": (lambda x: torch.softmax(x, 0), [(3, 4, 5)]),
    "softmax to float64": (lambda x: torch.softmax(x, 0, dtype=torch.float64), [(3, 4)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, [5], w, b), [(3, 4, 5), (5,), (5,)]),
    "layer norm without bias": (lambda x, w: F.layer_norm(x, [5], w), [(4, 5), (5,)]),
    "layer norm without weight": (lambda x: F.layer_norm(x, [5], eps=0.1), [(4, 5)]),
    "layer norm of matrices": (lambda x, w, b: torch.layer_norm(x, [4, 5], w, b, 0.01), [(3, 4, 5), (4, 5), (4, 5)]),
}


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives_are_those_of_autograd(case):
    function, shapes = CASES[case]
    inputs = tensors(*shapes)
    results = []
    for short in (False, True):
        mode = ShortSecondDerivatives() if short else torch.enable_grad()
        with mode:
            value = function(*inputs)
            # Not linear in the value, so that a change of the incoming gradient matters, too.
            loss = (value.sin() * torch.arange(value.numel(), dtype=torch.float64).view_as(value).cos()).sum()
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        vectors = tensors(*shapes)
        whole = torch.autograd.grad(gradients, inputs, [v.detach().cos() for v in vectors], retain_graph=True)
        single = [
            torch.autograd.grad(g, x, v.detach(), retain_graph=True)[0]
            for g, x, v in zip(gradients, inputs, vectors, strict=True)
            if g.requires_grad
        ]
        results.append([value, *gradients, *whole, *single])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **ROUNDING)


def test_the_product_is_the_derivative_of_the_gradient():
    """gradgradcheck compares with differences, not with autograd's formula."""
    x, w, b = tensors((3, 5), (5,), (5,))
    with ShortSecondDerivatives():
        for function, inputs in (
            (F.gelu, [x]),
            (lambda x: F.gelu(x, approximate="tanh"), [x]),
            (F.silu, [x]),
            (lambda x: x.softmax(1), [x]),
            (lambda x, w, b: F.layer_norm(x, [5], w, b), [x, w, b]),
        ):
            assert torch.autograd.gradgradcheck(function, inputs)


def test_other_types_keep_torchs_own_functions():
    (half,) = tensors((4, 5), dtype=torch.bfloat16)
    (plain,) = tensors((4, 5))
    with ShortSecondDerivatives():
        assert "Pointwise" in type(F.gelu(plain).grad_fn).__name__
        assert "Pointwise" not in type(F.gelu(half).grad_fn).__name__
        assert F.gelu(plain.detach()).grad_fn is None
        with torch.no_grad():
            assert F.gelu(plain).grad_fn is None
        assert "Pointwise" not in type(F.gelu(plain.as_subclass(Subclass)).grad_fn).__name__
    assert "Pointwise" not in type(F.gelu(plain).grad_fn).__name__


class Subclass(torch.Tensor):
    pass


def test_activation_checkpointing_sees_the_same_functions_again():
    (x,) = tensors((4, 5))
    layers = nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.LayerNorm(5)).double()
    products = []
    for again in (False, True):
        with ShortSecondDerivatives():
            value = checkpoint(layers, x, use_reentrant=False) if again else layers(x)
            (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
            products.append(torch.autograd.grad(gradient, x, torch.ones_like(x))[0])
    torch.testing.assert_close(*products, **ROUNDING)


def test_every_short_function_is_covered():
    assert {F.gelu, F.silu, F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax} == set(
        SHORT
    )
