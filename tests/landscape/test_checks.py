"""The first look: losses that would make later numbers silently wrong, and losses that only look as if they did."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Hessian, Objective
from sharpscope.hessian import NotTwiceDifferentiable
from torch import nn


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def flat_gradient(loss, tensors):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(tensors))])


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.data.add_(1)])
def test_a_loss_that_changes_its_batch_is_refused_before_it_does(mlp, change):
    model, (x, y) = mlp
    found = x.clone()

    def loss(model, batch):
        change(batch[0])
        return cross_entropy(model, batch)

    with pytest.raises(ValueError, match="changes the tensors of batch 0 in place"):
        Objective(model, loss, (x, y)).loss()
    assert torch.equal(x, found)


def test_weights_that_the_loss_holds_itself_are_refused(mlp):
    model, data = mlp
    own = list(model.parameters())
    decay = lambda parameters: sum(p.square().sum() for p in parameters)
    with pytest.raises(ValueError, match=r"holds itself.*use model\.parameters\(\)"):
        Objective(model, lambda m, b: cross_entropy(m, b) + decay(own), data).loss()
    objective = Objective(model, lambda m, b: cross_entropy(m, b) + decay(m.parameters()), data)
    expected = flat_gradient(cross_entropy(model, data) + decay(own), own)
    torch.testing.assert_close(objective.gradient(), expected, rtol=1e-12, atol=1e-14)


def test_the_model_captured_by_the_loss_stands_for_its_argument(mlp, dense_hessian):
    model, data = mlp
    objective = Objective(model, lambda _, batch: cross_entropy(model, batch), data)
    exact = dense_hessian(lambda: cross_entropy(model, data), model.parameters())
    for engine in ("double-backward", "forward-over-reverse"):
        v = torch.ones(objective.num_parameters, dtype=torch.float64)
        torch.testing.assert_close(Hessian(objective, engine=engine) @ v, exact @ v, rtol=1e-9, atol=1e-11)


def test_custom_functions_of_a_later_batch_are_found(first_order_square, dense_hessian):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    data = [(torch.randn(4, 3, dtype=torch.float64), custom) for custom in (False, True)]

    def loss(model, batch, square=first_order_square):
        x, custom = batch
        z = model(x)
        return ((square(z) if custom else z * z) * z).mean()

    objective = Objective(model, loss, data, count=lambda batch: len(batch[0]))
    assert objective.custom_functions == ("FirstOrderSquare",)
    exact = dense_hessian(
        lambda: sum(loss(model, b, lambda z: z * z) for b in data) / 2,  # batches of one size
        model.parameters(),
    )
    hessian = Hessian(objective)
    assert hessian.engine.name == "finite-difference"
    torch.testing.assert_close(hessian.dense(), exact, rtol=1e-8, atol=1e-8)
    with pytest.raises(NotTwiceDifferentiable, match="FirstOrderSquare"):
        Hessian(objective, engine="double-backward") @ torch.ones(4, dtype=torch.float64)


@pytest.mark.parametrize("engine", ["double-backward", "finite-difference"])
def test_an_embedding_that_renormalises_its_weights_keeps_them(dense_hessian, engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Tanh(), nn.Linear(3, 2)).double()
    data = (torch.tensor([0, 1, 2, 3, 1]), torch.tensor([0, 1, 0, 1, 1]))
    found = copy.deepcopy(model.state_dict())
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    hessian = Hessian(objective, engine=engine)
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    loss, gradient, product = objective.loss(), objective.gradient(), hessian @ v
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    # Torch projects the rows without telling autograd: derivatives are those at the projected weights.
    projected = copy.deepcopy(model)
    value = cross_entropy(projected, data)
    assert loss == pytest.approx(value.item(), rel=1e-13)
    torch.testing.assert_close(gradient, flat_gradient(value, projected.parameters()), rtol=1e-12, atol=1e-14)
    if engine == "double-backward":
        exact = dense_hessian(lambda: cross_entropy(projected, data), projected.parameters())
        torch.testing.assert_close(product, exact @ v, rtol=1e-10, atol=1e-12)


class NormalisedCriterion(nn.Module):
    """Cross-entropy of predictions that BatchNorm standardises by their own statistics."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, prediction, target):
        return F.cross_entropy(self.norm(prediction), target)


class Holder:
    def __init__(self, norm):
        self.norm = norm

    def criterion(self, prediction, target):
        return F.cross_entropy(self.norm(prediction), target)


def closures_over(norm):
    inner = lambda prediction: norm(prediction)
    return {
        "module": NormalisedCriterion(norm),
        "closure": lambda z, y: F.cross_entropy(norm(z), y),
        "function of a function": lambda z, y: F.cross_entropy(inner(z), y),
        "default": lambda z, y, norm=norm: F.cross_entropy(norm(z), y),
        "bound method": Holder(norm).criterion,
        "list": (lambda layers: lambda z, y: F.cross_entropy(layers[0](z), y))([norm]),
    }


@pytest.mark.parametrize("form", closures_over(None))
def test_batchnorm_outside_the_model_is_left_alone(mlp, dense_hessian, form):
    model, (x, y) = mlp
    norm = nn.BatchNorm1d(3).double()
    criterion = closures_over(norm)[form]
    found = copy.deepcopy(norm.state_dict())
    objective = Objective.supervised(model, criterion, (x, y))
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    loss, gradient, product = objective.loss(), objective.gradient(), Hessian(objective) @ v
    assert norm.training
    assert all(torch.equal(found[name], tensor) for name, tensor in norm.state_dict().items())
    value = lambda: criterion(model(x), y)
    exact = dense_hessian(value, model.parameters())
    assert loss == pytest.approx(value().item(), rel=1e-13)
    torch.testing.assert_close(gradient, flat_gradient(value(), model.parameters()), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(product, exact @ v, rtol=1e-9, atol=1e-11)


def test_batchnorm_beside_the_model_in_a_larger_one_is_left_alone(mlp):
    model, (x, y) = mlp
    whole = nn.ModuleDict({"backbone": model, "head": nn.BatchNorm1d(3).double()})
    found = copy.deepcopy(whole.state_dict())
    loss = lambda m, batch: F.cross_entropy(whole["head"](m(batch[0])), batch[1])
    objective = Objective(model, loss, (x, y))
    value, _ = objective.loss(), Hessian(objective) @ torch.ones(objective.num_parameters, dtype=torch.float64)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state_dict().items())
    assert value == pytest.approx(loss(model, (x, y)).item(), rel=1e-13)


def test_batchnorm_captured_by_a_closure_over_tensors_is_left_alone():
    norm = nn.BatchNorm1d(2).double()
    found = copy.deepcopy(norm.state_dict())
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 0.0]], dtype=torch.float64)
    objective = Objective.from_closure(lambda w: (norm(x * w).pow(4)).mean() + w.square().sum(), w)
    objective.loss(), objective.gradient(), Hessian(objective).dense()
    assert all(torch.equal(found[name], tensor) for name, tensor in norm.state_dict().items())


class Wave(nn.Module):
    """u(x) = a sin(b x)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.a * torch.sin(self.b * x)


def physics(model, x):
    """Mean square of u'' + 4 u, whose derivatives are taken inside the loss."""
    x = x.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend + 4 * u).square().mean()


@pytest.mark.parametrize("engine", ["auto", "double-backward", "finite-difference"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_losses_that_differentiate_inside_themselves(dense_hessian, engine, chunk_size):
    model = Wave().double()
    x = torch.linspace(-2, 3, 13, dtype=torch.float64).unsqueeze(1)

    def explicit():
        return ((4 - model.b**2) * model.a * torch.sin(model.b * x)).square().mean()

    objective = Objective(model, physics, x, chunk_size=chunk_size)
    assert objective.loss() == pytest.approx(explicit().item(), rel=1e-12)
    expected = flat_gradient(explicit(), model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(objective.gradient(), expected, rtol=1e-11, atol=1e-12)
        dense = Hessian(objective, engine=engine).dense()
    torch.testing.assert_close(dense, dense_hessian(explicit, model.parameters()), rtol=1e-7, atol=1e-7)


GLOBAL_NORM = nn.BatchNorm1d(3).double()


def test_a_global_batchnorm_is_left_alone(mlp):
    model, data = mlp
    found = copy.deepcopy(GLOBAL_NORM.state_dict())
    objective = Objective.supervised(model, lambda z, y: F.cross_entropy(GLOBAL_NORM(z), y), data)
    objective.loss(), objective.gradient()
    assert all(torch.equal(found[name], tensor) for name, tensor in GLOBAL_NORM.state_dict().items())
