"""Measurements of a model on a GPU: those of the CPU, and nothing left behind."""

import warnings

import pytest
import torch
from sharpscope.hessian import Hessian, block_spectra, spectral_density, top_eigenvalues
from sharpscope.landscape import Objective
from torch import nn
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.gpu


def objective_on(device, dtype, width=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    inputs, targets = torch.randn(70, 5).to(dtype), torch.randint(0, 3, (70,))
    return Objective.supervised(model.to(device), cross_entropy, (inputs.to(device), targets.to(device)))


def test_an_exact_density_is_that_of_the_cpu(device):
    there = spectral_density(Hessian(objective_on(device, torch.float64)))
    here = spectral_density(Hessian(objective_on("cpu", torch.float64)))
    assert there.exact
    torch.testing.assert_close(there.nodes.cpu(), here.nodes, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sampled_density_has_the_true_moments(device, dtype):
    true = spectral_density(Hessian(objective_on("cpu", torch.float64, width=40)), num_steps=300, num_probes=8)
    assert true.exact
    found = spectral_density(Hessian(objective_on(device, dtype, width=40)), num_steps=20, num_probes=16, seed=1)
    assert not found.exact
    assert found.weights.sum(1).cpu().sub(1).abs().max() < 1e-6
    for power in (1, 2):
        estimate, truth = found.moment(power), float(true.moment(power).estimate)
        assert abs(estimate.estimate - truth) <= 5 * estimate.stderr + 1e-6 * abs(truth)
    assert float(found.nodes.max()) <= float(true.nodes.max()) * (1 + 1e-4)
    assert float(found.nodes.max()) >= float(true.nodes.max()) * 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_spectra_are_those_of_the_cpu(device, dtype):
    there = block_spectra(objective_on(device, dtype), "parameter", dense_limit=2000)
    here = block_spectra(objective_on("cpu", torch.float64), "parameter", dense_limit=2000)
    largest = max(s.scale for s in here.values())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for name, spectrum in here.items():
        torch.testing.assert_close(
            there[name].eigenvalues.cpu(), spectrum.eigenvalues, rtol=tolerance, atol=tolerance * largest
        )
    torch.testing.assert_close(there.js_divergence(), here.js_divergence(), rtol=1e-2, atol=1e-3)


def test_sampled_block_spectra_agree_with_the_dense_ones(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = block_spectra(objective_on(device, torch.float64), "layer", dense_limit=0, num_steps=12, num_probes=12)
    here = block_spectra(objective_on("cpu", torch.float64), "layer", dense_limit=2000)
    for name, spectrum in here.items():
        found = there[name]
        assert abs(float(found.top[0] - spectrum.top[0])) <= float(found.top_residuals[0]) + 1e-9
        assert abs(found.trace.estimate - spectrum.trace.estimate) <= 5 * found.trace.stderr + 1e-8


def test_a_measurement_leaves_the_random_state_of_the_gpu(cuda):
    torch.cuda.manual_seed(5)
    objective = objective_on(cuda, torch.float32, width=40)
    before, on_cpu = torch.cuda.get_rng_state_all(), torch.get_rng_state()
    op = Hessian(objective)
    spectral_density(op, num_steps=8, num_probes=2)
    top_eigenvalues(op, 1)
    block_spectra(objective, "layer", num_steps=8, num_probes=2)
    assert all(torch.equal(a, b) for a, b in zip(before, torch.cuda.get_rng_state_all(), strict=True))
    assert torch.equal(on_cpu, torch.get_rng_state())
