"""Every path of the quadrature on matrices that break careless ones, and the bits that three of them share."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sharpscope.kernels import tridiagonal_c, tridiagonal_cuda, tridiagonal_numba, tridiagonal_torch
from sharpscope.kernels.tridiagonal import tridiagonal_quadrature

MODULE = importlib.import_module("sharpscope.kernels.tridiagonal")
PATHS = {"c": tridiagonal_c, "numba": tridiagonal_numba, "torch": tridiagonal_torch, "cuda": tridiagonal_cuda}


def quadrature_on(name, request):
    """The path's function; the CUDA text runs emulated."""
    if name == "cuda":
        launcher = request.getfixturevalue("emulated")()
        return lambda *args: tridiagonal_cuda.quadrature(*args, launcher=launcher)
    if reason := PATHS[name].why_unavailable():
        pytest.skip(reason)
    return PATHS[name].quadrature


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """`tridiagonal_quadrature` takes the path."""
    quadrature = quadrature_on(request.param, request)
    monkeypatch.setattr(MODULE, "choose", lambda *_: SimpleNamespace(quadrature=quadrature))
    return request.param


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randn(shape, generator=generator, dtype=torch.float64)
    return alpha, torch.rand((*shape[:-1], shape[-1] - 1), generator=generator, dtype=torch.float64) + 0.1


def check(alpha, beta, nodes, weights, tolerance=1e-13):
    """Against LAPACK, matrix by matrix, relative to the norm."""
    k = alpha.shape[-1]
    rows = (x.reshape(-1, k).numpy() for x in (alpha, nodes, weights))
    for a, theta, w, b in zip(*rows, beta.reshape(-1, k - 1).numpy(), strict=True):
        scale = max(np.abs(a).max(), np.abs(b).max()) or 1.0
        values, vectors = scipy.linalg.eigh_tridiagonal(a / scale, b / scale)
        np.testing.assert_allclose(theta / scale, values, atol=tolerance, rtol=0)
        np.testing.assert_allclose(
            moments(theta / scale, w), moments(values, vectors[0] ** 2), atol=20 * tolerance, rtol=0
        )


def moments(nodes, weights):
    """Insensitive to how weight is shared out among equal nodes."""
    return [float((weights * nodes**p).sum()) for p in range(4)]


def test_weights_too_where_eigenvalues_are_apart(path):
    k = 40
    alpha = torch.linspace(-1, 1, k).double().expand(3, k)
    beta = torch.full((3, k - 1), 0.02).double()
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    values, vectors = scipy.linalg.eigh_tridiagonal(alpha[0].numpy(), beta[0].numpy())
    for theta, w in zip(nodes, weights, strict=True):
        np.testing.assert_allclose(theta, values, atol=1e-14)
        np.testing.assert_allclose(w, vectors[0] ** 2, atol=1e-14)


@pytest.mark.parametrize("k", [2, 3, 10, 64, 131])
def test_random_matrices(path, k):
    alpha, beta = random(5, k)
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    check(alpha, beta, nodes, weights)
    assert bool((nodes.diff(dim=-1) >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(5).double(), atol=1e-14, rtol=0)


def test_moments_are_exact(path):
    """Σ w θ^p = e₁ᵀ T^p e₁, up to the degree 2 k − 1 of a Gauss rule and beyond, since θ are all eigenvalues."""
    alpha, beta = random(7)
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    T = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    for power in range(14):
        moment = float(torch.linalg.matrix_power(T, power)[0, 0])
        assert float((weights * nodes**power).sum()) == pytest.approx(moment, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("unit", [1e300, 1e-300, 2.0**-1060, 1.0])
def test_huge_and_tiny_matrices(path, unit):
    alpha, beta = random(3, 12)
    nodes, weights = tridiagonal_quadrature(unit * alpha, unit * beta)
    plain = tridiagonal_quadrature(unit * alpha / unit, unit * beta / unit)
    atol = 2.0**-1074 if unit == 2.0**-1060 else 1e-14 * unit
    torch.testing.assert_close(nodes, unit * plain[0], atol=atol, rtol=1e-14)
    torch.testing.assert_close(weights, plain[1], atol=1e-12, rtol=0)


def test_graded_matrices(path):
    """Entries over 300 decades, rising, falling, and in between: the squares of most vanish."""
    powers = [torch.arange(0, -300, -20), torch.arange(-300, 0, 20), 100.0 * torch.tensor([0, -1, -2] * 5)]
    alpha = torch.stack([10.0 ** p.double() for p in powers])
    beta = 0.5 * alpha[:, 1:].minimum(alpha[:, :-1])
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    check(alpha, beta, nodes, weights)


@pytest.mark.parametrize(
    "powers",
    [
        (-90, -225, -235, -158, -140),
        (-97, -228, -235, -165, -139),
        (-98, -179, -240, -167, -133),
        (-109, -201, -244, -177, -150),
        (-126, -204, -260, -190, -161),
    ],
)
def test_matrices_that_fall_apart_in_a_sweep(path, powers):
    """Without a diagonal eigenvalues come in pairs ±θ; here ±b₁, ±b₃, ±b₅ to rounding, since b₂ and b₄ are far smaller.

    Every path is exact to rounding of the norm. The iteration keeps the small eigenvalues too, as the dense solver need
    not: it meets a rotation whose length vanishes, and must give back the shift that the sweep carries.
    """
    beta = torch.tensor([10.0**power for power in powers], dtype=torch.float64).unsqueeze(0)
    alpha = torch.zeros(1, 6).double()
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    positive = beta[0, ::2].sort().values
    exact = torch.cat([-positive.flip(0), positive])
    torch.testing.assert_close(nodes[0], exact, atol=1e-15 * float(positive[-1]), rtol=0)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)
    if path != "torch":
        torch.testing.assert_close(nodes[0], exact, atol=0, rtol=1e-12)


def test_wilkinson_matrices(path):
    """W21+ has pairs of eigenvalues that agree to 14 digits without being equal."""
    alpha = torch.arange(-10.0, 11).abs().double().unsqueeze(0)
    beta = torch.ones(1, 20).double()
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    check(alpha, beta, nodes, weights, tolerance=1e-14)
    assert float(nodes[0, -1]) == pytest.approx(10.746194182903393, rel=1e-14)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("zeros", [[0], [5], [0, 1, 2], [3, 4, 9], list(range(11))])
def test_split_matrices(path, zeros):
    """Only the part that the first row belongs to has weight."""
    alpha, beta = random(1, 12)
    beta[:, zeros] = 0.0
    nodes, weights = tridiagonal_quadrature(alpha, beta)
    check(alpha, beta, nodes, weights)
    first = zeros[0] + 1
    part = tridiagonal_quadrature(alpha[:, :first], beta[:, : first - 1])
    np.testing.assert_allclose(moments(nodes, weights), moments(*part), atol=1e-13, rtol=0)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-200])
def test_multiples_of_the_identity(path, value):
    nodes, weights = tridiagonal_quadrature(torch.full((2, 6), value), torch.zeros(2, 5))
    assert bool((nodes == torch.tensor(value)).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2).double())


def test_equal_diagonal_entries(path):
    """The second difference: eigenvalues 2 − 2 cos(i π / (k + 1)), weights 2 / (k + 1) sin²."""
    k = 50
    nodes, weights = tridiagonal_quadrature(torch.full((1, k), 2.0), torch.full((1, k - 1), -1.0))
    angle = torch.arange(1, k + 1).double() * torch.pi / (k + 1)
    torch.testing.assert_close(nodes[0], 2 - 2 * angle.cos(), atol=1e-14, rtol=0)
    torch.testing.assert_close(weights[0], 2 / (k + 1) * angle.sin() ** 2, atol=1e-14, rtol=0)


def test_lengths_and_padding(path):
    alpha, beta = random(5, 9)
    lengths = torch.tensor([9, 1, 4, 2, 8], dtype=torch.int32)
    for row, size in enumerate(lengths.tolist()):
        alpha[row, size:], beta[row, size - 1 :] = torch.nan, torch.inf
    nodes, weights = tridiagonal_quadrature(alpha, beta, lengths)
    for row, size in enumerate(lengths.tolist()):
        alone = tridiagonal_quadrature(alpha[row, :size], beta[row, : size - 1])
        torch.testing.assert_close(nodes[row, :size], alone[0], atol=1e-14, rtol=0)
        torch.testing.assert_close(weights[row, :size], alone[1], atol=1e-14, rtol=0)
        assert bool((nodes[row, size:] == nodes[row, size - 1]).all())
        assert not bool(weights[row, size:].any())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3), (1, 1), (1, 2), (2, 3, 5)])
def test_shapes(path, shape):
    alpha, beta = random(*shape)
    nodes, weights = tridiagonal_quadrature(alpha.float(), beta.float())
    assert nodes.shape == weights.shape == shape
    assert nodes.dtype == weights.dtype == torch.float64
    if shape[-1] == 1:
        assert (nodes.tolist(), weights.tolist()) == (alpha.float().tolist(), [[1.0]])


@settings(max_examples=100, deadline=None)
@given(
    alpha=arrays(np.float64, (3, 8), elements=st.floats(-1e6, 1e6)),
    beta=arrays(np.float64, (3, 7), elements=st.floats(-1e6, 1e6) | st.just(0.0)),
)
def test_any_matrices(alpha, beta):
    alpha, beta = torch.from_numpy(alpha), torch.from_numpy(beta)
    check(alpha, beta, *tridiagonal_quadrature(alpha, beta), tolerance=1e-12)


def results(quadrature, alpha, beta, lengths):
    nodes, weights = torch.full_like(alpha, 77.0), torch.full_like(alpha, 77.0)
    given = (alpha, beta, lengths)
    before = [x.clone() for x in given]
    quadrature(*given, nodes, weights)
    for x, y in zip(given, before, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), "an argument was written to"
    return nodes, weights


@pytest.mark.parametrize("other", ["numba", "cuda"])
def test_c_numba_and_cuda_give_the_same_bits(other, request):
    c, other = quadrature_on("c", request), quadrature_on(other, request)
    alpha, beta = random(70, 20)
    beta[::5, 3] = 0.0
    alpha[1::5] *= torch.logspace(0, -200, 20).double()
    alpha[2::5], beta[2::5] = alpha[2::5] * 1e300, beta[2::5] * 1e300
    lengths = 1 + torch.arange(70) % 20
    for found, wanted in zip(results(other, alpha, beta, lengths), results(c, alpha, beta, lengths), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["torch", "cuda"])
def test_on_a_gpu_what_cannot_be_solved_is_nan(name, request):
    """Where nothing is read back, nothing can raise."""
    alpha, beta = random(5, 6)
    alpha[1, 2], beta[2, 4] = torch.nan, -torch.inf
    lengths = torch.tensor([6, 6, 6, 0, 7])
    nodes, weights = results(quadrature_on(name, request), alpha, beta, lengths)
    assert torch.isnan(nodes).all(1).tolist() == torch.isnan(weights).all(1).tolist() == [False, True, True, True, True]
    check(alpha[:1], beta[:1], nodes[:1], weights[:1])


def test_what_the_iteration_cannot_finish_goes_to_the_dense_solver():
    alpha, beta = random(4, 6)
    lengths, nodes, weights = torch.full((4,), 6), torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    tridiagonal_torch.repair(torch.tensor([0, 1, 0, 1], dtype=torch.int32), alpha, beta, lengths, nodes, weights)
    assert not bool(nodes[[0, 2]].any() or weights[[0, 2]].any())
    check(alpha[[1, 3]], beta[[1, 3]], nodes[[1, 3]], weights[[1, 3]])


@pytest.mark.parametrize("name", ["c", "numba"])
def test_threads_change_no_bit(name, request):
    quadrature, before = quadrature_on(name, request), torch.get_num_threads()
    (alpha, beta), found = random(300, 30), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(quadrature, alpha, beta, torch.full((300,), 30)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_nothing_is_written_beside_the_rows(emulated):
    alpha, beta = random(3, 5)
    for seed in (0, 1, 5):
        nodes, weights = (torch.full((5, 5), 77.0).double() for _ in range(2))
        tridiagonal_cuda.quadrature(
            alpha, beta, torch.tensor([5, 2, 1]), nodes[1:4], weights[1:4], launcher=emulated(seed)
        )
        assert bool((nodes[[0, 4]] == 77).all() and (weights[[0, 4]] == 77).all())
        check(alpha[:1], beta[:1], nodes[1:2], weights[1:2])
