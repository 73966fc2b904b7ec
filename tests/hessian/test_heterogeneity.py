"""How much blocks differ, in one record: closed forms, and errors that are what they claim."""

import math
from dataclasses import replace

import pytest
import torch
from sharpscope.hessian import DenseOperator, block_spectra
from sharpscope.hessian.block_spectra import BlockSpectra
from sharpscope.hessian.heterogeneity import Heterogeneity
from sharpscope.landscape.layout import Layout


def diagonal_blocks(*spectra):
    """Each block rotated, so that it is dense."""
    rng = torch.Generator().manual_seed(7)
    blocks = []
    for values in spectra:
        Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=rng, dtype=torch.float64)).Q
        blocks.append(Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T)
    names = tuple(f"b{i}" for i in range(len(spectra)))
    layout = Layout(names, tuple(torch.Size([len(values)]) for values in spectra))
    return DenseOperator(torch.block_diag(*blocks), layout=layout)


def spread_blocks(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return diagonal_blocks(*((10.0**i * torch.rand(150, generator=rng).double() ** 2).tolist() for i in range(3)))


def sampled(op, *, probes=4, seed=0):
    return block_spectra(op, num_steps=8, num_probes=probes, dense_limit=0, tol=1.0, seed=seed)


def test_scales_in_closed_form():
    found = block_spectra(diagonal_blocks([1.0, -10.0], [1e5, 3.0], [-1000.0, 2.0])).heterogeneity()
    assert (found.largest, found.smallest) == ("b1", "b0")
    assert found.scale_ratio == pytest.approx(1e4)
    assert found.scale_spread == pytest.approx(2.0), "1, 3 and 5 decades"
    assert 0 <= found.scale_ratio_error < 1e-10 * found.scale_ratio


def test_the_index_is_0_for_equal_and_1_for_disjoint_spectra():
    equal = block_spectra(diagonal_blocks([1.0, 2.0], [1.0, 2.0])).heterogeneity()
    disjoint = block_spectra(diagonal_blocks([1.0, 2.0], [1e4, 2e4], [1e8, 2e8])).heterogeneity()
    assert equal.index == pytest.approx(0.0, abs=1e-9)
    assert disjoint.index == pytest.approx(1.0)
    assert disjoint.js_divergence_mean == pytest.approx(math.log(2))


def test_the_error_of_the_ratio_comes_from_the_residuals():
    spectra = block_spectra(diagonal_blocks([8.0, 1.0], [2.0, 1.0]))
    wrong = {
        name: replace(spectra[name], top_residuals=torch.tensor([error, 9.0]), bottom_residuals=torch.full((2,), 9.0))
        for name, error in (("b0", 0.4), ("b1", 0.1))
    }
    found = Heterogeneity.of(wrong)
    assert found.scale_ratio == pytest.approx(4.0)
    assert found.scale_ratio_error == pytest.approx(4 * (0.4 / 8 + 0.1 / 2))


def test_an_exact_divergence_has_no_error_and_one_probe_tells_none():
    assert block_spectra(spread_blocks(), dense_limit=150).heterogeneity().js_divergence_stderr == 0.0
    assert sampled(spread_blocks(), probes=1).heterogeneity().js_divergence_stderr == math.inf


@pytest.mark.parametrize("axis", ["log", "linear"])
def test_the_jackknife_leaves_out_one_probe_of_one_block_at_a_time(axis):
    """Against leaving it out of the block spectra themselves."""
    spectra, sigma = sampled(spread_blocks()), {"log": 0.1, "linear": 5.0}[axis]
    variance = 0.0
    for name, spectrum in spectra.items():
        means = []
        for j in range(4):
            kept = [i for i in range(4) if i != j]
            density = replace(
                spectrum.density, nodes=spectrum.density.nodes[kept], weights=spectrum.density.weights[kept]
            )
            changed = BlockSpectra({**spectra, name: replace(spectrum, density=density)}, spectra.partition)
            means.append(float(changed.js_divergence(axis=axis, sigma=sigma)[[0, 0, 1], [1, 2, 2]].mean()))
        variance += 3 / 4 * sum((mean - sum(means) / 4) ** 2 for mean in means)
    found = spectra.heterogeneity(axis=axis, sigma=sigma)
    assert found.js_divergence_stderr == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_the_standard_error_is_that_of_repeated_sampling():
    """Root mean square over 50 seeds against the spread of the values: both are known to about a tenth."""
    op = spread_blocks()
    found = [sampled(op, seed=10 * i).heterogeneity() for i in range(50)]
    spread = float(torch.tensor([f.js_divergence_mean for f in found], dtype=torch.float64).std())
    claimed = math.sqrt(sum(f.js_divergence_stderr**2 for f in found) / len(found))
    assert 0.7 < claimed / spread < 1.4


def test_the_resolution_is_the_distance_to_half_the_steps():
    op = spread_blocks()
    fine = block_spectra(op, dense_limit=0, num_steps=16, num_probes=4).heterogeneity()
    half = block_spectra(op, dense_limit=0, num_steps=8, num_probes=4).heterogeneity()
    expected = abs(fine.js_divergence_mean - half.js_divergence_mean)
    assert expected > 1e-4
    assert fine.js_divergence_resolution == pytest.approx(expected, rel=1e-9)
    assert block_spectra(op, dense_limit=150).heterogeneity().js_divergence_resolution == 0.0


def test_deflated_pairs_are_in_both_densities():
    spectra = block_spectra(spread_blocks(), dense_limit=0, num_steps=30, num_probes=4, deflate=3)
    for spectrum in spectra.values():
        density = spectrum.density
        assert torch.allclose(density.half_weights.sum(1), torch.ones(4, dtype=torch.float64))
        for value in density.deflated:
            assert bool((density.half_nodes == value).any(1).all())
    assert math.isfinite(spectra.heterogeneity().js_divergence_resolution)
