"""Attention heads: found blocks behave as heads when their entries are set to zero, whatever the architecture."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope.landscape.blocks import partition
from torch import nn

HEADS, SIZE, WIDTH = 4, 3, 12


def attend(q, k, v, head_size=SIZE):
    """Attention of [b, t, heads x size], with fewer key and value heads repeated, to [b, t, heads x value size]."""
    b, t, _ = q.shape
    q, k = (p.view(b, t, -1, head_size).transpose(1, 2) for p in (q, k))
    v = v.view(b, t, k.shape[1], -1).transpose(1, 2)
    k, v = (p.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for p in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)


class Conv1D(nn.Module):
    """GPT-2's linear layer, weight [inputs, outputs]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class FusedConv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = HEADS, SIZE, WIDTH
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x):
        return self.c_proj(attend(*self.c_attn(x).split(WIDTH, dim=-1)))


class FusedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = HEADS, WIDTH
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    forward = FusedConv1D.forward


class FusedWithoutOutput(nn.Module):
    """Nothing but the head count and the fused rows: heads of size rows / (3 heads)."""

    def __init__(self):
        super().__init__()
        self.n_heads = HEADS
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        return attend(*self.to_qkv(x).split(WIDTH, dim=-1))


class Config:
    num_attention_heads, num_key_value_heads = HEADS, 2


class GroupedQueries(nn.Module):
    """Head counts in a config only; biases on q, k and v."""

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.head_dim = SIZE
        self.q_proj, self.o_proj = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 10, bias=False)
        self.k_proj, self.v_proj = nn.Linear(10, 2 * SIZE), nn.Linear(10, 2 * SIZE)

    def forward(self, x):
        x = x[..., :10]
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class FusedGroupedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.qkv_proj, self.o_proj = nn.Linear(WIDTH, 8 * SIZE), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.o_proj(attend(*self.qkv_proj(x).split([WIDTH, 2 * SIZE, 2 * SIZE], dim=-1)))


class FusedGroupedWithoutOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.qkv_proj = nn.Linear(WIDTH, 8 * SIZE)

    def forward(self, x):
        return attend(*self.qkv_proj(x).split([WIDTH, 2 * SIZE, 2 * SIZE], dim=-1))


class QueryAndFusedKeyValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x):
        return self.to_out(attend(self.to_q(x), *self.to_kv(x).chunk(2, dim=-1)))


class WideValues(nn.Module):
    """Value heads of another size than query and key heads."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5 * HEADS)
        self.o = nn.Linear(5 * HEADS, WIDTH)

    def forward(self, x):
        return self.o(attend(self.q(x), self.k(x), self.v(x)))


class BertSelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, SIZE, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return attend(self.query(x), self.key(x), self.value(x))


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.self = BertSelf()
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH)})

    def forward(self, x):
        return self.output["dense"](self.self(x))


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        for bias in (self.mha.out_proj.bias, self.mha.in_proj_bias):
            if bias is not None:  # torch starts them at zero
                nn.init.normal_(bias)

    def forward(self, x):
        return self.mha(x, x[..., : self.mha.kdim], x[..., : self.mha.vdim])[0]


# Constructor, path of the attention module, key and value heads.
ARCHITECTURES = {
    "multihead": (Multihead, "mha", HEADS),
    "multihead, separate weights": (lambda: Multihead(kdim=7, vdim=5), "mha", HEADS),
    "multihead, no bias, extra key and value": (lambda: Multihead(bias=False, add_bias_kv=True), "mha", HEADS),
    "fused Conv1D": (FusedConv1D, "", HEADS),
    "fused linear": (FusedLinear, "", HEADS),
    "fused alone": (FusedWithoutOutput, "", HEADS),
    "grouped queries": (GroupedQueries, "", 2),
    "fused grouped queries": (FusedGroupedQueries, "", 2),
    "fused grouped queries alone": (FusedGroupedWithoutOutput, "", 2),
    "query and fused key-value": (QueryAndFusedKeyValue, "", HEADS),
    "wide values": (WideValues, "", HEADS),
    "BERT": (Bert, "self", HEADS),
}


def build(name):
    torch.manual_seed(0)
    make, path, key_value_heads = ARCHITECTURES[name]
    return make().double(), f"{path}." if path else "", key_value_heads


def zeroed(model, blocks, names, x):
    """The output with the entries of some blocks set to zero."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = blocks.layout.flatten(weights)
    for name in names:
        flat[blocks[name].indices(blocks.layout)] = 0
    return torch.func.functional_call(model, blocks.layout.unflatten(flat), (x,))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_blocks_act_as_heads(name):
    model, prefix, key_value_heads = build(name)
    blocks = partition(model, "head")
    assert blocks.coverage == 1.0
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    group = HEADS // key_value_heads
    output = model(x)
    for j in range(key_value_heads):
        served = range(j * group, (j + 1) * group)
        # A head's scores vanish alike without its queries and without its keys.
        no_query = zeroed(model, blocks, [f"{prefix}q.head{i}" for i in served], x)
        no_key = zeroed(model, blocks, [f"{prefix}k.head{j}"], x)
        no_value = zeroed(model, blocks, [f"{prefix}v.head{j}"], x)
        if "extra key" not in name:  # torch's bias_k and bias_v are keys and values of their own
            torch.testing.assert_close(no_query, no_key)
        assert not torch.allclose(no_query, output)
        assert not torch.allclose(no_value, output)
        if f"{prefix}o.head0" in blocks and "extra key" not in name:
            # What a head says is lost alike without its values and without the columns that read them.
            no_output = zeroed(model, blocks, [f"{prefix}o.head{i}" for i in served], x)
            torch.testing.assert_close(no_value, no_output)
        # Without values, the scores of the same head do not matter any more.
        silent = zeroed(model, blocks, [f"{prefix}v.head{j}", f"{prefix}k.head{j}"], x)
        if "extra key" not in name:
            torch.testing.assert_close(silent, no_value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_sizes(name):
    model, prefix, key_value_heads = build(name)
    blocks = partition(model, "head")
    for role in "qkvo":
        found = [block for block in blocks if block.startswith(f"{prefix}{role}.head")]
        count = key_value_heads if role in "kv" else HEADS
        if role == "o" and "alone" in name:
            count = 0
        assert found == [f"{prefix}{role}.head{i}" for i in range(count)]
        assert len({blocks.sizes[block] for block in found}) == min(1, count), "heads of one role are of one size"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_count_one_keeps_the_projections_whole(name):
    model, prefix, _ = build(name)
    blocks = partition(model, "head", head_count=1)
    heads = partition(model, "head")
    for role in "qkvo":
        whole = [b for b in heads if b.startswith(f"{prefix}{role}.head")]
        if whole:
            assert blocks.sizes[f"{prefix}{role}.head0"] == sum(heads.sizes[b] for b in whole)
    assert blocks.coverage == 1.0


def test_head_count_cures_a_missing_or_contradicted_count():
    model = GroupedQueries()
    model.config = None
    model.head_dim = 5
    with pytest.raises(ValueError, match=r"none of num_heads.*head_count="):
        partition(model, "head")
    assert "k.head1" in partition(model, "head", head_count=HEADS)
    layers = nn.ModuleDict({"first": FusedLinear(), "second": FusedWithoutOutput()})
    mixed = partition(layers, "head", head_count={"second": 2})
    assert "first.q.head3" in mixed
    assert [b for b in mixed if b.startswith("second.q")] == ["second.q.head0", "second.q.head1"]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_heads": 5}, "'\\(root\\)' are unclear: 5 heads do not divide the 12 query outputs"),
        ({"num_heads": 4, "n_heads": 6}, "states different counts"),
        ({"num_heads": 4, "head_dim": 4}, "states heads of size 4, but 12 query outputs in 4 heads give 3"),
        ({"num_heads": 2}, "heads of size 6 do not divide the 15 key outputs"),
        ({"num_heads": 4}, "5 key heads fit 4 query heads"),
        ({"num_heads": 4, "num_kv_heads": 2}, "states 2 key and value heads, but 15 key outputs of size 3 give 5"),
    ],
    ids=str,
)
def test_contradictions_are_errors(attributes, message):
    model = nn.Module()
    for name, value in attributes.items():
        setattr(model, name, value)
    model.q_proj, model.k_proj, model.v_proj = nn.Linear(12, 12), nn.Linear(12, 15), nn.Linear(12, 15)
    with pytest.raises(ValueError, match=f"{message}.*pass head_count="):
        partition(model, "head")


def test_a_layer_fused_in_an_unknown_order_is_refused():
    model = nn.Module()
    model.num_heads = HEADS
    model.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
    with pytest.raises(ValueError, match=r"'query_key_value.weight' are stacked .* head by head .* own Blocks"):
        partition(model, "head")
    interleaved = FusedLinear()
    interleaved.multi_query = False
    with pytest.raises(ValueError, match="head by head"):
        partition(interleaved, "head")


def test_fused_rows_that_do_not_divide_are_refused():
    model = FusedWithoutOutput()
    model.to_qkv = nn.Linear(WIDTH, 3 * WIDTH + 1)
    with pytest.raises(ValueError, match="37 stacked outputs do not divide"):
        partition(model, "head")
    with pytest.raises(ValueError, match="5 heads do not divide the 12 outputs"):
        partition(Multihead(), "head", head_count=5)


def test_a_name_alone_is_not_enough():
    model = nn.Module()
    model.query, model.key, model.value = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    model.num_heads = 2
    with pytest.raises(ValueError, match="no attention with a selected weight was found"):
        partition(model, "head")
    wrong_output = FusedLinear()
    wrong_output.c_proj = nn.Linear(2 * WIDTH, WIDTH)
    wrong_output.head_dim = SIZE
    blocks = partition(wrong_output, "head")
    assert "c_proj.weight" in blocks, "an output projection of another width is left whole"
    assert "v.head3" in blocks


def test_only_selected_tensors_appear():
    model = GroupedQueries()
    model.k_proj.requires_grad_(False)
    model.q_proj.weight.requires_grad_(False)
    blocks = partition(model, "head")
    assert not any(name.startswith(("k.", "q.")) for name in blocks)
    assert "q_proj.bias" in blocks
    assert blocks.coverage == 1.0

    model = Multihead(kdim=7, vdim=5)
    model.mha.q_proj_weight.requires_grad_(False)
    blocks = partition(model, "head")
    assert blocks.coverage == 1.0, "the query entries of the fused bias are a block under the parameter's name"
    assert blocks.sizes["mha.in_proj_bias"] == WIDTH

    model.requires_grad_(False)
    extra = nn.ModuleDict({"attention": model, "linear": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no attention with a selected weight"):
        partition(extra, "head")


def test_a_shared_attention_appears_once():
    shared = nn.Module()
    shared.a, shared.b = FusedLinear(), FusedLinear()
    shared.b.c_attn = shared.a.c_attn
    blocks = partition(shared, "head")
    assert "a.q.head0" in blocks
    assert "b.q.head0" not in blocks
    assert "b.o.head0" in blocks
    assert blocks.coverage == 1.0


@pytest.mark.parametrize("head_count", [0, -1, 2.0, {"mha": 0}])
def test_head_count_must_be_a_positive_integer(head_count):
    with pytest.raises(ValueError, match="must be a positive integer"):
        partition(Multihead(), "head", head_count=head_count)


def test_head_count_for_a_module_that_is_not_there():
    with pytest.raises(ValueError, match=r"\['decoder\.\*'\], which matches no attention module"):
        partition(Multihead(), "head", head_count={"decoder.*": 4})
