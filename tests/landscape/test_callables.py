"""Fingerprints: another loss is another objective, the same loss with other weights is not."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Objective
from torch import nn


def of_loss(loss):
    return lambda model, data: Objective(model, loss, data)


def of_criterion(criterion, **options):
    return lambda model, data: Objective.supervised(model, criterion, data, **options)


def scaled(factor):
    return of_loss(lambda model, batch: factor * F.cross_entropy(model(batch[0]), batch[1]))


def nested(factor):
    inner = lambda z: factor * z
    return of_loss(lambda model, batch: F.cross_entropy(inner(model(batch[0])), batch[1]))


def with_default(factor):
    return of_loss(lambda model, batch, factor=factor: factor * F.cross_entropy(model(batch[0]), batch[1]))


def with_keyword(factor):
    return of_loss(lambda model, batch, *, factor=factor: factor * F.cross_entropy(model(batch[0]), batch[1]))


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch):
        return self.factor * F.cross_entropy(model(batch[0]), batch[1])

    def method(self, model, batch):
        return self(model, batch)


def class_weights(*weights):
    return nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float64))


PAIRS = {
    "mse or l1": (
        of_loss(lambda m, b: F.mse_loss(m(b[0]).mean(1), b[1].double())),
        of_loss(lambda m, b: F.l1_loss(m(b[0]).mean(1), b[1].double())),
    ),
    "constant": (
        of_loss(lambda m, b: 2.0 * F.cross_entropy(m(b[0]), b[1])),
        of_loss(lambda m, b: 3.0 * F.cross_entropy(m(b[0]), b[1])),
    ),
    "constant in an inner function": (
        of_loss(lambda m, b: F.cross_entropy((lambda z: 2.0 * z)(m(b[0])), b[1])),
        of_loss(lambda m, b: F.cross_entropy((lambda z: 3.0 * z)(m(b[0])), b[1])),
    ),
    "captured number": (scaled(2.0), scaled(3.0)),
    "captured tensor": (scaled(torch.tensor(2.0)), scaled(torch.tensor(3.0))),
    "captured by an inner function": (nested(2.0), nested(3.0)),
    "default": (with_default(2.0), with_default(3.0)),
    "keyword default": (with_keyword(2.0), with_keyword(3.0)),
    "callable object": (of_loss(Scaled(2.0)), of_loss(Scaled(3.0))),
    "bound method": (of_loss(Scaled(2.0).method), of_loss(Scaled(3.0).method)),
    "partial": (
        of_criterion(partial(F.cross_entropy, label_smoothing=0.1)),
        of_criterion(partial(F.cross_entropy, label_smoothing=0.2)),
    ),
    "function": (of_criterion(F.cross_entropy), of_criterion(F.multi_margin_loss)),
    "ignore_index": (
        of_criterion(nn.CrossEntropyLoss()),
        of_criterion(nn.CrossEntropyLoss(ignore_index=0)),
    ),
    "label_smoothing": (
        of_criterion(nn.CrossEntropyLoss(label_smoothing=0.1)),
        of_criterion(nn.CrossEntropyLoss(label_smoothing=0.2)),
    ),
    "class weights": (of_criterion(class_weights(1, 1, 2)), of_criterion(class_weights(1, 2, 1))),
    "reduction": (of_criterion(nn.CrossEntropyLoss()), of_criterion(nn.CrossEntropyLoss(reduction="sum"))),
    "split": (
        of_criterion(nn.CrossEntropyLoss(), split=lambda b: (b[0], b[1])),
        of_criterion(nn.CrossEntropyLoss(), split=lambda b: (-b[0], b[1])),
    ),
    "predict": (
        of_criterion(nn.CrossEntropyLoss(), predict=lambda m, x: m(x)),
        of_criterion(nn.CrossEntropyLoss(), predict=lambda m, x: m(x).tanh()),
    ),
    "count": (
        of_criterion(nn.CrossEntropyLoss(), count=lambda b: len(b[1])),
        of_criterion(nn.CrossEntropyLoss(), count=lambda b: 2 * len(b[1])),
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_another_loss_has_another_fingerprint_and_weights_have_no_part_in_it(mlp, case):
    model, data = mlp
    first, second = (make(model, data).fingerprint() for make in PAIRS[case])
    assert first != second
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert [make(model, data).fingerprint() for make in PAIRS[case]] == [first, second]


@pytest.mark.parametrize("make", [scaled, nested, with_default, with_keyword, lambda f: of_loss(Scaled(f))])
def test_the_same_loss_made_twice_has_one_fingerprint(mlp, make):
    assert make(2.0)(*mlp).fingerprint() == make(2.0)(*mlp).fingerprint()


def test_a_model_captured_by_its_loss_does_not_bring_its_weights_in(mlp):
    model, data = mlp
    make = lambda: Objective(model, lambda _, b: F.cross_entropy(model(b[0]), b[1]), data)
    before = make().fingerprint()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert make().fingerprint() == before


def test_evaluating_does_not_change_a_fingerprint(mlp):
    model, data = mlp
    objective = Objective.supervised(model, class_weights(1, 2, 3), data)
    before = objective.fingerprint()
    objective.loss(), objective.gradient()
    assert objective.fingerprint() == before
