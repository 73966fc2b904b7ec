"""Blocks index the flat vector correctly, and a partition claims every coordinate exactly once."""

import pytest
import torch
from sharpscope.landscape.blocks import Block, Partition, partition
from sharpscope.landscape.layout import Layout
from sharpscope.landscape.objective import Objective
from torch import nn

KINDS = ["parameter", "layer", "head", "neuron"]


class Zoo(nn.Module):
    """Something of everything: tied head, attention, norms, convolutions, a tensor of its own, a frozen one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.plain = nn.Linear(5, 3, bias=False)
        self.mixed = nn.Bilinear(2, 3, 4)
        self.cell = nn.LSTM(3, 2)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight


@pytest.fixture
def layout():
    return Layout(("a", "b", "c"), (torch.Size([3, 4]), torch.Size([]), torch.Size([2, 3, 2])))


BLOCKS = {
    "whole": [("b", None), ("a", None)],
    "bare name": ["c"],
    "rows": [("a", (slice(1, 3),))],
    "columns": [("a", (slice(None), slice(0, 4, 2)))],
    "box and whole": [("c", (slice(None), slice(1, 2), slice(0, 1))), ("b", None)],
    "positions": [("c", torch.tensor([7, 0, 3])), ("a", [5])],
    "mask": [("a", torch.arange(12).view(3, 4) % 5 == 1)],
    "one slice": [("a", slice(2, 3))],
}


@pytest.mark.parametrize("parts", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("batch", [(), (5,)], ids=["flat", "batched"])
def test_gather_and_scatter_agree_with_the_indices(layout, parts, batch):
    block = Block("b", parts)
    n = layout.num_parameters
    flat = torch.randn(*batch, n)
    named = {
        name: piece.reshape((*batch, *shape))
        for name, piece, shape in zip(layout.names, flat.split(layout.sizes, dim=-1), layout.shapes, strict=True)
    }
    indices = block.indices(layout)
    assert block.size(layout) == len(indices)
    assert torch.equal(block.gather(named, batch_dims=len(batch)), flat[..., indices])

    v = torch.randn(*batch, len(indices))
    scattered = block.scatter(v, layout)
    assert tuple(scattered) == block.parameters
    full = {name: scattered.get(name, torch.zeros_like(tensor)) for name, tensor in named.items()}
    expected = torch.zeros(*batch, n)
    expected[..., indices] = v
    together = torch.cat([full[name].reshape(*batch, -1) for name in layout.names], dim=-1)
    assert torch.equal(together, expected)


def test_indices_of_a_box_are_row_major(layout):
    block = Block("b", [("a", (slice(1, 3), slice(0, 4, 2)))])
    assert block.indices(layout).tolist() == [4, 6, 8, 10]
    assert Block("b", ["b"]).indices(layout).tolist() == [12]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_claims_every_coordinate_once(kind):
    model = Zoo()
    blocks = partition(model, kind)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert blocks.layout.names == tuple(trainable)
    assert blocks.coverage == 1.0
    assert blocks.uncovered == {}
    labels = blocks.labels()
    assert torch.bincount(labels).tolist() == list(blocks.sizes.values())
    assert sum(blocks.sizes.values()) == sum(p.numel() for p in trainable.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_a_wrapped_module_and_its_module_give_the_same_blocks(kind):
    model = Zoo()
    expected = partition(model, kind)
    objective = Objective(model, lambda m, batch: batch.sum() * m.scale, torch.ones(2))
    for other in (objective, nn.DataParallel(model), torch.compile(model)):
        found = partition(other, kind)
        assert list(found) == list(expected)
        assert torch.equal(found.labels(), expected.labels())


def test_names():
    model = Zoo()
    layers = list(partition(model, "layer"))
    assert layers[:3] == ["(root)", "embed", "encoder.self_attn"]
    neurons = list(partition(model, "neuron"))
    for name in ("encoder.self_attn.q.neuron7", "encoder.linear1.neuron15", "up.neuron5", "embed.weight", "norm.bias"):
        assert name in neurons
    assert not any(name.startswith("head.neuron") for name in neurons), "a tied embedding is not divided"
    assert "head.bias" in neurons
    assert list(partition(nn.Linear(3, 2), "neuron")) == ["neuron0", "neuron1"]


def test_the_layer_of_a_parametrised_weight_is_the_module_it_belongs_to():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert list(partition(model, "layer")) == ["0"]
    assert partition(model, "neuron").coverage == 1.0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (5,)),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 8)),
        (nn.Conv2d(2, 3, 3), (2, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    ],
    ids=str,
)
def test_a_neuron_is_what_one_output_depends_on(layer, shape):
    x = torch.randn(2, *shape)
    before = layer(x)
    for i, block in enumerate(partition(layer, "neuron").values()):
        moved = {name: p.detach().clone() for name, p in layer.named_parameters()}
        for name, change in block.scatter(torch.ones(block.size(Layout.of(moved))), Layout.of(moved)).items():
            moved[name] += change
        after = torch.func.functional_call(layer, moved, (x,))
        changed = [c for c in range(before.shape[1]) if not torch.equal(before[:, c], after[:, c])]
        assert changed == [i]


def test_globs_give_one_block_for_every_outermost_match():
    model = Zoo()
    assert list(partition(model, "encoder.*"))[:2] == ["encoder.self_attn", "encoder.linear1"]
    both = partition(model, ["*.linear?", "*conv*"])
    assert list(both) == ["encoder.linear1", "encoder.linear2", "conv"]
    assert both["conv"].parameters == ("conv.weight", "conv.bias")
    assert set(both.uncovered) == set(both.layout.names) - {n for block in both.values() for n in block.parameters}
    assert both.num_covered == sum(both.sizes.values())


def test_a_second_name_of_a_tied_parameter_finds_it():
    model = Zoo()
    del model.head.bias
    model.head.register_parameter("bias", None)
    assert partition(model, "head.weight")["head.weight"].parameters == ("embed.weight",)


def test_a_mapping_takes_unions_of_names_and_globs():
    blocks = partition(Zoo(), {"tokens": "embed", "norms": ["norm", "*.norm?"], "own": Block("x", ["scale"])})
    assert list(blocks) == ["tokens", "norms", "own"]
    assert blocks["norms"].parameters == (
        "encoder.norm1.weight",
        "encoder.norm1.bias",
        "encoder.norm2.weight",
        "encoder.norm2.bias",
        "norm.weight",
        "norm.bias",
    )
    again = partition(Zoo(), blocks)
    assert torch.equal(again.labels(), blocks.labels())


def test_a_closure_has_parameters_and_layers_but_no_neurons():
    x = torch.randn(3, requires_grad=True)
    objective = Objective.from_closure(lambda pixels: (pixels**2).sum(), {"image.pixels": x})
    assert list(partition(objective)) == ["image.pixels"]
    assert list(partition(objective, "layer")) == ["image"]
    assert list(partition(objective, "image")) == ["image"]
    for kind in ("head", "neuron"):
        with pytest.raises(ValueError, match="no module to look into"):
            partition(objective, kind)


def test_overlap_is_refused_unless_meant():
    model = nn.Linear(3, 2)
    row, entry = Block("row", [("weight", (slice(0, 1),))]), Block("entry", [("weight", [2, 4])])
    with pytest.raises(ValueError, match=r"'entry' shares coordinates of 'weight' with 'row'.*overlap=True"):
        partition(model, [row, entry])
    blocks = partition(model, [row, entry], overlap=True)
    assert blocks.num_covered == 4
    assert blocks.labels().tolist() == [0, 0, 1, -1, 1, -1, -1, -1]


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("fc.wieght", ValueError, r"'fc.wieght' is none of parameter, layer, head, neuron.*'fc.weight'"),
        ({"x": "fd"}, ValueError, r"'fd'.*near it: 'fc'"),
        ([Block("x", ["fc.wait"])], ValueError, r"block 'x' names the unknown parameter 'fc.wait'.*'fc.weight'"),
        ([], ValueError, "`blocks` is empty"),
        ({"x": []}, ValueError, "`parts` of block 'x' is empty"),
        (
            [Block("x", [("fc.weight", (slice(5, 9),))])],
            ValueError,
            r"block 'x' selects nothing of 'fc.weight'.*\[2, 3\]",
        ),
        ([Block("x", [("fc.weight", [])])], ValueError, "selects nothing"),
        ([Block("x", [("fc.weight", [0, 6])])], ValueError, "positions 0 to 6 in 'fc.weight', which has 6 entries"),
        ([Block("x", [("fc.weight", [-1])])], ValueError, "positions -1 to -1"),
        ([Block("x", [("fc.bias", (slice(1), slice(1)))])], ValueError, "gives 2 slices for 'fc.bias'"),
        ([Block("x", [("fc.weight", [1, 1])])], ValueError, "'x' shares coordinates of 'fc.weight' with 'x'"),
        ([Block("x", ["fc.bias"]), Block("x", ["fc.weight"])], ValueError, "two blocks called 'x'"),
        ([3], TypeError, "`blocks` holds a int"),
        (7, TypeError, "`blocks` is a int"),
    ],
    ids=str,
)
def test_errors_of_partition(blocks, error, message):
    with pytest.raises(error, match=message):
        partition(nn.ModuleDict({"fc": nn.Linear(3, 2)}), blocks)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ("fc.weight", TypeError, "`parts` is the string 'fc.weight'"),
        ([], ValueError, "at least one coordinate"),
        ([("a", (slice(None, None, -1),))], TypeError, "positive steps"),
        ([("a", (3,))], TypeError, "positive steps"),
        ([("a", [1.5])], TypeError, "1-D tensor of integers"),
        ([("a", [[1], [2]])], TypeError, "1-D tensor of integers"),
        ([("a", 1, 2)], TypeError, "a parameter name or a pair"),
    ],
    ids=str,
)
def test_errors_of_blocks(parts, error, message):
    with pytest.raises(error, match=message):
        Block("x", parts)


def test_other_errors(layout):
    with pytest.raises(ValueError, match=r"`v` has shape \[3\]; block 'x' needs \[..., 12\]"):
        Block("x", ["a"]).scatter(torch.zeros(3), layout)
    with pytest.raises(ValueError, match="holds a coordinate twice"):
        Block("x", [("a", (slice(0, 2),)), ("a", [4])]).indices(layout)
    with pytest.raises(TypeError, match="`model` is a dict"):
        partition({}, "parameter")
    with pytest.raises(ValueError, match="`head_count` is 4 but `blocks` is not 'head'"):
        partition(nn.Linear(2, 2), "neuron", head_count=4)
    with pytest.raises(KeyError, match="no block 'weigth'; near it: 'weight'"):
        partition(nn.Linear(2, 2))["weigth"]
    assert repr(Partition([Block("x", ["a"])], layout)) == "Partition(1 blocks, 12 of 25 coordinates)"
