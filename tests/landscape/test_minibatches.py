"""Random minibatches of an objective."""

import math

import pytest
import torch
from sharpscope import Objective
from sharpscope.landscape.minibatches import minibatches
from torch import nn


def test_minibatches_hold_each_example_equally_often():
    model, y = nn.Linear(3, 1).double(), torch.randn(5, 1, dtype=torch.float64)
    objective = Objective.supervised(model, nn.MSELoss(), (torch.eye(5, 3, dtype=torch.float64), y))
    drawn = [part._batches.in_memory()[1] for part in minibatches(objective, 2, 600)]
    assert all(len(target.unique()) == 2 for target in drawn)
    counts = torch.stack([torch.cat(drawn) == value for value in y]).sum(dim=(1, 2)).double()
    assert float((counts - 240).abs().max()) < 4 * math.sqrt(600 * 0.4 * 0.6)


def test_minibatches_of_flattened_targets():
    """Targets [b · length], as language models have them, go with their sequences."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    tokens, targets = torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6, 3))
    objective = Objective.supervised(
        model,
        nn.CrossEntropyLoss(),
        (tokens, targets.reshape(-1)),
        predict=lambda module, inputs: module(inputs).flatten(0, 1),
    )
    [part] = minibatches(objective, 4, 1)
    inputs, labels = part._batches.in_memory()
    for sequence, own in zip(inputs, labels.reshape(4, 3), strict=True):
        assert any(bool((sequence == t).all() and (own == l).all()) for t, l in zip(tokens, targets, strict=True))


def test_their_mean_loss_is_the_whole_loss():
    """Whole data in pieces of its own batches, with a term left out: the weights are those of the whole."""
    torch.manual_seed(3)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randint(0, 4, (10,))
    y[2] = -100
    objective = Objective.supervised(
        model, nn.CrossEntropyLoss(), list(zip(x.split([4, 6]), y.split([4, 6]), strict=True))
    )
    [whole] = minibatches(objective, 10, 1)
    assert whole.loss() == pytest.approx(objective.loss(), rel=1e-12)
    torch.testing.assert_close(whole.gradient(), objective.gradient())
    [part] = minibatches(objective, 3, 1, seed=1)
    assert part.num_examples == 3


def test_a_loss_that_takes_whole_batches_only():
    def refusing(model, batch):
        if len(batch) != 6:
            raise ValueError("give six rows")
        return model(batch).square().mean()

    objective = Objective(nn.Linear(2, 1), refusing, torch.randn(6, 2))
    with pytest.raises(ValueError, match="does not take 2 examples.*six rows"):
        list(minibatches(objective, 2, 1))
