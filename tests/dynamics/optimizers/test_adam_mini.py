"""Adam-mini: its limits, the authors' package on a transformer, its blocks, its threshold."""

import copy
import io

import pytest
import torch
from sharpscope.dynamics.optimizers.adam_mini import AdamMini
from sharpscope.dynamics.optimizers.adam_mini_names import divisions_by_name
from sharpscope.dynamics.optimizers.choice import make_optimizer
from sharpscope.dynamics.workloads.models import CharTransformer, digits_mlp
from sharpscope.landscape.blocks import Block, Partition, partition
from sharpscope.landscape.layout import Layout
from sharpscope.landscape.reductions import Reduction
from torch import nn


class Named(nn.Module):
    """The parameters of a small transformer under the names that the authors' code knows; nothing is evaluated."""

    def __init__(self, width=16, kv=8):
        super().__init__()
        shapes = {
            "tok_embeddings.weight": (20, width),
            "layers_0_attention_wq.weight": (width, width),
            "layers_0_attention_wk.weight": (kv, width),
            "layers_0_attention_wv.weight": (kv, width),
            "layers_0_attention_wo.weight": (width, width),
            "layers_0_attention_wq_bias": (width,),
            "layers_0_feed_forward_w1.weight": (32, width),
            "layers_0_attention_norm.weight": (width,),
            "output.weight": (20, width),
            "gate": (3, 4),
        }
        gen = torch.Generator().manual_seed(1)
        self.tensors = {n: nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64)) for n, s in shapes.items()}

    def step(self, optimizer, t):
        for i, p in enumerate(self.tensors.values()):
            gen = torch.Generator().manual_seed(100 * t + i)
            p.grad = torch.randn(p.shape, generator=gen, dtype=p.dtype) * (1 + i) / (1 + t % 3)
        optimizer.step()


def test_with_its_name_rules_it_is_the_authors_package():
    package = pytest.importorskip("adam_mini")
    mine, theirs = Named(), Named()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    rules = divisions_by_name(mine.tensors.items(), width=16, num_heads=4)
    ours = AdamMini(mine.tensors.items(), partition=rules, **options)
    oracle = package.Adam_mini(theirs.tensors.items(), dim=16, n_heads=4, n_kv_heads=2, verbose=False, **options)
    assert [row.num_blocks for row in ours.table()] == [20, 4, 2, 8, 16, 16, 32, 1, 20, 1]
    for t in range(200):
        mine.step(ours, t)
        theirs.step(oracle, t)
    for p, q in zip(mine.tensors.values(), theirs.tensors.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_constant_size_within_a_block_is_adamw():
    """|g| equal inside each block: the block's mean of g² is every entry's own."""
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=gen, dtype=torch.float64)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = AdamMini([mine], lr=1e-2, weight_decay=0.1)
    oracle = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        signs = torch.randint(2, (5, 7), generator=gen).double() * 2 - 1
        mine.grad = signs * torch.rand(5, 1, generator=gen, dtype=torch.float64)
        theirs.grad = mine.grad.clone()
        ours.step()
        oracle.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_one_block_without_momentum_is_normalised_gradient_descent():
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = AdamMini([p], lr=0.5, betas=(0.0, 0.0), eps=0.0, partition=lambda name, p: Reduction.whole(p.shape))
    p.grad = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.5 * p.grad / p.grad.square().mean().sqrt(), rtol=1e-14, atol=0)


def test_inside_a_block_it_commutes_with_rotations():
    gen = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(7, 7, generator=gen, dtype=torch.float64))[0]
    start = torch.randn(5, 7, generator=gen, dtype=torch.float64)
    gradients = torch.randn(30, 5, 7, generator=gen, dtype=torch.float64)

    def run(make, turn):
        p = nn.Parameter(start @ turn)
        optimizer = make([p])
        for g in gradients:
            p.grad = g @ turn
            optimizer.step()
        return p.detach()

    eye = torch.eye(7, dtype=torch.float64)
    rows = lambda params: AdamMini(params, lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(run(rows, eye) @ Q, run(rows, Q), rtol=0, atol=1e-12)
    adam = lambda params: torch.optim.AdamW(params, lr=1e-2)
    assert float((run(adam, eye) @ Q - run(adam, Q)).abs().max()) > 1e-3


def gradients_on(model, seed=0):
    gen = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)


def test_v_is_the_mean_over_the_blocks_of_the_partition():
    model = CharTransformer(20, width=8, num_heads=2, num_layers=1).double()
    optimizer = AdamMini(model.parameters(), model=model, betas=(0.9, 0.99))
    blocks = partition(model, "adam-mini")
    gradients_on(model)
    optimizer.step()
    squares = {name: p.grad.square() for name, p in model.named_parameters()}
    expected = torch.stack([block.gather(squares).mean() for block in blocks.values()]) * 0.01
    found = torch.cat([optimizer.state[p]["block_exp_avg_sq"] for p in model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    P = optimizer.preconditioner(model.head.weight)
    row = model.head.weight.grad.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(P, ((row + 1e-8) * 0.1).expand(20, 8), rtol=1e-12, atol=0)


def test_its_state_is_half_of_adamws():
    model = CharTransformer(64, width=256, num_layers=1)
    optimizer = make_optimizer("AdamMini", model, {"lr": 1e-3})
    gradients_on(model)
    optimizer.step()
    num = sum(p.numel() for p in model.parameters())
    assert optimizer.state_bytes() <= 4.1 * num
    blocks = sum(row.num_blocks for row in optimizer.table())
    assert optimizer.state_bytes() == 4 * (num + blocks) + 4 * len(optimizer.table())
    assert f"{blocks} second moments for {num} parameters" in optimizer.describe()
    assert "query: per head; key: per head; value: per output" in optimizer.describe()


def test_a_resumed_run_has_the_blocks_of_the_saved_one():
    model = CharTransformer(20, width=8, num_heads=2, num_layers=1)
    optimizer = AdamMini(model.parameters(), lr=1e-2, model=model)
    other = copy.deepcopy(model)
    for t in range(3):
        gradients_on(model, t)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(model.state_dict())
    resumed = AdamMini(other.parameters(), lr=1e-2)  # no model: rows
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for t in range(3, 6):
        for m, o in ((model, optimizer), (other, resumed)):
            gradients_on(m, t)
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert [row.num_blocks for row in resumed.table()] == [row.num_blocks for row in optimizer.table()]


def test_blocks_of_any_shape_are_kept_with_the_state():
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = Layout.of({"w": start})
    odd = Partition([Block("a", [("w", torch.tensor([0, 5, 7]))]), Block("b", [("w", torch.tensor([1, 11]))])], layout)
    p = nn.Parameter(start.clone())
    optimizer = AdamMini([("w", p)], lr=0.1, betas=(0.0, 0.0), partition=odd)
    p.grad = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3)
    optimizer.step()
    size = torch.tensor([1 + 36 + 64.0]).div(3).sqrt(), torch.tensor([4 + 144.0]).div(2).sqrt()
    moved = ((start - p.detach()) / 0.1).reshape(-1)
    torch.testing.assert_close(moved[[0, 5, 7]].float(), torch.tensor([1.0, 6.0, 8.0]) / size[0])
    torch.testing.assert_close(moved[[1, 11]].float(), torch.tensor([2.0, 12.0]) / size[1])
    assert optimizer.state_bytes() == 12 * 8 + 3 * 8 + 4 + 12 * 4
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    resumed = AdamMini([q], lr=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for optimizer_, parameter in ((optimizer, p), (resumed, q)):
        parameter.grad = torch.ones(4, 3, dtype=torch.float64)
        optimizer_.step()
    assert torch.equal(p, q)


def test_parameters_added_later_have_their_structure():
    model = CharTransformer(20, width=8, num_heads=2, num_layers=1)
    attention = model.layers[0].attention
    optimizer = AdamMini(model.layers[0].mlp.parameters(), model=model)
    optimizer.add_param_group({"params": [attention.qkv.weight], "lr": 1e-4})
    assert optimizer.table()[-1].num_blocks == 2 + 2 + 8
    with pytest.raises(ValueError, match=r"\[2\] is none of `model`"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_float32_moments(dtype):
    p = nn.Parameter(torch.ones(4, 3, dtype=dtype))
    optimizer = AdamMini([p], lr=0.1)
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert {k: v.dtype for k, v in optimizer.state[p].items()} == dict.fromkeys(
        ("step", "exp_avg", "block_exp_avg_sq"), torch.float32
    )
    torch.testing.assert_close(p.detach().float(), torch.full((4, 3), 0.9), rtol=1e-2, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_it_diverges_above_its_threshold_and_not_below(weight_decay):
    """A diagonal quadratic in two blocks whose v is held: the learning rate of the onset, by bisection."""
    h = torch.tensor([[1.0, 3.0], [0.5, 7.0]], dtype=torch.float64)
    v = torch.tensor([0.09, 4.0], dtype=torch.float64)
    top = float((h / v.sqrt().unsqueeze(1)).max())

    def grows(lr):
        # So small that its gradients add nothing to v.
        p = nn.Parameter(torch.full((2, 2), 1e-8, dtype=torch.float64))
        optimizer = AdamMini([p], lr=lr, betas=(0.8, 0.999), eps=0.0, weight_decay=weight_decay)
        optimizer.state[p] = {
            "step": torch.tensor(50_000.0),
            "exp_avg": torch.zeros(2, 2, dtype=torch.float64),
            "block_exp_avg_sq": v.clone(),
        }
        sizes = []
        for _ in range(400):
            p.grad = h * p.detach()
            optimizer.step()
            optimizer.state[p]["block_exp_avg_sq"].copy_(v / 0.999)
            sizes.append(float(p.detach().norm()))
            if sizes[-1] > 1e-3:
                return True
        return max(sizes[300:]) > max(sizes[100:200])

    low, high = 0.05, 5.0
    for _ in range(11):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if grows(middle) else (middle, high)
    optimizer = AdamMini([nn.Parameter(torch.ones(2, 2))], lr=low, betas=(0.8, 0.99), weight_decay=weight_decay)
    assert optimizer.stability_threshold() == pytest.approx(top, rel=1e-2)


def test_what_it_cannot_use_is_said():
    model = digits_mlp()
    with pytest.raises(ValueError, match="read from the structure of `model`"):
        AdamMini(model.parameters(), partition="head")
    with pytest.raises(ValueError, match="has no blocks for '0.0'"):
        AdamMini(model.parameters(), partition=partition(model, "neuron"))
    with pytest.raises(ValueError, match=r"are for shape \[2, 2\]"):
        AdamMini([nn.Parameter(torch.ones(3))], partition=lambda name, p: Reduction.whole((2, 2)))
    with pytest.raises(TypeError, match="must give a Reduction"):
        AdamMini([nn.Parameter(torch.ones(3))], partition=lambda name, p: 3)
    with pytest.raises(ValueError, match="`vectors` is 'all'"):
        AdamMini(model.parameters(), vectors="all")
    with pytest.raises(TypeError, match="`model` is a list"):
        AdamMini(model.parameters(), model=[model])
    with pytest.raises(ValueError, match="no multiple of"):
        divisions_by_name([("wq", torch.ones(3, 5))], width=16, num_heads=4)
    optimizer = AdamMini(model.parameters())
    with pytest.raises(ValueError, match="has not made a step"):
        optimizer.preconditioner(model[0].weight)
    with pytest.raises(ValueError, match="no parameter of this AdamMini"):
        optimizer.preconditioner(nn.Parameter(torch.ones(2)))


def test_modules_added_to_the_model_later_have_their_structure_too():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = AdamMini(model.named_parameters(), model=model)
    model.append(nn.Linear(2, 5))
    optimizer.add_param_group({"params": list(model[2].named_parameters(prefix="2"))})
    assert [row.num_blocks for row in optimizer.table() if row.name == "2.weight"] == [5]
