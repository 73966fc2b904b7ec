"""An objective on part of the examples."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope.hessian import Hessian
from sharpscope.landscape.objective import Objective
from torch import nn

MODEL_SEED = 3


def model_of(classes=4):
    torch.manual_seed(MODEL_SEED)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, classes)).double()


def data(n=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (n,), generator=generator)


def test_rows_of_one_batch_are_evenly_spaced_and_averaged():
    x, y = data()
    model = model_of()
    part = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)).subset(1 / 8)
    rows = [4, 12, 20, 28]
    assert part.num_examples == 4
    assert part.loss() == pytest.approx(float(F.cross_entropy(model(x[rows]), y[rows])), rel=1e-12)


def test_whole_batches_are_taken_where_there_are_enough_and_weighted_by_their_count():
    x, y = data(36)
    sizes = [3, 5, 2, 6, 4, 4, 5, 7]
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    model = model_of()
    part = Objective.supervised(model, nn.CrossEntropyLoss(), batches).subset(1 / 4)
    taken = [2, 6]
    X, Y = (torch.cat([batches[i][k] for i in taken]) for k in (0, 1))
    assert part.num_examples == len(Y)
    assert part.loss() == pytest.approx(float(F.cross_entropy(model(X), Y)), rel=1e-12)


def test_ignored_targets_do_not_count():
    x, y = data()
    y[::8] = -100
    y[4] = -100
    model = model_of()
    part = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)).subset(1 / 4)
    rows = torch.arange(2, 32, 4)
    assert part.loss() == pytest.approx(float(F.cross_entropy(model(x[rows]), y[rows])), rel=1e-12)


def test_flattened_targets_are_cut_with_their_examples():
    """[b, t] inputs with [b · t] targets, as language models have them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (16 * 3,), generator=generator)
    model = model_of()

    def loss(module, batch):
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1])

    part = Objective(model, loss, (x, y)).subset(1 / 8)
    rows = [4, 12]
    truth = F.cross_entropy(model(x[rows]).flatten(0, 1), y.view(16, 3)[rows].flatten())
    assert part.loss() == pytest.approx(float(truth), rel=1e-12)


def test_too_few_examples_a_closure_and_a_bad_share():
    objective = Objective.supervised(model_of(), nn.CrossEntropyLoss(), data(8))
    assert objective.subset(1 / 8) is None
    weight = torch.ones(3, requires_grad=True)
    assert Objective.from_closure(lambda w: w.square().sum(), weight).subset(0.5) is None
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`share` is"):
            objective.subset(share)


def test_it_follows_the_weights_and_leaves_the_whole_alone():
    model = model_of()
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data())
    whole, part = objective.loss(), objective.subset(0.25)
    before = part.loss()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    assert part.loss() != before
    with torch.no_grad():
        model[0].weight.div_(1.5)
    assert part.loss() == pytest.approx(before, rel=1e-12)
    assert objective.loss() == pytest.approx(whole, rel=1e-12)
    assert objective.num_examples == 32


def test_a_coarse_hessian_is_that_of_an_eighth_of_the_examples():
    coarse = Hessian(Objective.supervised(model_of(), nn.CrossEntropyLoss(), data())).coarse()
    assert coarse is not None
    assert coarse.objective.num_examples == 4
