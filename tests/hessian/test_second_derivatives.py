"""Short second derivatives against autograd's own, in float64."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope import GGN, Hessian, Objective, top_eigenvalues
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


LAYERS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "softmax": nn.Softmax(-1),
    "layer_norm": nn.LayerNorm(5, dtype=torch.float64),
}


def central_differences(objective, step=1e-5):
    """The Hessian [n, n] from gradients."""
    (parameter,) = objective.parameters.values()
    columns = []
    for i in range(parameter.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[i] += sign * step
                ends.append(objective.gradient())
                parameter.view(-1)[i] -= sign * step
        columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("check", [True, False])
def test_a_loss_that_differentiates_inside_itself(layer, check):
    """Its Hessian has third derivatives of the layer, which the short forms do not have."""
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)
    weight = nn.Linear(5, 5, bias=False).double()

    def loss(module, batch):
        inputs = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(LAYERS[layer](module(inputs)).square().sum(), inputs, create_graph=True)
        return (slope.square() + slope).sum(1).mean()

    objective = Objective(weight, loss, x, check=check)
    expected = central_differences(objective)
    found = Hessian(objective).dense()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("layer", ["silu", "gelu"])
def test_gauss_newton_of_a_model_that_differentiates(layer):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(2, 4), LAYERS[layer], nn.Linear(4, 1)).double()

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]

    data = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    model = Slope()
    found = GGN(Objective.supervised(model, nn.MSELoss(), data)).dense()
    rows = []
    for output in model(data[0]).reshape(-1):
        pieces = torch.autograd.grad(output, list(model.parameters()), retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(pieces, model.parameters(), strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in flat]))
    J = torch.stack(rows)
    torch.testing.assert_close(found, 2 / 12 * J.T @ J, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_models_made_of_functional_transforms(kind):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 5), LAYERS["layer_norm"], nn.GELU(), nn.Linear(5, 2)).double()

    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain

        def forward(self, x):
            return torch.func.vmap(self.plain)(x)

    data = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6,))
    found = kind(Objective.supervised(Mapped(), nn.CrossEntropyLoss(), data))
    expected = kind(Objective.supervised(plain, nn.CrossEntropyLoss(), data))
    top, truth = top_eigenvalues(found), top_eigenvalues(expected)
    torch.testing.assert_close(top.values, truth.values, rtol=1e-6, atol=0)


def test_hooks_of_the_user_leave_no_trace():
    torch.manual_seed(0)

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 2), 0

        def forward(self, x):
            h = self.layer(x)
            if h.requires_grad:
                h.register_hook(self.count)
            return h

        def count(self, gradient):
            self.calls += 1
            torch.rand(1)

    model = Hooked()
    data = torch.randn(6, 3), torch.randint(0, 2, (6,))
    hessian = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    before = torch.get_rng_state()
    top_eigenvalues(hessian)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), before)
