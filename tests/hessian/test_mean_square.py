"""Radius and threshold in the mean square against the map written out with Kronecker products, and closed forms."""

import itertools
import math
import warnings

import pytest
import torch
from sharpscope.hessian import mean_square
from sharpscope.hessian.batch_moments import BatchMoments
from sharpscope.hessian.mean_square import MeanSquareStability

SAMPLINGS = ("bernoulli", "without_replacement")
kron = torch.kron


def random_factors(seed, n=8, k=6, r=2):
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, k, r, generator=draw, dtype=torch.float64)
    return factors * torch.rand(n, 1, 1, generator=draw, dtype=torch.float64)


def written_out(H, lr, batches, beta=0.0):
    """E[M ⊗ M] over equally likely `batches` (lists of examples) or weighted ones, for one step of SGD."""
    d = H.shape[1]
    eye, zero = torch.eye(d, dtype=H.dtype), torch.zeros(d, d, dtype=H.dtype)
    total = 0.0
    for probability, members, size in batches:
        mean = H[members].sum(0) / size if members else zero
        if beta == 0.0:
            M = eye - lr * mean
        else:
            M = torch.cat([torch.cat([(1 + beta) * eye - lr * mean, -beta * eye], 1), torch.cat([eye, zero], 1)])
        total = total + probability * kron(M, M)
    return total


def all_batches(n, size, sampling):
    found = []
    for code in range(2**n):
        members = [i for i in range(n) if code >> i & 1]
        m = len(members)
        if sampling == "bernoulli":
            found.append(((size / n) ** m * (1 - size / n) ** (n - m), members, size))
        elif m == size:
            found.append((1 / math.comb(n, size), members, size))
    return found


def spectral_radius(matrix):
    return float(torch.linalg.eigvals(matrix).abs().max())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("beta", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_radius_and_threshold_equal_those_of_all_batches_written_out(sampling, beta, size):
    """No formula of noise is used: the expectation runs over every batch there is."""
    F = random_factors(size, n=5, k=4)
    stability = MeanSquareStability(F)
    threshold = stability.threshold(size, sampling=sampling, momentum=beta)
    for share in (0.6, 1.0, 1.4):
        lr = share * threshold
        exact = spectral_radius(written_out(F @ F.mT, lr, all_batches(5, size, sampling), beta))
        found = stability.radius(lr, size, sampling=sampling, momentum=beta, tol=1e-12)
        assert found == pytest.approx(exact, abs=1e-9)
        assert (exact < 1 - 1e-7, exact > 1 + 1e-7) == (share < 1, share > 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_iteration_equals_diagonalisation(monkeypatch, sampling, beta):
    F = random_factors(1, n=9, k=7, r=3)
    small = MeanSquareStability(F)
    threshold = small.threshold(2, sampling=sampling, momentum=beta)
    radii = [small.radius(share * threshold, 2, sampling=sampling, momentum=beta) for share in (0.5, 1.5)]
    monkeypatch.setattr(mean_square, "DENSE_RANK", 0)
    large = MeanSquareStability(F)
    assert large.threshold(2, sampling=sampling, momentum=beta) == pytest.approx(threshold, rel=1e-7)
    for share, radius in zip((0.5, 1.5), radii, strict=True):
        found = large.radius(share * threshold, 2, sampling=sampling, momentum=beta)
        assert found == pytest.approx(radius, rel=1e-7)


def written_out_moments(stability, lr, size, sampling, beta):
    """T as a matrix on E[(w_t, w_(t−1)) (w_t, w_(t−1))ᵀ]."""
    H, a = stability.coordinates @ stability.coordinates.mT, stability.eigenvalues
    k, noise = len(a), BatchMoments.of(stability.num_examples, size, sampling)
    eye = torch.eye(k, dtype=a.dtype)
    step = torch.diag(1 + beta - lr * a)
    step = torch.cat([torch.cat([step, -beta * eye], 1), torch.cat([eye, 0 * eye], 1)])
    moments = kron(step, step)
    own = sum(kron(h, h) for h in H)
    places = (torch.arange(k).unsqueeze(1) * 2 * k + torch.arange(k)).reshape(-1)
    moments[places.unsqueeze(1), places] += lr**2 * (
        noise.own * own - noise.centre * kron(torch.diag(a), torch.diag(a))
    )
    return moments


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
def test_directions_and_examples_of_very_different_size(monkeypatch, rank, beta):
    """The root of the search lies next to its pole, where the radius without noise is nearly that with it."""
    monkeypatch.setattr(mean_square, "DENSE_RANK", rank)
    for seed, sampling in itertools.product(range(4), SAMPLINGS):
        F = random_factors(40 + seed, n=5, k=4)
        sizes = torch.logspace(0, -2, 4 + seed % 2, dtype=torch.float64)
        stability = MeanSquareStability(F * (sizes.reshape(-1, 1, 1) if seed % 2 else sizes.reshape(1, -1, 1)))
        threshold = stability.threshold(2, sampling=sampling, momentum=beta)
        for share in (0.05, 0.5, 0.99, 1.0, 1.3, 4.0):
            exact = spectral_radius(written_out_moments(stability, share * threshold, 2, sampling, beta))
            found = stability.radius(share * threshold, 2, sampling=sampling, momentum=beta)
            assert found == pytest.approx(exact, rel=2e-8)


def test_a_radius_costs_a_few_thresholds(monkeypatch):
    calls, products = [0], MeanSquareStability._products
    monkeypatch.setattr(
        MeanSquareStability, "_products", lambda self, X: (calls.__setitem__(0, calls[0] + 1), products(self, X))[1]
    )

    def counted(function, *args):
        calls[0] = 0
        return function(*args), calls[0]

    stability = MeanSquareStability(random_factors(50, n=24, k=60, r=4))
    threshold, one = counted(stability.threshold, 3)
    assert one > 5
    for share in (0.3, 0.9, 1.0, 1.2):
        assert counted(stability.radius, share * threshold, 3)[1] <= 6 * one


def test_what_lies_outside_of_the_span_does_not_count():
    F = random_factors(2, n=4, k=3, r=1)
    wide = torch.zeros(4, 9, 2, dtype=torch.float64)
    wide[:, 2:5, :1] = F
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    plain, padded = MeanSquareStability(F), MeanSquareStability(rotation @ wide)
    assert (plain.rank, padded.rank) == (3, 3)
    assert padded.radius(0.1, 1) == pytest.approx(plain.radius(0.1, 1), rel=1e-12)
    assert padded.radius(0.01, 2) < 1
    assert padded.threshold(2) == pytest.approx(plain.threshold(2), rel=1e-12)
    gram = MeanSquareStability.from_gram((rotation @ wide).mT.reshape(8, 9) @ (rotation @ wide).mT.reshape(8, 9).T, 4)
    assert gram.rank == 3
    assert gram.threshold(2) == pytest.approx(plain.threshold(2), rel=1e-9)


def test_without_parameters_but_the_gram_many_parameters_change_nothing():
    F = random_factors(3, n=6, k=300, r=2)
    stability = MeanSquareStability(F)
    assert stability.coordinates.shape == (6, 12, 2)
    H = F @ F.mT
    torch.testing.assert_close(stability.eigenvalues, torch.linalg.eigvalsh(H.mean(0))[-12:])
    products = (stability.coordinates @ stability.coordinates.mT).reshape(6, -1)
    torch.testing.assert_close(products @ products.T, H.reshape(6, -1) @ H.reshape(6, -1).T)


@pytest.mark.parametrize("copies", [1, 5, 20])
@pytest.mark.parametrize("size", [1, 4, 50])
def test_copies_on_one_axis_follow_the_closed_form(copies, size):
    """E-growth on the axis is (1 − ηλ)² + η² (n/B − 1) λ² / σ; it crosses 1 at λ = (2σ/η) / (σ + n/B − 1)."""
    n, lam = 100, 2.0
    F = torch.zeros(n, 1, 1, dtype=torch.float64)
    F[:copies] = math.sqrt(lam * n / copies)
    stability = MeanSquareStability(F)
    for lr in (0.05, 0.5, 0.9):
        exact = (1 - lr * lam) ** 2 + lr**2 * (n / size - 1) * lam**2 / copies
        assert stability.radius(lr, size) == pytest.approx(exact, abs=1e-12)
    exact = 2 * copies / (lam * (copies + n / size - 1))
    assert stability.threshold(size) == pytest.approx(exact, rel=1e-12)


def test_threshold_with_momentum_on_one_axis():
    """AR(2): stationary variance (1 + β) / ((1 − β) ηλ (2 (1 + β) − ηλ)) per unit of noise."""
    n, size, beta, curvatures = 4, 1, 0.7, torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    lam = float(curvatures.mean())
    noise = BatchMoments.of(n, size, "without_replacement")
    variance = noise.own * float(curvatures.square().sum()) - noise.centre * lam**2
    # η² variance (1 + β) / ((1 − β) ηλ (2 (1 + β) − ηλ)) = 1
    gain = variance * (1 + beta) / (1 - beta)
    exact = 2 * (1 + beta) * lam / (lam**2 + gain)
    stability = MeanSquareStability(curvatures.sqrt().reshape(n, 1, 1))
    assert stability.threshold(size, sampling="without_replacement", momentum=beta) == pytest.approx(exact, rel=1e-12)


def test_second_moments_grow_as_simulated():
    """E‖w‖² over five steps of SGD from a fixed point, within four standard errors of 200 000 runs."""
    F = random_factors(4, n=6, k=4)
    stability, runs, size = MeanSquareStability(F), 200_000, 2
    lr = 1.2 * stability.threshold(size)
    H = stability.coordinates @ stability.coordinates.mT
    draw = torch.Generator().manual_seed(5)
    start = torch.randn(4, generator=draw, dtype=torch.float64)
    w, moment = start.expand(runs, 4), torch.outer(start, start)
    for _ in range(5):
        member = (torch.rand(runs, 6, generator=draw) < size / 6).to(H)
        w = w - lr / size * (torch.einsum("iab,rb->ria", H, w) * member.unsqueeze(2)).sum(1)
        moment = stability.advanced(moment, lr, size)
    lengths = w.square().sum(1)
    error = float(lengths.std()) / math.sqrt(runs)
    assert abs(float(lengths.mean()) - float(moment.trace())) < 4 * error
    assert error < 0.05 * float(lengths.mean())


def test_sam_replaces_h_by_h_plus_rho_h_squared():
    F, rho = random_factors(6, n=5, k=4), 0.3
    H = F @ F.mT
    changed = H + rho * H @ H
    values, vectors = torch.linalg.eigh(changed)
    by_hand = MeanSquareStability(vectors * values.clamp(min=0).sqrt().unsqueeze(1))
    stability = MeanSquareStability(F)
    for options in ({"momentum": 0.0}, {"momentum": 0.8, "sampling": "without_replacement"}):
        threshold = stability.threshold(2, rho=rho, **options)
        assert threshold == pytest.approx(by_hand.threshold(2, **options), rel=1e-9)
        assert threshold < stability.threshold(2, **options)
        assert stability.radius(1.3 * threshold, 2, rho=rho, **options) == pytest.approx(
            by_hand.radius(1.3 * threshold, 2, **options), rel=1e-7
        )


def test_a_step_of_sam_is_what_rho_says():
    """w − η ∇ℓ_i(w + rho ∇ℓ_i(w)) for quadratic ℓ_i, B = 1."""
    F, rho, lr = random_factors(7, n=4, k=3), 0.2, 0.05
    H = F @ F.mT
    eye, total = torch.eye(3, dtype=torch.float64), 0.0
    for h in H:
        M = eye - lr * h @ (eye + rho * h)
        total = total + kron(M, M) / 4
    found = MeanSquareStability(F).radius(lr, 1, sampling="without_replacement", rho=rho)
    assert found == pytest.approx(spectral_radius(total), rel=1e-10)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_whole_batch_is_gradient_descent(sampling, beta):
    stability = MeanSquareStability(random_factors(8))
    threshold = stability.threshold(8, sampling=sampling, momentum=beta)
    assert threshold == pytest.approx(2 * (1 + beta) / stability.largest_eigenvalue, rel=1e-12)
    assert stability.radius(1.1 * threshold, 8, sampling=sampling, momentum=beta) > 1
    assert stability.radius(0.9 * threshold, 8, sampling=sampling, momentum=beta) < 1


def test_a_single_example_without_replacement_has_no_noise():
    stability = MeanSquareStability(random_factors(9, n=1))
    assert stability.threshold(1, sampling="without_replacement") == pytest.approx(2 / stability.largest_eigenvalue)
    assert stability.threshold(0.5) < 2 / stability.largest_eigenvalue


@pytest.mark.parametrize("beta", [0.0, 0.8])
def test_larger_batches_are_never_less_stable(beta):
    """Mulayoff and Michaeli, 2024: the threshold does not fall with the batch size."""
    for seed in range(10):
        stability = MeanSquareStability(random_factors(20 + seed))
        for sampling in SAMPLINGS:
            found = [stability.threshold(size, sampling=sampling, momentum=beta) for size in range(1, 9)]
            assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(found))


def test_zero_hessians_never_move():
    stability = MeanSquareStability(torch.zeros(3, 2, 1))
    assert (stability.rank, stability.radius(1.0, 1), stability.threshold(1)) == (0, 0.0, math.inf)


def test_a_gram_of_float32_is_taken():
    F = random_factors(11, n=40, k=30, r=3).float()
    flat = F.mT.reshape(120, 30)
    gram = MeanSquareStability.from_gram(flat @ flat.T, 40, rank_tol=1e-4)
    assert gram.threshold(4) == pytest.approx(MeanSquareStability(F).threshold(4), rel=1e-4)
    assert MeanSquareStability.from_gram(torch.zeros(4, 4), 2).rank == 0


def test_many_directions_are_iterated_within_tolerance():
    """Rank 60 by Lanczos against one eigenvalue problem of the pencil written out."""
    F = random_factors(10, n=30, k=60, r=2)
    stability = MeanSquareStability(F)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threshold = stability.threshold(3, tol=1e-9)
    a = stability.eigenvalues
    H = stability.coordinates @ stability.coordinates.mT
    X, mu = torch.diag(a.rsqrt()), torch.zeros(())
    for _ in range(200):  # (L − η Q) X = 0 as the fixed point X ∝ L⁻¹ Q X
        product = a.unsqueeze(1) * X * a + 9 / 30**2 * (H @ X @ H).sum(0)
        X = product / (a.unsqueeze(1) + a)
        mu = X.norm()
        X = X / mu
    assert threshold == pytest.approx(1 / float(mu), rel=1e-7)


def test_axes_that_one_step_of_gradient_descent_would_clear():
    """n orthogonal examples at η = 1/λ: nothing but noise is left, n/B − 1 of it."""
    stability = MeanSquareStability(torch.eye(30, dtype=torch.float64).unsqueeze(2))
    assert stability.radius(30.0, 3) == pytest.approx(9.0, rel=1e-7)
    assert stability.radius(30.0, 20) == pytest.approx(0.5, rel=1e-7)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.threshold(9), "batch_size"),
        (lambda s: s.threshold(0), "batch_size"),
        (lambda s: s.threshold(2.5, sampling="without_replacement"), "batch_size"),
        (lambda s: s.threshold(2, sampling="bernouli"), "sampling"),
        (lambda s: s.threshold(2, momentum=1.0), "momentum"),
        (lambda s: s.threshold(2, rho=-0.1), "rho"),
        (lambda s: s.radius(0.0, 2), "lr"),
        (lambda s: MeanSquareStability(torch.ones(3, 2)), "factors"),
        (lambda s: MeanSquareStability(torch.full((3, 2, 1), math.nan)), "factors"),
        (lambda s: MeanSquareStability.from_gram(torch.eye(5), 2), "gram"),
        (lambda s: MeanSquareStability.from_gram(torch.full((4, 4), math.nan), 2), "gram"),
        (lambda s: MeanSquareStability.from_gram(-torch.eye(4), 2), "gram"),
        (lambda s: MeanSquareStability.from_gram(torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1])), 2), "gram"),
        (lambda s: MeanSquareStability.from_gram(torch.eye(4) + torch.ones(4, 4).triu(1), 2), "gram"),
        (lambda s: MeanSquareStability.from_gram(torch.eye(4), 2.0), "num_examples"),
        (lambda s: MeanSquareStability(torch.ones(3, 2, 1), rank_tol=math.nan), "rank_tol"),
        (lambda s: s.threshold("3"), "batch_size"),
        (lambda s: s.threshold(True), "batch_size"),
        (lambda s: s.threshold(math.nan), "batch_size"),
        (lambda s: s.threshold(2, tol=0.0), "tol"),
        (lambda s: s.threshold(2, rho=math.nan), "rho"),
        (lambda s: s.radius("a", 2), "lr"),
        (lambda s: s.radius(0.1, 2, tol=-1.0), "tol"),
        (lambda s: s.radius(0.1, 2, momentum="0.9"), "momentum"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        call(MeanSquareStability(random_factors(0)))
