"""What may be a batch: containers keep their class, the user's own objects stay as they are."""

from collections import UserDict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sharpscope import GGN, Hessian, Objective
from sharpscope.landscape.batches import Batches, digest, examples, map_tensors
from torch import Tensor, nn


class Encoding(UserDict):
    """What tokenisers return: a mapping that is no dict, with attribute access."""

    def __getattr__(self, name):
        if name in ("data", "__setstate__", "__deepcopy__"):
            raise AttributeError(name)
        return self.data[name]


class OwnMapping(MutableMapping):
    """A mapping that copy.copy duplicates without the dictionary behind it."""

    def __init__(self, items):
        self.held = dict(items)

    def __getitem__(self, key):
        return self.held[key]

    def __setitem__(self, key, value):
        self.held[key] = value

    def __delitem__(self, key):
        del self.held[key]

    def __iter__(self):
        return iter(self.held)

    def __len__(self):
        return len(self.held)


class NamedDict(dict):
    kind = "named"

    @property
    def inputs(self):
        return self["x"]


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    x: Tensor
    y: Tensor
    name: str = "sample"


FORMS = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "dict subclass": (lambda x, y: NamedDict(x=x, y=y), lambda b: (b.inputs, b["y"])),
    "UserDict": (lambda x, y: Encoding({"x": x, "y": y}), lambda b: (b.x, b.y)),
    "own mapping": (lambda x, y: OwnMapping({"x": x, "y": y}), lambda b: (b["x"], b["y"])),
    "namedtuple": (Pair, lambda b: (b.x, b.y)),
    "dataclass": (Sample, lambda b: (b.x, b.y)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_container_keeps_its_class_through_chunks_and_casts(make_problem, form):
    make, split = FORMS[form]
    model, (x, y) = make_problem("mlp")
    data = [make(x[:40].float(), y[:40]), make(x[40:].float(), y[40:])]

    def loss(model, batch):
        assert type(batch) is type(data[0])
        inputs, targets = split(batch)
        return F.cross_entropy(model(inputs), targets)

    expected = F.cross_entropy(model(x.float().double()), y).item()
    for chunk_size in (None, 16):
        objective = Objective(model, loss, data, chunk_size=chunk_size, dtype=torch.float64)
        assert objective.loss() == pytest.approx(expected, rel=1e-13)
    supervised = Objective.supervised(model, nn.CrossEntropyLoss(), data, split=split, dtype=torch.float64)
    assert supervised.loss() == pytest.approx(expected, rel=1e-13)
    assert [split(batch)[0].dtype for batch in data] == [torch.float32] * 2
    assert [len(split(batch)[1]) for batch in data] == [40, 30]


def test_what_is_no_tensor_is_kept():
    batch = Sample(torch.arange(4.0), torch.arange(4), "kept")
    part = examples(batch, 1, 3, 4)
    assert (part.x.tolist(), part.y.tolist(), part.name) == ([1.0, 2.0], [1, 2], "kept")
    assert batch.x.tolist() == [0.0, 1.0, 2.0, 3.0]
    doubled = map_tensors(Encoding(x=torch.ones(2), note="n"), lambda t: 2 * t)
    assert (type(doubled), doubled.x.tolist(), doubled.note) == (Encoding, [2.0, 2.0], "n")


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_tuples_of_batches_are_ambiguous(mlp, kind):
    model, (x, y) = mlp
    item = {"x": x, "y": y} if kind is dict else kind((x, y))
    with pytest.raises(ValueError, match=r"tuple of 2 \w+s.*pass \[data\] for one batch, or list\(data\)"):
        Objective.supervised(model, nn.CrossEntropyLoss(), (item, item))


def test_a_nested_batch_in_a_list_is_one_batch(mlp):
    model, (x, y) = mlp
    nested = ((x, x), (y, y))
    loss = lambda model, batch: F.cross_entropy(model(batch[0][1]), batch[1][0])
    assert Objective(model, loss, [nested]).loss() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-13)


def test_a_list_that_grows_later_does_not_change_the_objective(mlp):
    model, (x, y) = mlp
    data = [(x[:30], y[:30])]
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    expected = objective.loss()
    data.append((x[30:], y[30:]))
    assert objective.num_batches == 1
    assert objective.loss() == expected == pytest.approx(F.cross_entropy(model(x[:30]), y[:30]).item(), rel=1e-13)


@pytest.mark.parametrize("engine", ["double-backward", "forward-over-reverse", "finite-difference"])
@pytest.mark.parametrize("source", ["list", "iterable"])
def test_a_loss_may_take_things_out_of_its_batch(mlp, dense_hessian, engine, source):
    model, (x, y) = mlp
    data = [{"x": x[:35], "y": y[:35]}, {"x": x[35:], "y": y[35:]}]

    class Loader:
        def __iter__(self):
            return iter(data)

    def loss(model, batch):
        targets = batch.pop("y")
        return F.cross_entropy(model(**{"input": batch["x"]}), targets)

    exact = dense_hessian(lambda: F.cross_entropy(model(x), y), model.parameters())
    for chunk_size in (None, 10):
        objective = Objective(model, loss, data if source == "list" else Loader(), chunk_size=chunk_size)
        hessian = Hessian(objective, engine=engine)
        V = torch.randn(exact.shape[0], 10, dtype=torch.float64)
        torch.testing.assert_close(hessian @ V, exact @ V, rtol=1e-6, atol=1e-7)
    assert all(set(batch) == {"x", "y"} for batch in data)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs(layout):
    torch.manual_seed(0)
    dense = torch.randn(6, 5, dtype=torch.float64) * (torch.rand(6, 5) < 0.4)
    sparse = dense.to_sparse() if layout == torch.sparse_coo else dense.to_sparse_csr()
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    model = nn.Linear(5, 2).double()

    def objective(x):
        predict = lambda model, x: x @ model.weight.T + model.bias
        return Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), predict=predict)

    expected = objective(dense)
    found = objective(sparse)
    v = torch.randn(12, dtype=torch.float64)
    assert found.loss() == pytest.approx(expected.loss(), rel=1e-13)
    torch.testing.assert_close(found.gradient(), expected.gradient(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Hessian(found) @ v, Hessian(expected) @ v, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(GGN(found) @ v, GGN(expected) @ v, rtol=1e-11, atol=1e-13)


def test_digests_tell_contents_shapes_and_types_apart():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    same = digest((x,)).hexdigest()
    assert digest({"x": x.clone()}).hexdigest() == same
    assert digest(x.to_sparse()).hexdigest() == digest(x.to_sparse_csr()).hexdigest() == same
    others = (x.T + 1, x.flatten(), x.double(), -x, x.flip(0), x.to_sparse() * 2)
    assert len({same, *(digest(other).hexdigest() for other in others)}) == len(others) + 1


def test_the_users_tensors_are_neither_copied_nor_given_a_history():
    x = torch.randn(3, 2, requires_grad=True)
    (batch,) = Batches(x, torch.device("cpu"), None).read()
    assert batch.data_ptr() == x.data_ptr()
    assert not batch.requires_grad
