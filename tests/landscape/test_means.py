"""A batch's loss must be the mean over what is counted: what is caught when it is not, and what cures it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Objective
from torch import nn

PADDING = 0
WEIGHTS = torch.tensor([0.5, -1.0], dtype=torch.float64)


def squares(model, batch):
    """Mean over the entries of x that are no padding; a token's term is (w·[x, x²] − 1)²."""
    kept = batch[batch != PADDING]
    return (model(torch.stack([kept, kept.square()], dim=1)).squeeze(1) - 1).square().mean()


def tokens_of(batch):
    return int((batch != PADDING).sum())


@pytest.fixture
def linear():
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = WEIGHTS.clone().unsqueeze(0)
    return model


def padded(*lengths, width=4):
    """One row per length, its last entries padding."""
    torch.manual_seed(0)
    rows = torch.rand(len(lengths), width, dtype=torch.float64) + 0.5
    for row, length in zip(rows, lengths, strict=True):
        row[length:] = PADDING
    return rows


def assert_equals_one_batch(objective, model, whole):
    loss = squares(model, whole)
    (gradient,) = torch.autograd.grad(loss, model.weight)
    assert objective.loss() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(objective.gradient(), gradient.reshape(-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("lengths", "per_batch"), [((4, 4, 1, 1), 2), ((4, 1), 1), ((4, 3, 2, 1), 1), ((4, 3, 2, 1), 2)]
)
def test_token_means_over_batches_of_one_size_need_count(linear, lengths, per_batch):
    whole = padded(*lengths)
    data = [(batch,) for batch in whole.split(per_batch)]
    loss = lambda model, batch: squares(model, batch[0])
    with pytest.raises(ValueError, match=r"not the mean over its examples.*count=lambda"):
        Objective(linear, loss, data).loss()
    counted = Objective(linear, loss, data, count=lambda batch: tokens_of(batch[0]))
    assert_equals_one_batch(counted, linear, whole)


def test_counted_token_means_may_be_chunked(linear):
    whole = padded(4, 1, 3, 2, 4)
    for chunk_size in (1, 2, 3):
        objective = Objective(linear, squares, whole, count=tokens_of, chunk_size=chunk_size)
        assert_equals_one_batch(objective, linear, whole)


def test_batches_of_different_shapes_ask_for_count(linear):
    # Without padding every half of a batch agrees with it; only the lengths differ, so examples weigh differently.
    data = [{"x": padded(4, 4, width=4)}, {"x": padded(2, 2, width=2)}]
    loss = lambda model, batch: squares(model, batch["x"])
    with pytest.raises(ValueError, match="different shapes.*count=lambda"):
        Objective(linear, loss, data).loss()
    everything = torch.cat([batch["x"].reshape(-1) for batch in data])
    counted = Objective(linear, loss, data, count=lambda batch: batch["x"].numel())
    assert_equals_one_batch(counted, linear, everything)


def test_a_count_that_ignores_slicing_is_refused_when_chunked(linear):
    whole = padded(4, 3, 2, 4)
    count = lambda batch: 13
    assert_equals_one_batch(Objective(linear, squares, whole, count=count), linear, whole)
    with pytest.raises(ValueError, match=r"`count` gives 13 for a batch and 13 \+ 13 for its parts"):
        Objective(linear, squares, whole, count=count, chunk_size=2).loss()


def test_a_sum_that_is_none_is_refused_when_chunked(linear):
    whole = padded(4, 4, 4, 4)
    with pytest.raises(ValueError, match="not the sum over its examples.*chunk_size=None"):
        Objective(linear, squares, whole, reduction="sum", chunk_size=2).loss()
    total = lambda model, batch: squares(model, batch) * tokens_of(batch)
    objective = Objective(linear, total, whole, reduction="sum", chunk_size=3)
    assert objective.loss() == pytest.approx(total(linear, whole).item(), rel=1e-13)


def test_a_loss_that_is_no_mean_is_fine_on_one_whole_batch(linear):
    whole = padded(4, 2, 3)
    assert_equals_one_batch(Objective(linear, squares, whole), linear, whole)


def test_a_loss_that_needs_whole_batches_says_so(linear):
    def pairs(model, batch):
        if len(batch) % 2:
            raise RuntimeError("odd")
        return squares(model, batch)

    with pytest.raises(
        ValueError, match="cannot be cut or joined: the loss fails on part of it with RuntimeError: odd"
    ):
        Objective(linear, pairs, padded(4, 4), chunk_size=1).loss()


def test_options_bound_by_partial_are_found_out(mlp):
    model, (x, y) = mlp
    criterion = partial(F.cross_entropy, ignore_index=0)
    order = torch.argsort(y, descending=True, stable=True)  # the batches ignore different numbers of labels
    x, y = x[order], y[order]
    for sizes in ((35, 35), (10, 30, 30)):
        data = list(zip(x.split(sizes), y.split(sizes), strict=True))
        with pytest.raises(ValueError, match="not the mean over its examples"):
            Objective.supervised(model, criterion, data).loss()
        counted = Objective.supervised(model, criterion, data, count=lambda batch: int((batch[1] != 0).sum()))
        assert counted.loss() == pytest.approx(criterion(model(x), y).item(), rel=1e-13)
    kept = [(x[:5], y[:5]), (x[5:9], y[5:9])]
    assert int((y[:9] == 0).sum()) == 0
    # Where nothing is ignored the mean is over examples after all.
    objective = Objective.supervised(model, criterion, kept)
    assert objective.loss() == pytest.approx(criterion(model(x[:9]), y[:9]).item(), rel=1e-13)
