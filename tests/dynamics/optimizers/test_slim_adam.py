"""SlimAdam: exact cases of its averages, its rules from table, mapping and profile, layouts."""

import pytest
import torch
from sharpscope.dynamics.optimizers.adam_mini import AdamMini
from sharpscope.dynamics.optimizers.choice import make_optimizer
from sharpscope.dynamics.optimizers.slim_adam import SlimAdam
from sharpscope.dynamics.snr_profile import SNRProfile
from sharpscope.dynamics.workloads.models import CharTransformer, digits_mlp
from torch import nn


def trained(make, shape=(6, 4), turn=None, steps=100):
    gen = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64))
    optimizer = make([("w", p)])
    for _ in range(steps):
        g = torch.randn(shape, generator=gen, dtype=torch.float64)
        p.grad = g if turn is None else turn(g)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("dims", [(0,), (1,)])
def test_gradients_of_one_size_along_the_averaged_axis_lose_nothing(dims):
    """g = a bᵀ with |b| (or |a|) constant: the mean over that axis is every entry."""
    turn = lambda g: (g[:, :1] if dims == (1,) else g[:1]) * g.sign()
    slim = trained(lambda params: SlimAdam(params, lr=1e-2, rules={"w": dims}), turn=turn)
    full = trained(lambda params: torch.optim.AdamW(params, lr=1e-2), turn=turn)
    torch.testing.assert_close(slim, full, rtol=0, atol=1e-12)


def test_rows_and_whole_tensors_are_adam_minis():
    rows = trained(lambda params: SlimAdam(params, lr=1e-2, weight_decay=0.1, rules={"w": (1,)}))
    mini = trained(lambda params: AdamMini(params, lr=1e-2, weight_decay=0.1))
    assert torch.equal(rows, mini)
    whole = trained(lambda params: SlimAdam(params, lr=1e-2, rules={"*": "both"}), shape=(3, 2, 4))
    mini = trained(lambda params: AdamMini(params, lr=1e-2, weight_decay=1e-2), shape=(3, 2, 4))
    assert torch.equal(whole, mini)


def test_the_table_goes_by_role():
    model = CharTransformer(20, width=8, num_heads=2, num_layers=1)
    optimizer = make_optimizer("SlimAdam", model, {"lr": 1e-3})
    rules = {row.role: row.rule for row in optimizer.table()}
    assert rules == {
        "token embedding": "mean over inputs",
        "position embedding": "mean over inputs",
        "norm": "per entry",
        "bias": "per entry",
        "fused qkv": "query: mean over inputs; key: mean over inputs; value: mean over outputs",
        "attention output": "mean over outputs",
        "up": "mean over outputs",
        "down": "mean over outputs",
    }
    assert [row.num_blocks for row in optimizer.table() if row.role in ("token embedding", "up", "down")] == [20, 8, 32]


def test_vectors_decay_only_when_asked():
    for decay_vectors, expected in ((False, 1.0), (True, 0.99)):
        p = nn.Parameter(torch.ones(3))
        optimizer = SlimAdam([p], lr=0.1, weight_decay=0.1, rules=None, decay_vectors=decay_vectors)
        p.grad = torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), expected))


def test_a_profile_gives_the_rules():
    model = digits_mlp()
    profile = SNRProfile()
    moments = {name: torch.ones_like(p).double() for name, p in model.named_parameters()}
    gen = torch.Generator().manual_seed(0)
    moments["0.weight"] = torch.rand(100, 1, generator=gen).double() * (1 + 0.1 * torch.rand(100, 64, generator=gen))
    moments["2.weight"] = torch.rand(1, 100, generator=gen).double() * (1 + 0.1 * torch.rand(100, 100, generator=gen))
    moments["4.weight"] = (3 * torch.randn(10, 100, generator=gen).double()).exp()
    profile.record(10, moments, model)
    optimizer = SlimAdam(model.parameters(), rules=profile, model=model)
    assert optimizer.rules == {"0.weight": "inputs", "2.weight": "outputs"}
    assert {row.name: row.num_blocks for row in optimizer.table()}["2.weight"] == 100


def test_what_it_cannot_use_is_said():
    model = digits_mlp()
    with pytest.raises(ValueError, match="give `model` too"):
        SlimAdam(model.parameters())
    with pytest.raises(ValueError, match="`rules` is 'tabel'"):
        SlimAdam(model.parameters(), rules="tabel", model=model)
    with pytest.raises(ValueError, match="'5.weight', which fits no parameter"):
        SlimAdam(model.parameters(), rules={"5.weight": (0,)}, model=model)
    with pytest.warns(UserWarning, match="pass model.named_parameters"):
        SlimAdam(model.parameters(), rules={"0.weight": (1,)})
    with pytest.raises(ValueError, match="which axis counts its outputs is unknown"):
        SlimAdam(model.named_parameters(), rules={"0.weight": "inputs"})
