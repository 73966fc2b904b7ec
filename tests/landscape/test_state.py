"""The token of a tensor's contents: it must see every change, also those that leave no version behind."""

import pytest
import torch
from sharpscope import Objective
from sharpscope.landscape.state import COLUMNS, content
from torch import nn

SHAPES = [(2,), (7, 5), (COLUMNS,), (3, COLUMNS), (COLUMNS + 3, 3)]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8]


def make(shape, dtype):
    numel = torch.Size(shape).numel()
    # Neighbours differ in every type, also in the seven bits of bfloat16.
    return (torch.arange(numel) % 97 + 1).to(dtype).reshape(shape)


def swapped(t, i, j):
    other = t.clone().reshape(-1)
    other[[i, j]] = other[[j, i]]
    return other.reshape(t.shape)


CHANGES = {
    "first two swapped": lambda t: swapped(t, 0, 1),
    "first and last swapped": lambda t: swapped(t, 0, t.numel() - 1),
    "reversed": lambda t: t.reshape(-1).flip(0).reshape(t.shape),
    "rows rolled": lambda t: t.reshape(-1).roll(1).reshape(t.shape),
    "last entry": lambda t: torch.cat([t.reshape(-1)[:-1], t.reshape(-1)[-1:] + 1]).reshape(t.shape),
    "first entry": lambda t: torch.cat([t.reshape(-1)[:1] + 1, t.reshape(-1)[1:]]).reshape(t.shape),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_through_data_is_seen(dtype, shape, change):
    tensor = make(shape, dtype)
    new = CHANGES[change](tensor)
    assert not torch.equal(new, tensor)
    before, version = content(tensor), tensor._version
    tensor.data.copy_(new)
    assert tensor._version == version
    assert content(tensor) != before


@pytest.mark.parametrize("shape", SHAPES)
def test_flipped_signs_are_seen(shape):
    tensor = make(shape, torch.float32)
    before = content(tensor)
    tensor.data[0].neg_()
    assert content(tensor) != before
    after = content(tensor)
    tensor.data.neg_()
    assert content(tensor) not in (before, after)


def test_two_places_that_change_oppositely_are_seen():
    tensor = make((2, COLUMNS), torch.float64)
    before = content(tensor)
    tensor.data[0, 3] += 0.5
    tensor.data[1, 4] -= 0.5
    assert content(tensor) != before


@pytest.mark.parametrize("shape", [(), (0,), *SHAPES])
def test_what_did_not_change_has_the_same_token(shape):
    tensor = make(shape, torch.float32)
    assert content(tensor) == content(tensor)
    assert content(nn.Parameter(tensor)) == content(tensor.detach())


def test_sparse_tensors_show_values_and_places():
    for convert in (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr):
        tensor = convert(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        before = content(tensor)
        tensor.values().data.mul_(2)
        after = content(tensor)
        assert after != before
        indices = tensor.indices()[0] if tensor.layout == torch.sparse_coo else tensor.col_indices()
        indices.data.copy_(indices.flip(0))
        assert content(tensor) not in (before, after)


def test_the_state_of_an_objective_sees_weights_buffers_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    objective = Objective.supervised(model, nn.MSELoss(), (x, y))
    tokens = [objective.state_token()]
    assert objective.state_token() == tokens[0]
    for tensor in (model[0].weight, model[1].running_mean, x, y):
        tensor.data.copy_(tensor.data.flip(0) + 1)
        tokens.append(objective.state_token())
    assert len(set(tokens)) == len(tokens)
