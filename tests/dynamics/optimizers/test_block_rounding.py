"""Rounding a whole block: against all roundings there are, and nothing else touched."""

import itertools

import pytest
import torch
from sharpscope.dynamics.optimizers.block_rounding import sign_round
from sharpscope.dynamics.optimizers.weight_grid import WeightGrid
from torch import nn


def row_task(seed, orthogonal=False, n=10):
    gen = torch.Generator().manual_seed(seed)
    mix = torch.eye(n, dtype=torch.float64) + torch.randn(n, n, generator=gen, dtype=torch.float64) / n**0.5
    X = torch.randn(64, n, generator=gen, dtype=torch.float64) @ mix
    if orthogonal:
        X = torch.linalg.qr(X).Q * 8
    layer = nn.Linear(n, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1, n, generator=gen, dtype=torch.float64))
    return layer, X, layer.weight.detach().clone()


def brute_force(X, W, bits):
    """Least mean squared error of all ways to round each weight up or down on the grid of rounding to nearest."""
    grid = WeightGrid(bits, -1)
    ones = torch.ones(1, 1, dtype=torch.float64)
    s, z = (float(x) for x in grid.scales(W, ones, ones))
    low = torch.floor(W / s) + z
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=W.shape[1])), dtype=torch.float64)
    candidates = s * ((low + ways).clamp(0, 2**bits - 1) - z)
    return float(((candidates - W) @ X.T).square().mean(1).min())


@pytest.mark.parametrize("seed", range(4))
def test_it_lies_between_the_best_of_all_roundings_and_rounding_to_nearest(seed):
    layer, X, W = row_task(seed)
    best = brute_force(X, W, 3)
    found = sign_round(layer, X, bits=3, group_size=-1, clip=False, batch_size=64, seed=seed)
    after = float(((layer.weight.detach() - W) @ X.T).square().mean())
    assert after == pytest.approx(found.loss, rel=1e-12)
    assert best * (1 - 1e-12) <= found.loss <= found.loss_nearest


def test_for_orthogonal_inputs_nearest_is_best_and_is_kept():
    layer, X, W = row_task(0, orthogonal=True)
    found = sign_round(layer, X, bits=3, group_size=-1, clip=False, batch_size=64)
    assert found.loss == pytest.approx(brute_force(X, W, 3), rel=1e-12)
    assert found.flips == {"weight": 0.0}


def block(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(24), nn.Linear(24, 6))


def data(N=96, n=12, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(N, n, generator=gen) @ torch.randn(n, n, generator=gen)


@pytest.mark.parametrize("iterations", [0, 1, 60])
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_never_worse_than_nearest_on_the_fixed_subset(bits, iterations):
    found = sign_round(block(), data(), bits=bits, iterations=iterations, batch_size=8)
    assert len(found.judged_losses) == iterations + 1
    assert len(found.losses) == iterations
    assert found.loss == min(found.judged_losses) == found.judged_losses[found.chosen] <= found.loss_nearest
    if iterations == 60:
        assert found.loss < found.loss_nearest
        assert all(0 < share < 1 for share in found.flips.values())


def test_the_block_holds_exactly_what_is_packed_and_nothing_else_changed():
    module, X = block(), data()
    full = {name: p.detach().clone() for name, p in module.named_parameters()}
    module[0].weight.grad = torch.full_like(module[0].weight, 7.0)
    module[4].weight.requires_grad_(False)
    module[2].eval()
    stream = torch.get_rng_state()
    found = sign_round(module, X, bits=3, iterations=20)
    assert torch.equal(torch.get_rng_state(), stream)
    assert set(found.weights) == {"0.weight", "4.weight"}
    for name, p in module.named_parameters():
        if name in found.weights:
            assert torch.equal(found.weights[name].pack().unpack().dequantize(), p.detach())
            assert not torch.equal(p.detach(), full[name])
        else:
            assert torch.equal(p.detach(), full[name])
            assert p.requires_grad
    assert bool((module[0].weight.grad == 7.0).all())
    assert module[4].weight.grad is None
    assert not module[4].weight.requires_grad
    assert module.training
    assert not module[2].training


def test_keep_last_and_the_seed():
    kept = [sign_round(block(), data(), bits=2, iterations=30, keep="last", seed=seed) for seed in (0, 0, 1)]
    assert kept[0].losses == kept[1].losses != kept[2].losses
    assert kept[0].chosen == 30
    assert len(kept[0].judged_losses) == 2
    assert kept[0].max_offset <= 31 / 60 + 1e-6


def test_targets_and_several_inputs():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 5)

        def forward(self, x, gate):
            return self.linear(x) * gate

    X, gate = data(), torch.linspace(0, 1, 96).unsqueeze(1)
    module = Gated()
    wanted = module(X, gate).detach()
    found = sign_round(module, (X, gate), targets=wanted, bits=4, iterations=5, num_judged=96)
    assert found.loss_nearest > 0
    error = float((module(X, gate) - wanted).detach().square().mean())
    assert found.loss == pytest.approx(error, rel=1e-5)


def test_convolutions_and_tied_weights():
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GELU(), nn.Conv1d(4, 4, 1), nn.GELU(), nn.Conv1d(4, 4, 1))
    module[4].weight = module[2].weight
    found = sign_round(module, torch.randn(20, 3, 9), bits=4, iterations=3)
    assert set(found.weights) == {"0.weight", "2.weight"}


def test_a_block_that_fails_gets_its_weights_back():
    class Fails(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("out of memory")
            return super().forward(x)

    module = Fails(12, 4)
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        sign_round(module, data(), iterations=20)
    assert torch.equal(module.weight.detach(), before)
    assert module.weight.grad is None


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (nn.LayerNorm(12), {}, "nothing to round"),
        (nn.Linear(12, 2), {"targets": torch.zeros(3, 2)}, r"\[3, 96\] examples"),
        (nn.Linear(12, 2), {"keep": "first"}, "`keep` is 'first'"),
        (nn.Linear(12, 2), {"batch_size": 0}, "batch_size"),
        (nn.Linear(12, 2), {"bits": 7}, "bits"),
        (nn.LSTM(12, 2), {}, "nothing to round"),
    ],
)
def test_what_cannot_be_done_is_said(module, options, words):
    with pytest.raises(ValueError, match=words):
        sign_round(module, data(), **options)


def test_a_block_with_two_outputs_is_refused():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="must return one tensor"):
        sign_round(Two(12, 2), data())
