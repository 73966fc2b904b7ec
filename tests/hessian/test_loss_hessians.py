"""Closed-form Hessians of criteria against dense float64 ones by torch.func."""

import functools
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from sharpscope import GGN, Objective
from sharpscope.hessian import loss_hessians
from sharpscope.hessian.loss_hessians import by_double_backward, loss_hessian, recognised
from torch import nn

CLASSES = 5
SHAPES = {"rows": (7, CLASSES), "sequences": (3, CLASSES, 4), "images": (2, CLASSES, 2, 3), "one row": (CLASSES,)}
PLENTY = 1 << 30


def dense(criterion, z, targets):
    return torch.func.hessian(lambda t: criterion(t, targets))(z).reshape(z.numel(), z.numel())


def by_columns(metric, z):
    return torch.stack([metric(e.reshape(z.shape)).reshape(-1) for e in torch.eye(z.numel(), dtype=z.dtype)], dim=1)


def logits(shape, seed=0):
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(shape, high=CLASSES):
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return torch.randint(0, high, rows, generator=torch.Generator().manual_seed(1))


def class_weights():
    return torch.tensor([1.0, 3.0, 0.5, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("targets", ["indices", "ignored", "probabilities"])
def test_cross_entropy_with_every_option(shape, reduction, targets, monkeypatch):
    z = logits(shape)
    axis = 1 if len(shape) > 1 else 0
    if targets == "probabilities":
        y = torch.softmax(logits(shape, 2), axis) * 1.5  # rows need not sum to one
    else:
        y = labels(shape, 3)  # of positive class weight
        if targets == "ignored" and y.ndim:
            y.view(-1)[::3] = 255
    for weight, smoothing in product((None, class_weights()), (0.0, 0.3)):
        options = dict(weight=weight, label_smoothing=smoothing, reduction=reduction)
        if y.dtype == torch.long:
            options["ignore_index"] = 255
        exact = dense(functools.partial(F.cross_entropy, **options), z, y)
        for criterion in (nn.CrossEntropyLoss(**options), functools.partial(F.cross_entropy, **options)):
            for budget, piece in product((PLENTY, 0), (1 << 18, CLASSES, 1)):  # probabilities kept or made again
                monkeypatch.setattr(loss_hessians, "PIECE", piece)
                H = by_columns(loss_hessian(criterion, z, y, budget), z)
                torch.testing.assert_close(H, exact, rtol=1e-11, atol=1e-14)
        # Adding the same number to all logits of a row changes nothing; the loss is convex.
        assert float(loss_hessian(criterion, z, y, PLENTY)(torch.ones_like(z)).abs().max()) < 1e-15
        assert float(torch.linalg.eigvalsh(H)[0]) > -1e-14


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_error(reduction):
    z, y = logits((3, 2, 4)), logits((3, 2, 4), 1)
    for criterion in (nn.MSELoss(reduction=reduction), functools.partial(F.mse_loss, reduction=reduction)):
        H = by_columns(loss_hessian(criterion, z, y, PLENTY), z)
        torch.testing.assert_close(H, dense(criterion, z, y))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_binary_cross_entropy_with_every_option(reduction):
    z, y = logits((4, 3)), torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = (None, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64))
    for weight, positive in product(weights, (None, torch.tensor([4.0, 1.0, 0.2], dtype=torch.float64))):
        options = dict(weight=weight, pos_weight=positive, reduction=reduction)
        function = functools.partial(F.binary_cross_entropy_with_logits, **options)
        for criterion in (nn.BCEWithLogitsLoss(**options), function):
            H = by_columns(loss_hessian(criterion, z, y, PLENTY), z)
            torch.testing.assert_close(H, dense(function, z, y), rtol=1e-12, atol=1e-15)


def test_saturated_logits_lose_no_digits():
    # p (1 − p) = exp(−|z|) far out, where 1 − p is zero in floating point.
    z = torch.tensor([[40.0], [-40.0]], dtype=torch.float64)
    H = loss_hessian(nn.BCEWithLogitsLoss(reduction="sum"), z, torch.zeros_like(z), PLENTY)(torch.ones_like(z))
    torch.testing.assert_close(H, torch.exp(-z.abs()), rtol=1e-12, atol=0.0)


def test_half_precision_logits_are_worked_on_in_float32():
    z, y = logits((6, CLASSES)), labels((6, CLASSES))
    exact = loss_hessian(F.cross_entropy, z.bfloat16().double(), y, PLENTY)
    for budget in (PLENTY, 0):
        metric = loss_hessian(F.cross_entropy, z.bfloat16(), y, budget)
        w = logits((6, CLASSES), 4).bfloat16()
        assert metric(w).dtype == torch.bfloat16
        torch.testing.assert_close(metric(w).double(), exact(w.double()), rtol=2**-8, atol=1e-9)


class Subclass(nn.CrossEntropyLoss):
    def forward(self, z, y):
        return super().forward(z, y) ** 2


def test_only_criteria_that_are_certain_are_recognised():
    hooked, changed = nn.CrossEntropyLoss(), nn.MSELoss()
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    changed.forward = lambda z, y: (z - y).abs().sum()
    for criterion in (
        Subclass(),
        hooked,
        changed,
        nn.L1Loss(),
        lambda z, y: F.cross_entropy(z, y),
        functools.partial(F.cross_entropy, size_average=False),
        functools.partial(nn.CrossEntropyLoss(), label_smoothing=0.5),
        functools.partial(F.cross_entropy, torch.zeros(1)),
        functools.partial(functools.partial),
    ):
        assert recognised(criterion) is None
    assert recognised(F.mse_loss) == (nn.MSELoss, {})
    z = logits((4, 3))
    assert loss_hessian(F.mse_loss, z, z[:1], PLENTY) is None  # broadcast targets
    assert loss_hessian(nn.CrossEntropyLoss(reduction="none"), z, torch.zeros(4).long(), PLENTY) is None
    assert loss_hessian(F.cross_entropy, z, {"labels": 0}, PLENTY) is None


def test_unrecognised_criteria_take_the_general_way(mlp):
    model, (x, y) = mlp
    plain = GGN(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)))
    wrapped = GGN(Objective.supervised(model, lambda z, y: F.cross_entropy(z, y), (x, y)))
    squared = GGN(Objective.supervised(model, Subclass(), (x, y)))
    v = torch.randn(plain.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain @ v, wrapped @ v, rtol=1e-11, atol=1e-14)
    assert not torch.allclose(plain @ v, squared @ v, rtol=1e-2)
    z = model(x).detach()
    general = by_double_backward(Subclass(), z, y)
    torch.testing.assert_close(by_columns(general, z)[:, :6], dense(Subclass(), z, y)[:, :6])


def test_a_vocabulary_of_fifty_thousand_needs_no_second_copy(monkeypatch):
    """Temporary memory stays that of a piece: no tensor as large as the logits but the result is made."""
    z = torch.randn(40, 50_000)
    y = torch.randint(0, 50_000, (40,))
    metric = loss_hessian(F.cross_entropy, z, y, memory_budget=0)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not func.is_view:
                sizes.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        product = metric(torch.ones_like(z))
    assert product.shape == z.shape
    large = [size for size in sizes if size > 4 * max(loss_hessians.PIECE, 50_000)]
    assert set(large) == {z.numel() * 4}
    assert float(product.abs().max()) < 1e-7
