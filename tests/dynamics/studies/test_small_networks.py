"""The networks of the study of blocks: what their block spectra must be."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope.dynamics.studies.optimizer_gap import MODELS, network, objective, weight_blocks
from sharpscope.dynamics.studies.small_networks import Attention, Layer, PatchClassifier, mlp
from sharpscope.hessian import block_spectra
from torch import nn


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_weights_small_enough_to_be_exact(name):
    model = network(name, 0)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    blocks = weight_blocks(model)
    vocabulary = ("embedding.weight", "head.weight")  # depends on the text
    assert all(sizes[block] <= 1024 for block in blocks if MODELS[name][0] == "digits" or block not in vocabulary)
    left = {key for key in sizes if key not in blocks}
    assert all("norm" in key or "positions" in key for key in left), left


def test_a_seed_gives_the_same_weights_and_leaves_the_stream():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (network("MLP", seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


@pytest.mark.parametrize("scale", [3.0, 0.1])
def test_a_scaled_mlp_is_the_same_function_with_scaled_blocks(scale):
    plain, scaled = seeded(mlp), seeded(lambda: mlp(scale))
    factors = {"first": scale, "second": 1.0, "head": 1 / scale}
    with torch.no_grad():
        for name, factor in factors.items():
            exact = getattr(plain, name).weight / factor
            torch.testing.assert_close(getattr(scaled, name).weight, exact, rtol=1e-5, atol=1e-6)
            getattr(scaled, name).weight.copy_(exact)  # they were drawn in float32
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(scaled(x), plain(x))
    options = {"num_steps": 12, "num_probes": 1, "num_top": 1, "tol": 1e-6}
    before, after = (block_spectra(objective(m, "MLP", 12), **options) for m in (plain, scaled))
    for name, factor in factors.items():
        found, expected = (float(spectra[f"{name}.weight"].top[0]) for spectra in (after, before))
        assert found == pytest.approx(factor**2 * expected, rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_torchs(causal):
    attention = seeded(lambda: Attention(causal=causal))
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q, k, v = (w(x).view(3, 7, 2, 8).transpose(1, 2) for w in (attention.wq, attention.wk, attention.wv))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(3, 7, 16)
    torch.testing.assert_close(attention(x), attention.wo(expected))


def test_patches_are_those_of_the_image():
    """The 16 patches of 2 x 2 pixels, row by row."""
    model = seeded(lambda: PatchClassifier(Layer(causal=False))).patches
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(16, 4))
    image = torch.arange(64, dtype=torch.float64)
    found = model(image.unsqueeze(0))[0, :, :4]
    rows = image.view(8, 8)
    expected = [rows[i : i + 2, j : j + 2].reshape(-1) for i in range(0, 8, 2) for j in range(0, 8, 2)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_weights_start_as_they_should():
    small, fan_in = network("transformer, 0.02", 0), network("transformer, fan-in", 0)
    for name, p in small.named_parameters():
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.2), name
    for name, p in fan_in.named_parameters():
        if p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(p.shape[1] ** -0.5, rel=0.2), name
    assert all(isinstance(m, nn.Module) for m in (small, fan_in))
