"""Batched Lanczos and quadrature on a GPU: orthonormal bases, true eigenvalues, no waiting for the device."""

import pytest
import torch
from sharpscope.kernels import tridiagonal_quadrature
from sharpscope.kernels.batched_lanczos import batched_lanczos

pytestmark = pytest.mark.gpu

RAGGED = [1, 2, 3, 31, 32, 33, 5, 128, 257, 1000, 7]
DTYPES = {torch.float32: 5e-6, torch.float64: 1e-13}


class BlockDiagonal:
    """A random symmetric matrix for each length; its product is one `mv` per block, whatever stands beside it.

    Each reads a copy of its part: what a product of torch's rounds to may depend on where its operand begins.
    """

    def __init__(self, lengths, dtype, device, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.matrices = []
        for length in lengths:
            A = torch.randn(length, length, generator=rng, dtype=torch.float64)
            self.matrices.append(((A + A.T) / (2 * length**0.5)).to(device, dtype))
        self.lengths = list(lengths)
        self.offsets = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.calls = 0

    def __call__(self, v):
        self.calls += 1
        return torch.cat([A @ part.clone() for A, part in zip(self.matrices, v.split(self.lengths), strict=True)])

    def one(self, b):
        return lambda v: self.matrices[b] @ v.clone()


def start_for(lengths, dtype, device):
    return torch.randn(sum(lengths), generator=torch.Generator().manual_seed(5), dtype=dtype).to(device)


def projected(runs, b):
    """T of recurrence b, dense, float64, on the CPU."""
    k = int(runs.steps[b])
    alpha, beta = runs.alpha[b, :k].cpu(), runs.beta[b, : k - 1].cpu()
    return torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bases_are_orthonormal_and_satisfy_the_recurrence(device, dtype):
    A = BlockDiagonal(RAGGED, dtype, device)
    runs = batched_lanczos(A, A.offsets, 40, start=start_for(RAGGED, dtype, device))
    assert A.calls == 40 or device.type == "cpu"
    for b in range(len(RAGGED)):
        k, T = int(runs.steps[b]), projected(runs, b)
        Q = runs.vectors(b).double().cpu()
        assert (Q[:k] @ Q[:k].T - torch.eye(k)).abs().max() <= DTYPES[dtype]
        assert not Q[k:].any()
        product = Q[:k] @ A.matrices[b].double().cpu()
        expected = T @ Q[:k]
        assert (product[:-1] - expected[:-1]).abs().max() <= 4 * DTYPES[dtype] if k > 1 else True
        left = torch.linalg.vector_norm(product[-1] - expected[-1])
        assert abs(float(left) - float(runs.residual_norm[b])) <= 4 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_recurrences_of_1_to_33_entries_end_exactly(device, dtype):
    lengths = list(range(1, 34))
    A = BlockDiagonal(lengths, dtype, device)
    runs = batched_lanczos(A, A.offsets, 40, start=start_for(lengths, dtype, device))
    assert runs.steps.tolist() == lengths
    for b in range(len(lengths)):
        true = torch.linalg.eigvalsh(A.matrices[b].double().cpu())
        found = torch.linalg.eigvalsh(projected(runs, b))
        assert (found - true).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)
        k = lengths[b]
        assert not runs.alpha[b, k:].any()
        assert not runs.beta[b, k - 1 :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recurrence_does_not_notice_its_neighbours(device, dtype, assert_same_bits):
    A, start = BlockDiagonal(RAGGED, dtype, device), start_for(RAGGED, dtype, device)
    runs = batched_lanczos(A, A.offsets, 20, start=start)
    for b, part in enumerate(start.split(RAGGED)):
        alone = batched_lanczos(A.one(b), [0, RAGGED[b]], 20, start=part.clone())
        for name in ("alpha", "beta", "residual_norm", "steps"):
            assert_same_bits(getattr(runs, name)[b], getattr(alone, name)[0], f"{name} of recurrence {b}")
        assert_same_bits(runs.vectors(b).contiguous(), alone.basis, f"basis of recurrence {b}")


def test_two_runs_give_the_same_bits(device, assert_same_bits):
    lengths = [100_003, 17, 50_000, 1, 4099]
    scale = torch.linspace(0.5, 2, sum(lengths), device=device)
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    runs = [batched_lanczos(lambda v: scale * v, offsets, 24, seed=3, device=device) for _ in range(2)]
    for name in ("alpha", "beta", "residual_norm", "steps", "basis"):
        assert_same_bits(getattr(runs[0], name), getattr(runs[1], name), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_recurrences_are_those_of_the_cpu_to_rounding(device, dtype):
    lengths, m = [70_001, 513, 128, 30_000], 12
    scale = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(2), dtype=dtype)
    offsets, start = [0, *torch.tensor(lengths).cumsum(0).tolist()], start_for(lengths, dtype, "cpu")
    on_cpu = batched_lanczos(lambda v: scale * v, offsets, m, start=start)
    there = scale.to(device)
    runs = batched_lanczos(lambda v: there * v, offsets, m, start=start.to(device))
    assert runs.steps.tolist() == on_cpu.steps.tolist() == [m] * 4
    for name in ("alpha", "beta", "residual_norm"):
        tolerance = 20 * DTYPES[dtype]
        torch.testing.assert_close(getattr(runs, name).cpu(), getattr(on_cpu, name), rtol=tolerance, atol=tolerance)
    Q = runs.basis[:, : lengths[0]].double().cpu()
    assert (Q @ Q.T - torch.eye(m)).abs().max() <= DTYPES[dtype]


def test_zero_and_low_rank_operators_end_early(device):
    lengths = [64, 64, 1, 300]
    rank = torch.zeros(sum(lengths), device=device)
    rank[64:67] = torch.tensor([3.0, -2.0, 1.0], device=device)  # rank 3 with the eigenvalue 0: four steps
    runs = batched_lanczos(lambda v: rank * v, [0, 64, 128, 129, 429], 10, device=device)
    assert runs.steps.tolist() == [1, 4, 1, 1]
    nodes, weights = tridiagonal_quadrature(runs.alpha, runs.beta, runs.steps)
    torch.testing.assert_close(
        nodes[1, :4].cpu(), torch.tensor([-2.0, 0, 1, 3], dtype=torch.float64), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(weights.sum(1).cpu(), torch.ones(4, dtype=torch.float64))


def test_no_step_waits_for_the_device(cuda):
    """The device sleeps in the first product, and is still asleep when the last one is asked for."""
    n, m = 1_000_000, 16
    scale = torch.rand(n, device=cuda)
    offsets = list(range(0, n + 1, 10_000))
    batched_lanczos(lambda v: scale * v, offsets, m, device=cuda)  # compiles
    torch.cuda.synchronize()
    awake, calls, asleep = torch.cuda.Event(), 0, []

    def matvec(v):
        nonlocal calls
        if calls == 0:
            torch.cuda.set_sync_debug_mode("error")
            torch.cuda._sleep(2_000_000_000)
            awake.record()
        calls += 1
        if calls == m:
            asleep.append(not awake.query())
            torch.cuda.set_sync_debug_mode("default")
        return scale * v

    try:
        batched_lanczos(matvec, offsets, m, device=cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert asleep == [True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_that_are_not_finite_show_and_stay_where_they_are(device, bad):
    if device.type == "cpu":
        pytest.skip("a CPU raises")
    lengths = [50, 400, 33]
    scale = torch.linspace(1, 2, sum(lengths), device=device)
    offsets, calls = [0, 50, 450, 483], 0

    def matvec(v):
        nonlocal calls
        calls += 1
        w = scale * v
        if calls == 4:
            w[200] = bad
        return w

    start = start_for(lengths, torch.float32, device)
    runs = batched_lanczos(matvec, offsets, 8, start=start)
    clean = batched_lanczos(lambda v: scale * v, offsets, 8, start=start)
    seen = torch.cat([runs.alpha[1], runs.residual_norm[1:2]])
    assert not torch.isfinite(seen).all()
    for b in (0, 2):
        assert torch.equal(runs.alpha[b], clean.alpha[b])
        assert torch.equal(runs.beta[b], clean.beta[b])


def tridiagonals(count, k, seed=0):
    rng = torch.Generator().manual_seed(seed)
    alpha = torch.randn(count, k, generator=rng, dtype=torch.float64)
    return alpha, torch.rand(count, k - 1, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (1, 2), (3, 33), (256, 64), (1000, 17), (5, 200)])
def test_quadrature_equals_dense_eigenvalues(device, count, k):
    alpha, beta = tridiagonals(count, k, seed=k)
    T = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    values, vectors = torch.linalg.eigh(T)
    nodes, weights = tridiagonal_quadrature(alpha.to(device), beta.to(device))
    assert (nodes.dtype, nodes.device.type) == (torch.float64, device.type)
    torch.testing.assert_close(nodes.cpu(), values, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.cpu(), vectors[:, 0, :].square(), rtol=0, atol=1e-10)
    on_cpu = tridiagonal_quadrature(alpha, beta)
    torch.testing.assert_close(nodes.cpu(), on_cpu[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.cpu(), on_cpu[1], rtol=0, atol=1e-12)


def test_quadrature_of_ragged_runs_ignores_the_padding(device):
    alpha, beta = tridiagonals(60, 40)
    lengths = torch.arange(60) % 40 + 1
    padded, padded_beta = alpha.clone(), beta.clone()
    for i, length in enumerate(lengths.tolist()):
        padded[i, length:], padded_beta[i, length - 1 :] = torch.nan, torch.nan
    nodes, weights = tridiagonal_quadrature(padded.to(device), padded_beta.to(device), lengths.to(device))
    for i, length in enumerate(lengths.tolist()):
        alone = tridiagonal_quadrature(alpha[i, :length], beta[i, : length - 1])
        torch.testing.assert_close(nodes[i, :length].cpu(), alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(weights[i, :length].cpu(), alone[1], rtol=0, atol=1e-12)
        assert not weights[i, length:].any()
        assert (nodes[i, length:] == nodes[i, length - 1]).all()


def test_quadrature_of_graded_and_split_matrices(device):
    k = 50
    alpha = torch.logspace(-12, 3, k, dtype=torch.float64)
    beta = torch.cat([alpha[:-1] / 3])
    beta[20] = 0.0
    cases = torch.stack([alpha, alpha.flip(0), torch.zeros(k, dtype=torch.float64), torch.ones(k, dtype=torch.float64)])
    offs = torch.stack([beta, beta.flip(0), torch.zeros(k - 1, dtype=torch.float64), beta])
    nodes, weights = tridiagonal_quadrature(cases.to(device), offs.to(device))
    T = torch.diag_embed(cases) + torch.diag_embed(offs, 1) + torch.diag_embed(offs, -1)
    values = torch.linalg.eigvalsh(T)
    scale = values.abs().amax(1, keepdim=True).clamp_min(1.0)
    assert ((nodes.cpu() - values).abs() <= 1e-13 * scale).all()
    torch.testing.assert_close(weights.sum(1).cpu(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_quadrature_follows_side_streams(cuda):
    alpha, beta = tridiagonals(64, 32)
    source, target = alpha.to(cuda), torch.zeros(64, 32, dtype=torch.float64, device=cuda)
    there = beta.to(cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        target.copy_(source)
        nodes, _ = tridiagonal_quadrature(target, there)
    stream.synchronize()
    torch.testing.assert_close(nodes.cpu(), tridiagonal_quadrature(alpha, beta)[0], rtol=0, atol=1e-12)
