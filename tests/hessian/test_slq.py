"""Stochastic Lanczos quadrature: the moments it promises, known spectra, stated errors, the degenerate cases."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from sharpscope.hessian.lockstep import sample
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator, LinearOperator
from sharpscope.hessian.probes import rademacher, random_generator
from sharpscope.hessian.slq import SpectralDensity, spectral_densities, spectral_density
from tqdm import tqdm

N = 300


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


SPECTRA = {
    "outliers": torch.cat([torch.tensor([10.0, 8, 5, -3]), 0.2 * torch.sin(torch.arange(N - 4.0))]),
    "indefinite": torch.linspace(-3, 4, N),
    "flat": torch.linspace(1, 3, N),
}


class Counted(DenseOperator):
    def __init__(self, matrix):
        super().__init__(matrix)
        self.products = 0

    def matmat(self, V):
        self.products += V.shape[1]
        return super().matmat(V)


def w1(density, eigenvalues):
    nodes = density.nodes.reshape(-1).numpy()
    return wasserstein_distance(nodes, eigenvalues.numpy(), density.weights.reshape(-1).numpy())


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_of_every_probe_are_exact_up_to_degree_2k_minus_1(name):
    A = symmetric(SPECTRA[name] / SPECTRA[name].abs().max())
    op, k, p = DenseOperator(A), 5, 3
    density = spectral_density(op, num_steps=k, num_probes=p, seed=7)
    V = rademacher(op, p, random_generator(op, 7)) / math.sqrt(N)
    image = V
    for power in range(2 * k):
        moments = (density.weights * density.nodes**power).sum(1)
        torch.testing.assert_close(moments, (V * image).sum(1), rtol=0, atol=1e-12)
        image = image @ A
    # One degree more is no longer exact.
    moments = (density.weights * density.nodes ** (2 * k)).sum(1)
    assert float((moments - (V * image).sum(1)).abs().max()) > 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_mean_is_the_trace_over_n_within_its_error(name, dtype):
    A = symmetric(SPECTRA[name])
    op, truth, hits, errors, stderrs = DenseOperator(A.to(dtype)), float(A.trace()) / N, 0, [], []
    for seed in range(100):
        mean = spectral_density(op, num_steps=3, num_probes=4, seed=seed).mean()
        hits += abs(mean.estimate - truth) <= 3 * mean.stderr
        errors.append(mean.estimate - truth)
        stderrs.append(mean.stderr)
    assert hits >= 95
    # Both are known to 7 % or better from 100 seeds.
    assert np.linalg.norm(stderrs) == pytest.approx(np.linalg.norm(errors), rel=0.25)


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra_are_met_in_wasserstein_distance(name):
    eigenvalues = SPECTRA[name].double()
    density = spectral_density(DenseOperator(symmetric(eigenvalues)), num_steps=30, num_probes=9)
    assert not density.exact
    assert w1(density, eigenvalues) < 0.02 * float(eigenvalues.max() - eigenvalues.min())


def test_more_steps_resolve_more():
    eigenvalues = torch.linspace(-1, 1, 2001, dtype=torch.float64) ** 3
    op = DiagonalOperator(eigenvalues)
    coarse, fine = (spectral_density(op, num_steps=k, num_probes=20) for k in (5, 40))
    assert w1(fine, eigenvalues) < w1(coarse, eigenvalues) / 2


def test_extreme_nodes_converge_without_ghosts():
    """Far beyond convergence of the outliers, each appears once for every probe, with a weight near 1/n."""
    eigenvalues = SPECTRA["outliers"].double()
    density = spectral_density(DenseOperator(symmetric(eigenvalues)), num_steps=130, num_probes=2)
    for outlier in (10.0, 8.0, 5.0, -3.0):
        near = (density.nodes - outlier).abs() < 0.5
        assert near.sum(1).tolist() == [1, 1]
        torch.testing.assert_close(density.nodes[near], torch.full((2,), outlier, dtype=torch.float64))
    bulk = (density.nodes.abs() < 1) & (density.weights > 0)
    assert bool((bulk.sum(1) == 126).all())
    assert float(density.nodes[bulk].abs().max()) <= 0.2 + 1e-9


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_enough_steps_give_all_eigenvalues_for_n_products(n):
    eigenvalues = torch.linspace(-1, 2, n, dtype=torch.float64)
    op = Counted(symmetric(eigenvalues))
    density = spectral_density(op, num_steps=40, num_probes=8)
    assert density.exact
    torch.testing.assert_close(density.nodes, eigenvalues.unsqueeze(0))
    torch.testing.assert_close(density.weights, torch.full((1, n), 1 / n, dtype=torch.float64))
    assert density.products == op.products == n
    assert (density.mean().stderr, density.moment(2).stderr) == (0.0, 0.0)
    x = density.grid()
    assert not bool(density.on_grid(x)[1].any())


def test_products_never_exceed_n_for_a_small_matrix():
    op = Counted(symmetric(torch.linspace(0, 1, 100)))
    assert spectral_density(op, num_steps=20, num_probes=5).exact  # 100 products either way
    assert op.products == 100
    assert not spectral_density(op, num_steps=20, num_probes=4).exact
    assert op.products == 180


def test_breakdown_ends_a_probe_and_pads_it():
    d = torch.cat([torch.full((200,), 1.0), torch.full((150,), -2.0), torch.full((50,), 5.0)]).double()
    density = spectral_density(DiagonalOperator(d), num_steps=10, num_probes=3)
    assert density.nodes.shape == density.weights.shape == (3, 10)
    assert density.products == 9
    torch.testing.assert_close(density.nodes[:, :3], torch.tensor([[-2.0, 1.0, 5.0]]).double().expand(3, 3))
    # Signs give the diagonal matrix's multiplicities exactly.
    torch.testing.assert_close(density.weights[:, :3], torch.tensor([[0.375, 0.5, 0.125]]).double().expand(3, 3))
    assert not bool(density.weights[:, 3:].any())
    assert bool((density.nodes[:, 3:] == density.nodes[:, 2:3]).all())


def test_weights_sum_to_one():
    density = spectral_density(DenseOperator(symmetric(SPECTRA["flat"]).float()), num_steps=20, num_probes=4)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4, dtype=torch.float64))
    assert density.products == 80
    assert density.seconds > 0


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_zero_and_identity(value):
    op = DiagonalOperator(torch.full((500,), value))
    density = spectral_density(op, num_steps=10, num_probes=3)
    torch.testing.assert_close(density.nodes, torch.full((3, 10), value).double(), atol=1e-7, rtol=0)
    mean = density.mean()
    assert abs(mean.estimate - float(torch.tensor(value))) <= 3 * mean.stderr
    x = density.grid()
    smooth, band = density.on_grid(x)
    assert float(torch.trapezoid(smooth, x)) == pytest.approx(1, abs=1e-6)
    assert float(band.max()) < 1e-3 * float(smooth.max())


@pytest.mark.parametrize("sigma", [None, 0.3, 2.0])
def test_smoothed_density_integrates_to_one(sigma):
    density = spectral_density(DenseOperator(symmetric(SPECTRA["indefinite"])), num_steps=20, num_probes=5)
    x = density.grid(2000, sigma)
    smooth, band = density.on_grid(x, sigma)
    assert float(torch.trapezoid(smooth, x)) == pytest.approx(1, abs=1e-6)
    assert smooth.shape == band.shape == x.shape
    assert bool((band > 0).any())


def test_smoothing_equals_its_formula_and_takes_arrays():
    density = SpectralDensity(
        nodes=torch.tensor([[0.0, 1.0], [0.5, 0.5]]).double(),
        weights=torch.tensor([[0.25, 0.75], [1.0, 0.0]]).double(),
        mean_stderr=0.0,
        exact=False,
        products=4,
        seconds=0.0,
    )
    x = np.linspace(-1, 2, 31)

    def bell(center):
        return np.exp(-(((x - center) / 0.2) ** 2) / 2) / (0.2 * math.sqrt(2 * math.pi))

    first, second = 0.25 * bell(0.0) + 0.75 * bell(1.0), bell(0.5)
    for points in (x, torch.from_numpy(x), x.tolist()):
        smooth, band = density.on_grid(points, 0.2)
        np.testing.assert_allclose(smooth, (first + second) / 2)
        np.testing.assert_allclose(band, np.abs(first - second) / 2, atol=1e-15)  # s/√2 of two values
    assert density.default_sigma() == pytest.approx(0.01)


def test_band_covers_the_smoothed_truth():
    """At 41 points and 20 seeds, the truth smoothed alike lies within three bands nearly always."""
    eigenvalues = SPECTRA["indefinite"].double()
    op, x, sigma = DenseOperator(symmetric(eigenvalues)), torch.linspace(-4, 5, 41).double(), 0.7
    truth = SpectralDensity(eigenvalues.unsqueeze(0), torch.full((1, N), 1 / N).double(), 0.0, True, 0, 0.0)
    exact, _ = truth.on_grid(x, sigma)
    shares = []
    for seed in range(20):
        smooth, band = spectral_density(op, num_steps=25, num_probes=10, seed=seed).on_grid(x, sigma)
        shares.append(((smooth - exact).abs() <= 3 * band + 1e-6).double().mean())
    assert float(torch.stack(shares).mean()) > 0.95  # Student's t with 9 degrees of freedom gives 0.985


def test_moments_and_shares():
    eigenvalues = SPECTRA["indefinite"].double()
    density = spectral_density(DenseOperator(symmetric(eigenvalues)), num_steps=29, num_probes=10)
    for power in (0, 1, 2, 5):
        found, truth = density.moment(power), float((eigenvalues**power).mean())
        assert abs(found.estimate - truth) <= 4 * found.stderr + 1e-12
    negative, truth = density.weight_below(0.0), float((eigenvalues <= 0).double().mean())
    assert negative.estimate == pytest.approx(truth, abs=0.03)
    assert density.weight_below(100.0).estimate == pytest.approx(1)
    with pytest.raises(ValueError, match="`power` is -1"):
        density.moment(-1)


def test_one_probe_has_an_infinite_band():
    density = spectral_density(DenseOperator(symmetric(SPECTRA["flat"])), num_steps=10, num_probes=1)
    assert bool(torch.isinf(density.on_grid([2.0])[1]).all())
    assert density.mean().stderr == math.inf


def test_seeds_repeat_and_the_global_stream_stays():
    op, state = DenseOperator(symmetric(SPECTRA["flat"])), torch.random.get_rng_state()
    first, again, other = (spectral_density(op, num_steps=5, num_probes=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes, other.nodes)
    assert torch.equal(state, torch.random.get_rng_state())


def test_progress_is_shown_on_request_only(capfd):
    op = DenseOperator(symmetric(SPECTRA["flat"]))
    spectral_density(op, num_steps=4, num_probes=2)
    assert capfd.readouterr().err == ""
    spectral_density(op, num_steps=4, num_probes=2, progress=True)
    assert "8/8" in capfd.readouterr().err


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode(mode):
    op = DenseOperator(symmetric(SPECTRA["flat"]))
    outside = spectral_density(op, num_steps=5, num_probes=2)
    with mode():
        inside = spectral_density(op, num_steps=5, num_probes=2)
    assert torch.equal(outside.nodes, inside.nodes)


class Broken(LinearOperator):
    def matmat(self, V):
        return torch.full_like(V, math.nan)


@pytest.mark.parametrize("n", [10, 1000])
def test_nan_is_said(n):
    with pytest.raises(ValueError, match="of Broken.* has NaN"):
        spectral_density(Broken(n), num_steps=20, num_probes=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "`num_steps` is 0"),
        ({"num_steps": 1}, ValueError, "`num_steps` is 1"),
        ({"num_probes": 0}, ValueError, "`num_probes` is 0"),
        ({"num_steps": 2.5}, TypeError, "`num_steps` is 2.5"),
    ],
)
def test_bad_counts(options, error, message):
    with pytest.raises(error, match=message):
        spectral_density(DiagonalOperator(torch.ones(1000)), **options)


def test_bad_grids():
    density = spectral_density(DiagonalOperator(torch.ones(5)))
    with pytest.raises(ValueError, match="`sigma` is -1"):
        density.on_grid([0.0], -1.0)
    with pytest.raises(ValueError, match="`x` has shape"):
        density.on_grid(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="`x` has shape"):
        density.on_grid([math.nan])


class Recorded(Counted):
    """Also the number of vectors of every product."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.widths = []

    def matmat(self, V):
        self.widths.append(V.shape[1])
        return super().matmat(V)


def test_probes_are_multiplied_together():
    op = Recorded(symmetric(SPECTRA["flat"]))
    density = spectral_density(op, num_steps=6, num_probes=11)
    assert op.widths == 6 * [8] + 6 * [3]
    assert density.products == 66


def test_an_ended_probe_gets_no_more_products():
    """Two swaps in 2 I: of a swap's eigenvalues 1 and −1 a probe sees the product of its two signs."""
    A = 2 * torch.eye(900, dtype=torch.float64)
    for i in (0, 2):
        A[i : i + 2, i : i + 2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    op = Recorded(A)
    Z = rademacher(op, 7, random_generator(op, 5))
    seen_both = int((Z[:, 0] * Z[:, 1] != Z[:, 2] * Z[:, 3]).sum())
    assert 0 < seen_both < 7
    density = spectral_density(op, num_steps=10, num_probes=7, seed=5)
    assert op.widths == [7, 7, seen_both]
    assert density.products == op.products == 14 + seen_both
    assert ((density.weights > 0).sum(1) == 3).sum() == seen_both


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounds_do_not_matter(monkeypatch, dtype):
    """One probe at a time, where memory is short, gives what all together give."""
    op = Recorded(symmetric(SPECTRA["indefinite"]).to(dtype))
    together = spectral_density(op, num_steps=12, num_probes=5, seed=3)
    vector_bytes = N * dtype.itemsize
    for room, widths in ((2, 24 * [2] + 12 * [1]), (1, 60 * [1]), (0, 60 * [1])):
        op.widths.clear()
        free = 8 * room * 16 * vector_bytes + 7
        monkeypatch.setattr("sharpscope.hessian.lockstep.available_bytes", lambda _, free=free: free)
        apart = spectral_density(op, num_steps=12, num_probes=5, seed=3)
        assert op.widths == widths
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(apart.nodes, together.nodes, atol=1e4 * eps, rtol=0)
        assert apart.mean_stderr == pytest.approx(together.mean_stderr, rel=1e3 * eps)


def test_densities_in_lockstep_are_those_alone():
    ops = [DenseOperator(symmetric(SPECTRA[name], seed=i)) for i, name in enumerate(SPECTRA)]
    ops.insert(1, DenseOperator(symmetric(torch.linspace(0, 1, 9))))  # exact
    bar = tqdm(disable=True)
    found = spectral_densities(ops, num_steps=10, num_probes=3, seeds=[4, 5, 6, 7], bar=bar)
    assert [density.exact for density in found] == [False, True, False, False]
    for op, seed, density in zip(ops, (4, 5, 6, 7), found, strict=True):
        alone = spectral_density(op, num_steps=10, num_probes=3, seed=seed)
        torch.testing.assert_close(density.nodes, alone.nodes, atol=1e-12, rtol=0)
        torch.testing.assert_close(density.weights, alone.weights, atol=1e-10, rtol=0)
        assert density.mean_stderr == pytest.approx(alone.mean_stderr, rel=1e-12)
        assert (density.products, density.exact) == (alone.products, alone.exact)
        assert density.seconds > 0


def test_seconds_go_to_the_operator_that_took_them(monkeypatch):
    """What is no product's is shared by size."""
    now = [0.0]
    monkeypatch.setattr("sharpscope.hessian.lockstep.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(DiagonalOperator):
        def matmat(self, V):
            now[0] += 3.0
            return super().matmat(V)

    ops = [DiagonalOperator(torch.linspace(-1, 1, 700)), Slow(torch.linspace(-1, 1, 1400))]
    fast, slow = sample(ops, 20, 4, [0, 1], lambda _: now.append(now.pop() + 0.25))
    assert (fast.products, slow.products) == (80, 80)
    assert fast.seconds == pytest.approx(40 * 0.25 / 3)
    assert slow.seconds == pytest.approx(20 * 3.0 + 2 * 40 * 0.25 / 3)


def test_half_precision_products_run_in_float32():
    A = symmetric(SPECTRA["flat"])
    density = spectral_density(DenseOperator(A.bfloat16()), num_steps=6, num_probes=2)
    expected = spectral_density(DenseOperator(A.float()), num_steps=6, num_probes=2)
    torch.testing.assert_close(density.nodes[:, [0, -1]], expected.nodes[:, [0, -1]], atol=0.03, rtol=0)


class Ill(LinearOperator):
    """Multiplies by what it is given."""

    def __init__(self, product):
        super().__init__(900)
        self._product = product

    def matmat(self, V):
        return self._product(V)


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda V: V[:5], r"product of Ill.* is torch.float32 \[5, 2\]; matmat must return torch.float32 \[900, 2\]"),
        (lambda V: V.double(), r"product of Ill.* is torch.float64 \[900, 2\]"),
        (lambda V: V * torch.where(torch.arange(900) == 7, math.inf, 1.0).unsqueeze(1), "product of Ill.* has NaN"),
    ],
)
def test_bad_products_name_the_operator(product, message):
    ops = [DiagonalOperator(torch.linspace(0, 1, 900)), Ill(product)]
    with pytest.raises(ValueError, match=message):
        spectral_densities(ops, num_steps=5, num_probes=2, seeds=[0, 1])


def test_progress_of_a_formed_matrix_goes_by_its_products():
    seen = []

    class Bar(tqdm):
        def update(self, n=1):
            seen.append(n)
            return super().update(n)

    op = DenseOperator(symmetric(torch.linspace(0, 1, 150)))
    spectral_densities([op], num_steps=30, num_probes=5, seeds=[0], bar=Bar(disable=True))
    assert seen == [64, 64, 22]
