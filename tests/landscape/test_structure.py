"""Roles of tensors are read from the structure; blocks of a tensor are means that agree with the blocks themselves."""

import pytest
import torch
from sharpscope.dynamics.workloads.models import CharTransformer, digits_cnn, digits_mlp
from sharpscope.landscape.blocks import Block, Partition, partition
from sharpscope.landscape.divisions import adam_mini_divisions, divisions_of
from sharpscope.landscape.layout import Layout
from sharpscope.landscape.projections import output_axis
from sharpscope.landscape.reductions import Piece, Reduction
from sharpscope.landscape.slim_divisions import slim_divisions
from sharpscope.landscape.structure import structure
from torch import nn


class Conv1D(nn.Module):
    """GPT-2's linear layer, weight [inputs, outputs]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class FusedConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.c_attn, self.c_proj = Conv1D(36, 12), Conv1D(12, 12)


class GroupedQueries(nn.Module):
    """Four query heads of size 3, two key and value heads."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.q_proj, self.o_proj = nn.Linear(10, 12), nn.Linear(12, 10, bias=False)
        self.k_proj, self.v_proj = nn.Linear(10, 6), nn.Linear(10, 6)


class TransposedDecoder(nn.Module):
    """GPT-2's layout: transposed weights, fused attention, learned positions called wpe."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, 12), nn.Embedding(16, 12)
        self.attn = FusedConv1D()
        self.c_fc, self.c_proj = Conv1D(48, 12), Conv1D(12, 48)
        self.ln_f = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 50, bias=False)


class Misleading(nn.Module):
    """Names that say something else than the structure."""

    def __init__(self):
        super().__init__()
        self.key = nn.Linear(6, 5)
        self.mlp = nn.LayerNorm(5)
        self.query_norm_bias_net = nn.Linear(5, 4)


def roles(model):
    return {name: role.role for name, role in structure(model).items()}


def test_a_transformer_with_fused_attention_and_tied_output():
    found = structure(CharTransformer(50, num_layers=1))
    assert {name: role.role for name, role in found.items() if role.role not in ("bias", "norm")} == {
        "embedding.weight": "token embedding",
        "positions.weight": "position embedding",
        "layers.0.attention.qkv.weight": "fused qkv",
        "layers.0.attention.out_proj.weight": "attention output",
        "layers.0.mlp.0.weight": "up",
        "layers.0.mlp.2.weight": "down",
    }
    fused = found["layers.0.attention.qkv.weight"]
    assert [(s.role, s.start, s.stop, s.num_heads) for s in fused.segments] == [
        ("query", 0, 64, 4),
        ("key", 64, 128, 4),
        ("value", 128, 192, 4),
    ]


def test_transposed_layers_have_their_outputs_on_the_second_axis():
    found = structure(TransposedDecoder())
    assert roles(TransposedDecoder()) == {
        "wte.weight": "token embedding",
        "wpe.weight": "position embedding",
        "attn.c_attn.weight": "fused qkv",
        "attn.c_attn.bias": "bias",
        "attn.c_proj.weight": "attention output",
        "attn.c_proj.bias": "bias",
        "c_fc.weight": "up",
        "c_fc.bias": "bias",
        "c_proj.weight": "down",
        "c_proj.bias": "bias",
        "ln_f.weight": "norm",
        "ln_f.bias": "bias",
        "lm_head.weight": "head",
    }
    axes = {name: role.axis for name, role in found.items() if role.axis is not None}
    assert axes == {
        **dict.fromkeys(("wte.weight", "wpe.weight", "lm_head.weight"), 0),
        **dict.fromkeys(("attn.c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "c_proj.weight"), 1),
    }


def test_names_do_not_decide_where_the_structure_does():
    assert roles(Misleading()) == {
        "key.weight": "input",
        "key.bias": "bias",
        "mlp.weight": "norm",
        "mlp.bias": "bias",
        "query_norm_bias_net.weight": "head",
        "query_norm_bias_net.bias": "bias",
    }


def test_grouped_queries_torch_attention_convolutions_and_recurrent_layers():
    grouped = structure(GroupedQueries())
    heads = {name: r.segments[0].num_heads for name, r in grouped.items() if r.role in ("query", "key", "value")}
    assert heads == {"q_proj.weight": 4, "k_proj.weight": 2, "v_proj.weight": 2}
    torch_layer = roles(nn.TransformerEncoderLayer(16, 4, 32))
    assert torch_layer["self_attn.in_proj_weight"] == "fused qkv"
    assert (torch_layer["linear1.weight"], torch_layer["linear2.weight"]) == ("up", "down")
    assert roles(digits_cnn())["1.weight"] == "input"
    assert roles(digits_cnn())["5.weight"] == "convolution"
    assert roles(digits_mlp()) == {
        **{"0.weight": "input", "2.weight": "linear", "4.weight": "head"},
        **dict.fromkeys(("0.bias", "2.bias", "4.bias"), "bias"),
    }
    assert set(roles(nn.LSTM(3, 4)).values()) == {"recurrent", "bias"}


def test_heads_that_nothing_tells_are_a_problem_only_where_heads_are_asked_for():
    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6, bias=False) for _ in range(3))

    found = structure(Open())
    assert roles(Open()) == {"q_proj.weight": "query", "k_proj.weight": "key", "v_proj.weight": "value"}
    assert "head_count=" in found["q_proj.weight"].problem
    with pytest.raises(ValueError, match="head_count="):
        adam_mini_divisions(Open())
    divided = adam_mini_divisions(Open(), head_count=3)
    assert {name: d.reduction.num_blocks for name, d in divided.items()} == {
        "q_proj.weight": 3,
        "k_proj.weight": 3,
        "v_proj.weight": 6,
    }
    assert slim_divisions(Open())["v_proj.weight"].rule == "mean over outputs"


def brute_force(labels, t):
    flat, numbers = t.reshape(-1), labels.reshape(-1)
    return torch.stack([flat[numbers == i].mean() for i in range(int(numbers.max()) + 1)])


@pytest.mark.parametrize(
    "model", [CharTransformer(20, width=8, num_heads=2), TransposedDecoder(), GroupedQueries(), digits_cnn()]
)
def test_means_and_expansions_are_those_of_the_labelled_blocks(model):
    gen = torch.Generator().manual_seed(0)
    for division in adam_mini_divisions(model).values():
        reduction = division.reduction
        t = torch.randn(reduction.shape, generator=gen, dtype=torch.float64)
        labels = reduction.block_labels()
        assert sorted(labels.unique().tolist()) == list(range(reduction.num_blocks))
        means = reduction.mean(t)
        torch.testing.assert_close(means, brute_force(labels, t), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(reduction.expand(means).expand(t.shape), means[labels], rtol=0, atol=0)
        general = Reduction(reduction.shape, 0, (), labels.to(torch.int32))
        torch.testing.assert_close(general.mean(t), means, rtol=1e-12, atol=1e-14)
        assert Reduction.read(list(map(list, [reduction.shape])) + list(reduction.plain[1:])) == reduction


@pytest.mark.parametrize("model", [CharTransformer(20, width=8, num_heads=2), TransposedDecoder(), GroupedQueries()])
def test_heads_are_those_of_the_head_partition(model):
    """Two ways to the same blocks: the rows of head 1 of a query or key are one block of Adam-mini's."""
    layout, heads = Layout.of(dict(model.named_parameters())), partition(model, "head")
    divided = adam_mini_divisions(model)
    checked = 0
    for name, block in heads.items():
        if ".q.head" not in f".{name}" and ".k.head" not in f".{name}":
            continue
        weight, index = block.parts[0]
        inside = torch.zeros(layout.shapes[layout.names.index(weight)], dtype=torch.bool)
        inside[index] = True
        labels = divided[weight].reduction.block_labels()
        number = labels[inside].unique()
        assert len(number) == 1
        assert bool((inside == (labels == number)).all())
        checked += 1
    assert checked >= 4


def test_the_partition_has_the_same_blocks():
    model = CharTransformer(20, width=8, num_heads=2, num_layers=1)
    blocks, divided = partition(model, "adam-mini"), adam_mini_divisions(model)
    assert blocks.coverage == 1.0
    assert len(blocks) == sum(d.reduction.num_blocks for d in divided.values())
    assert blocks["layers.0.norm1.weight"].parts == (("layers.0.norm1.weight", None),)
    again = divisions_of(blocks)
    for name, division in divided.items():
        assert torch.equal(again[name].reduction.block_labels(), division.reduction.block_labels())
    first_key = blocks["layers.0.attention.qkv.weight.block2"].indices(blocks.layout)
    offset = blocks.layout.offsets[blocks.layout.names.index("layers.0.attention.qkv.weight")]
    assert first_key.tolist() == list(range(offset + 8 * 8, offset + 12 * 8))


def test_any_partition_becomes_means_with_labels_only_where_needed():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    layout = Layout.of(dict(model.named_parameters()))
    odd = Block("odd", [("0.weight", torch.tensor([0, 5, 7])), ("1.bias", (slice(1, 2),))])
    made = divisions_of(Partition([odd], layout))
    labels = made["0.weight"].reduction.labels
    assert labels is not None
    assert int((labels == labels.reshape(-1)[0]).sum()) == 3
    assert made["1.bias"].reduction.num_blocks == 2
    assert made["0.bias"].reduction == Reduction.whole((6,))
    for kind, num in (("parameter", 1), ("neuron", 6)):
        reduction = divisions_of(partition(model, kind))["0.weight"].reduction
        assert reduction.labels is None
        assert reduction.num_blocks == num


def test_fused_slices_have_rules_of_their_own():
    model = CharTransformer(20, width=8, num_heads=2, num_layers=1)
    name = "layers.0.attention.qkv.weight"
    assert slim_divisions(model)[name].reduction.pieces == (
        Piece(0, 8, (8, 8), (1,)),
        Piece(8, 16, (8, 8), (1,)),
        Piece(16, 24, (8, 8), (0,)),
    )
    chosen = slim_divisions(model, {f"{name}:value": "both", "layers.*.qkv.weight": "inputs", "query": "outputs"})
    assert [piece.dims for piece in chosen[name].reduction.pieces] == [(1,), (1,), (0, 1)]
    assert slim_divisions(model, {name: "both"})[name].reduction.num_blocks == 1
    transposed = slim_divisions(TransposedDecoder(), {"up": "inputs", "down": "outputs"})
    assert transposed["c_fc.weight"].reduction.pieces[0].dims == (0,)
    assert transposed["c_proj.weight"].reduction.pieces[0].dims == (1,)


def test_what_cannot_be_divided_is_said():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.ones(3, 4, 5))

    with pytest.raises(ValueError, match=r"'experts' \[3, 4, 5\] is unknown.*unmatched='rows'"):
        adam_mini_divisions(Bare())
    assert adam_mini_divisions(Bare(), unmatched="tensor")["experts"].reduction.num_blocks == 1
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(ValueError, match="'0.wieght', which fits no parameter; near it: '0.weight'"):
        slim_divisions(model, {"0.wieght": "inputs"})
    with pytest.raises(ValueError, match="its 2 dimensions are counted from 0"):
        slim_divisions(model, {"0.weight": (2,)})
    with pytest.raises(ValueError, match="which axis counts its outputs is unknown"):
        slim_divisions(model, {"0.bias": "inputs"})
    with pytest.raises(ValueError, match="do not cover axis 0"):
        Reduction.joined((4, 2), 0, [Piece(0, 3, (3, 2), ())])
    with pytest.raises(ValueError, match="`head_count` is 2 but `blocks` is not 'head' or 'adam-mini'"):
        partition(model, "neuron", head_count=2)


def test_attention_is_known_inside_adapters():
    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer
            self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            self.q_proj, self.v_proj = Adapted(nn.Linear(8, 8)), Adapted(nn.Linear(8, 8))
            self.k_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    roles = structure(Attention())
    assert roles["q_proj.base_layer.weight"].role == "query"
    assert roles["k_proj.weight"].role == "key"


def test_a_linear_layer_whose_weight_is_turned_is_read_by_its_shape():
    class Turned(nn.Linear):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            self.weight = nn.Parameter(torch.randn(inputs, outputs))

    assert output_axis(Turned(3, 5)) == 1
    assert output_axis(nn.Linear(3, 5)) == 0
