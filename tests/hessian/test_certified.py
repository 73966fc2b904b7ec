"""The whole path against dense float64 Hessians: what the tool reports is true within what it states."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sharpscope import (
    GGN,
    Hessian,
    Objective,
    block_spectra,
    diagonal,
    frobenius_norm,
    partition,
    spectral_density,
    top_eigenvalues,
    trace,
)
from torch import nn

NAMES = ("mlp", "cnn", "transformer")
ENGINES = ("double-backward", "forward-over-reverse", "finite-difference")


@pytest.fixture(scope="module")
def exact(request):
    """`exact(name)` -> the dense float64 Hessian of a shared problem and its eigenvalues, computed once."""
    cache = {}

    def find(name, make_problem, dense_hessian):
        if name not in cache:
            model, data = make_problem(name)
            H = dense_hessian(lambda: F.cross_entropy(model(data[0]), data[1]), model.parameters())
            cache[name] = (H, torch.linalg.eigvalsh(H))
        return cache[name]

    return find


def objective_of(problem, **options):
    model, data = problem
    return Objective.supervised(model, nn.CrossEntropyLoss(), data, **options)


@pytest.mark.parametrize("name", NAMES)
def test_top_ten_and_bottom_three_in_float64(name, make_problem, dense_hessian, exact):
    _, eigenvalues = exact(name, make_problem, dense_hessian)
    hessian = Hessian(objective_of(make_problem(name)))
    top = top_eigenvalues(hessian, 10, which="LA", tol=1e-8)
    bottom = top_eigenvalues(hessian, 3, which="SA", tol=1e-8)
    assert top.converged
    assert bottom.converged
    for pairs, truth in ((top, eigenvalues.flip(0)[:10]), (bottom, eigenvalues[:3])):
        error = (pairs.values - truth).abs()
        assert bool((error <= pairs.residuals).all())
        assert bool((error <= 1e-6 * truth.abs()).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ENGINES)
def test_top_ten_and_bottom_three_in_float32(name, engine, make_problem, dense_hessian, exact):
    _, eigenvalues = exact(name, make_problem, dense_hessian)
    hessian = Hessian(objective_of(make_problem(name, torch.float32)), engine=engine)
    # Differences in float32 carry a stated error above 1e-4; asking for less than that would not converge.
    tol = 1e-3 if engine != "finite-difference" else max(1e-3, 4 * hessian.relative_error)
    top = top_eigenvalues(hessian, 10, which="LA", tol=tol, accuracy="vectors", verify=True)
    bottom = top_eigenvalues(hessian, 3, which="SA", tol=tol, accuracy="vectors", verify=True)
    for pairs, truth in ((top, eigenvalues.flip(0)[:10]), (bottom, eigenvalues[:3])):
        error = (pairs.values - truth).abs()
        assert bool((error <= pairs.residuals).all())
        # Differences err by a share of |λ|max, exact products by a share of each value.
        scale = eigenvalues.abs().max() if engine == "finite-difference" else truth.abs()
        assert bool((error <= tol * scale).all())
        assert pairs.converged


@pytest.mark.parametrize("name", NAMES)
def test_estimators_cover_the_truth(name, make_problem, dense_hessian, exact):
    """Trace, diagonal and Frobenius norm within three standard errors in at least 95 of 100 seeds.

    The dense matrix stands in for the operator, so that a hundred seeds take seconds; that the operator equals it is
    what the other tests of this file show.
    """
    from sharpscope.hessian import DenseOperator

    H, _ = exact(name, make_problem, dense_hessian)
    op = DenseOperator((H + H.T) / 2)
    truths = {"trace": float(H.trace()), "frobenius": float(H.norm())}
    hits = dict.fromkeys(("hutchinson", "hutch++", "xtrace", "frobenius"), 0)
    diagonal_hits = 0.0
    for seed in range(100):
        for method in ("hutchinson", "hutch++", "xtrace"):
            found = trace(op, method=method, num_probes=60, seed=seed)
            hits[method] += abs(found.estimate - truths["trace"]) <= 3 * found.stderr
        found = frobenius_norm(op, num_probes=60, seed=seed)
        hits["frobenius"] += abs(found.estimate - truths["frobenius"]) <= 3 * found.stderr
        entries = diagonal(op, num_probes=60, seed=seed)
        diagonal_hits += float(((entries.estimate - H.diagonal()).abs() <= 3 * entries.stderr + 1e-12).double().mean())
    assert min(hits.values()) >= 95, hits
    assert diagonal_hits >= 95


@pytest.mark.parametrize("name", NAMES)
def test_density_mean_is_the_trace_over_n(name, make_problem, dense_hessian, exact):
    H, eigenvalues = exact(name, make_problem, dense_hessian)
    density = spectral_density(Hessian(objective_of(make_problem(name))), num_steps=30, num_probes=10, seed=3)
    mean = density.mean()
    assert abs(mean.estimate - float(H.trace()) / len(H)) <= 3 * mean.stderr
    # Wasserstein-1 distance to the exact spectrum, as a share of its range.
    from scipy.stats import wasserstein_distance

    distance = wasserstein_distance(
        density.nodes.flatten().numpy(), eigenvalues.numpy(), density.weights.flatten().numpy()
    )
    assert distance <= 0.02 * float(eigenvalues.max() - eigenvalues.min())


@pytest.mark.parametrize("name", NAMES)
def test_block_spectra_obey_the_identities(name, make_problem, dense_hessian, exact):
    H, eigenvalues = exact(name, make_problem, dense_hessian)
    objective = objective_of(make_problem(name))
    spectra = block_spectra(objective, "parameter", dense_limit=1000)
    assert sum(float(block.trace) for block in spectra.values()) == pytest.approx(float(H.trace()), rel=1e-9)
    for block_name, block in partition(objective, "parameter").items():
        at = block.indices(objective.layout)
        truth = np.linalg.eigvalsh(H[at][:, at].numpy())
        np.testing.assert_allclose(spectra[block_name].eigenvalues, truth, rtol=1e-8, atol=1e-10)
        assert truth.max() <= float(eigenvalues.max()) + 1e-10


def test_ggn_of_the_transformer_is_positive(make_problem):
    """Cross-entropy is convex in the logits, so the Gauss-Newton matrix has no negative eigenvalue."""
    ggn = GGN(objective_of(make_problem("transformer")))
    assert float(top_eigenvalues(ggn, 1, which="SA", tol=1e-6).values[0]) >= -1e-6 * float(
        top_eigenvalues(ggn, 1).values[0]
    )


@pytest.mark.slow
def test_eight_thousand_parameters(dense_hessian):
    """A 7,960-parameter tanh network on the digits: dense Hessian in float64 against the float32 and float64 paths."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    torch.manual_seed(0)
    x = torch.tensor(digits.data[:200] / 16, dtype=torch.float64)
    y = torch.tensor(digits.target[:200])
    model = nn.Sequential(nn.Linear(64, 84), nn.Tanh(), nn.Linear(84, 26), nn.Tanh(), nn.Linear(26, 10)).double()
    H = dense_hessian(lambda: F.cross_entropy(model(x), y), model.parameters())
    eigenvalues = torch.linalg.eigvalsh(H)
    for dtype, tol in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), dtype=dtype)
        top = top_eigenvalues(Hessian(objective), 10, tol=tol, accuracy="vectors", verify=True)
        bottom = top_eigenvalues(Hessian(objective), 3, which="SA", tol=tol, accuracy="vectors", verify=True)
        for pairs, truth in ((top, eigenvalues.flip(0)[:10]), (bottom, eigenvalues[:3])):
            assert pairs.converged
            error = (pairs.values - truth).abs()
            assert bool((error <= pairs.residuals).all())
            assert bool((error <= (1e-6 if dtype == torch.float64 else 1e-3) * truth.abs()).all())


def test_residuals_of_a_cancelling_sum_hold():
    """Two float32 matrices that nearly cancel: rounding is large beside what is left, and the residual says so."""
    from sharpscope.hessian import DenseOperator

    M = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    A = DenseOperator(M @ M.T)
    with pytest.warns(UserWarning, match="not converged"):
        pairs = top_eigenvalues(2.0 * (A - 0.999999 * A), 1)
    truth = 2e-6 * torch.linalg.eigvalsh((M @ M.T).double()).max()
    assert abs(float(pairs.values[0] - truth)) <= float(pairs.residuals[0])
