"""XTrace's formulas against sketches that really leave a probe out, and sketches of deficient rank."""

import math

import pytest
import torch
from sharpscope.hessian.operator import DenseOperator
from sharpscope.hessian.sketch import RangeSketch, new_direction, remainder


def symmetric(eigenvalues, seed=0):
    torch.manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    A = (Q * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    return (A + A.T) / 2


def grown(A, *sizes, seed=0):
    sketch = RangeSketch(DenseOperator(A), sum(sizes), seed)
    for size in sizes:
        sketch.grow(size)
    return sketch


def probes_of(sketch):
    return sketch._probes[: sketch.num_probes].T  # [n, k]


def brute_force(A, probes):
    """t_i and f_i from an explicit basis of the images of all other probes."""
    n, k = probes.shape
    traces, squares = [], []
    for i in range(k):
        others = probes[:, [j for j in range(k) if j != i]]
        Q, _ = torch.linalg.qr(A @ others)
        omega = probes[:, i] - Q @ (Q.T @ probes[:, i])
        omega = omega / omega.norm() * math.sqrt(n - others.shape[1])
        traces.append(torch.trace(Q.T @ A @ Q) + omega @ A @ omega)
        squares.append((A @ Q).square().sum() + (A @ omega).square().sum())
    return torch.stack(traces), torch.stack(squares)


SPECTRA = {
    "decaying": 0.8 ** torch.arange(30.0),
    "indefinite": torch.linspace(-2, 3, 30),
    "flat": torch.full((30,), 2.0) + 0.1 * torch.linspace(0, 1, 30),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_samples_equal_those_from_explicit_sketches(name):
    A = symmetric(SPECTRA[name])
    sketch = grown(A, 7)
    traces, squares = brute_force(A, probes_of(sketch))
    torch.testing.assert_close(sketch.gram().trace().samples, traces, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sketch.gram().squared_norm().samples, squares, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SPECTRA)
def test_jackknife_equals_that_from_explicit_sketches(name):
    A, k = symmetric(SPECTRA[name]), 6
    sketch = grown(A, k)
    probes = probes_of(sketch)
    means = torch.stack([brute_force(A, probes[:, [j for j in range(k) if j != i]])[0].mean() for i in range(k)])
    expected = math.sqrt((k - 1) / k * float((means - means.mean()).square().sum()))
    gram = sketch.gram()
    assert gram.jackknife(gram._traces) == pytest.approx(expected, rel=1e-8)


def test_a_sketch_that_grew_equals_one_made_at_once():
    A = symmetric(SPECTRA["indefinite"])
    once, twice = grown(A, 9).gram(), grown(A, 4, 2, 3).gram()
    for field in ("W", "R", "H", "Z", "lengths"):
        torch.testing.assert_close(getattr(twice, field), getattr(once, field))


def test_inner_products_are_those_of_the_vectors():
    A = symmetric(SPECTRA["decaying"])
    sketch = grown(A, 3, 4)
    gram, Omega, Q = sketch.gram(), probes_of(sketch), sketch._Q
    torch.testing.assert_close(Q @ Q.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(gram.W, Q @ Omega)
    torch.testing.assert_close(Q.T @ gram.R, A @ Omega)
    torch.testing.assert_close(gram.H, Q @ A @ Q.T)
    torch.testing.assert_close(gram.Z, Q @ A @ A @ Q.T)
    assert sketch.products == 14


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_of_small_rank_is_exact_and_stops_the_sketch(rank):
    d = torch.zeros(40, dtype=torch.float64)
    d[:rank] = torch.tensor([5.0, -2.0, 1.0], dtype=torch.float64)[:rank]
    sketch = grown(torch.diag(d), 8)  # a diagonal matrix, so that the rank is exact in floating point too
    assert sketch.products == 8 + rank
    for mean, truth in ((sketch.gram().trace(), d.sum()), (sketch.gram().squared_norm(), d.square().sum())):
        torch.testing.assert_close(mean.samples, truth.expand(8), rtol=0, atol=1e-12)
        assert mean.stderr < 1e-12


def test_residual_variance_of_an_empty_sketch_is_that_of_the_sphere():
    """A low-rank sketch of a flat spectrum leaves nearly all: the stated variance is nearly 2/k ‖A − mean‖²."""
    A = symmetric(torch.linspace(-1, 1, 400))
    stated = torch.tensor([grown(A, 3, seed=seed).gram()._residual_stderr() ** 2 for seed in range(60)])
    truth = 2 * float(A.square().sum()) / 3
    assert float(stated.mean()) == pytest.approx(truth, rel=0.05)


def test_remainder_and_new_direction():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(50, 4))
    Q = Q.T.contiguous()
    w = Q[0] * 1e4 + torch.randn(50) * 1e-2  # the part outside is a millionth
    assert float((Q @ remainder(Q, w)).abs().max()) < 1e-8
    q = new_direction(Q, w)
    assert q is not None
    assert float(q.norm()) == pytest.approx(1, abs=1e-6)
    # One part in 1e6 is left of w in float32, so the direction itself is good to 1e-1 only, but orthogonal to 1e-6.
    assert float((Q @ q).abs().max()) < 1e-6
    assert new_direction(Q, Q.T @ torch.ones(4)) is None
    assert new_direction(Q, torch.zeros(50)) is None
    assert torch.equal(remainder(Q[:0], w), w)
