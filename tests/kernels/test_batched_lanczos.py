"""Batched Lanczos on every path against dense matrices, and what must not change its bits."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharpscope.kernels import lanczos_c, lanczos_cuda, lanczos_torch
from sharpscope.kernels.batched_lanczos import NonFiniteProduct, batched_lanczos
from sharpscope.kernels.lanczos_state import State

MODULE = importlib.import_module("sharpscope.kernels.batched_lanczos")
LENGTHS = [1, 2, 5, 31, 33, 64, 300, 700]
ORTHOGONAL = {torch.float32: 5e-6, torch.float64: 1e-13}
EIGENVALUES = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(params=["c", "torch", "cuda"])
def path(request, monkeypatch):
    """`batched_lanczos` takes the path; the CUDA text runs emulated."""
    vector_work = {"c": lanczos_c, "torch": lanczos_torch, "cuda": lanczos_cuda}[request.param].VectorWork
    if request.param == "c" and (reason := lanczos_c.why_unavailable()):
        pytest.skip(reason)
    if request.param == "cuda":
        launcher = request.getfixturevalue("emulated")()
        monkeypatch.setattr(MODULE, "choose", lambda *_: SimpleNamespace(VectorWork=lambda s: cuda(s, launcher)))
    else:
        monkeypatch.setattr(MODULE, "choose", lambda *_: SimpleNamespace(VectorWork=vector_work))
    return request.param


def cuda(state, launcher):
    return lanczos_cuda.VectorWork(state, launcher=launcher)


def bounds_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


class Blocks:
    """Random symmetric matrices of about unit norm on the diagonal; counts its calls."""

    def __init__(self, lengths, dtype=torch.float32, factor=1.0):
        generator = torch.Generator().manual_seed(1)
        self.offsets, self.dtype, self.matrices, self.calls = bounds_of(lengths), dtype, [], 0
        for n in lengths:
            X = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
            self.matrices.append((factor * (X + X.T) / 2).to(dtype))

    def __call__(self, v):
        self.calls += 1
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return torch.cat([A @ v[a:b] for A, (a, b) in zip(self.matrices, spans, strict=True)])


def tridiagonal(runs, b):
    k = int(runs.steps[b])
    return torch.diag(runs.alpha[b, :k]) + torch.diag(runs.beta[b, : k - 1], 1) + torch.diag(runs.beta[b, : k - 1], -1)


def check_against_dense(runs, matrices, dtype):
    for b, A in enumerate(matrices):
        k, A = int(runs.steps[b]), A.double()
        Q, T = runs.vectors(b)[:k].double(), tridiagonal(runs, b)
        assert float((Q @ Q.T - torch.eye(k)).abs().max()) < ORTHOGONAL[dtype]
        torch.testing.assert_close(Q @ A @ Q.T, T, atol=EIGENVALUES[dtype], rtol=0)
        rest = A @ Q.T - Q.T @ T  # only in the last column
        assert float(rest[:, :-1].abs().max() if k > 1 else 0) < EIGENVALUES[dtype]
        torch.testing.assert_close(rest[:, -1].norm(), runs.residual_norm[b], atol=EIGENVALUES[dtype], rtol=0)
        if k == len(A):
            torch.testing.assert_close(
                torch.linalg.eigvalsh(T), torch.linalg.eigvalsh(A), atol=EIGENVALUES[dtype], rtol=0
            )
        assert bool((runs.beta[b, : k - 1] > 0).all())
        for beyond in (runs.alpha[b, k:], runs.beta[b, k - 1 :], runs.vectors(b)[k:]):
            assert not bool(beyond.any())


@DTYPES
def test_every_recurrence_tridiagonalises_its_matrix(path, dtype):
    op = Blocks(LENGTHS, dtype)
    runs = batched_lanczos(op, op.offsets, 34, dtype=dtype)
    assert runs.steps.tolist() == [min(n, 34) for n in LENGTHS]
    assert (runs.alpha.shape, runs.beta.shape, runs.basis.shape) == ((8, 34), (8, 33), (34, sum(LENGTHS)))
    assert (runs.alpha.dtype, runs.beta.dtype, runs.basis.dtype) == (torch.float64, torch.float64, dtype)
    assert runs.offsets.tolist() == op.offsets
    assert op.calls == 34
    check_against_dense(runs, op.matrices, dtype)


@DTYPES
def test_lockstep_is_separate_runs_bit_for_bit(path, dtype):
    lengths = [3, 300, 17, 2600 if path != "cuda" else 600, 1]
    op = Blocks(lengths, dtype)
    start = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(2)).to(dtype)
    together = batched_lanczos(op, op.offsets, 9, start=start)
    for b, A in enumerate(op.matrices):
        part = slice(op.offsets[b], op.offsets[b + 1])
        alone = batched_lanczos(lambda v, A=A: A @ v, [0, len(A)], 9, start=start[part].clone())
        assert torch.equal(together.vectors(b), alone.basis)
        for name in ("alpha", "beta", "residual_norm", "steps"):
            assert torch.equal(getattr(together, name)[b], getattr(alone, name)[0]), name


@DTYPES
def test_paths_agree_to_rounding(path, dtype):
    op = Blocks([40, 7, 400], dtype)
    runs = batched_lanczos(op, op.offsets, 6, dtype=dtype)
    other = reference(op, op.offsets, 6, runs.basis[0])
    torch.testing.assert_close(runs.alpha, other[0], atol=10 * EIGENVALUES[dtype], rtol=0)
    torch.testing.assert_close(runs.beta, other[1], atol=10 * EIGENVALUES[dtype], rtol=0)


def reference(op, offsets, m, q):
    """The recurrences in float64, textbook form, with the whole basis subtracted twice."""
    alpha, beta = torch.zeros(2, len(offsets) - 1, m, dtype=torch.float64)
    for b, A in enumerate(op.matrices):
        Q = q[offsets[b] : offsets[b + 1]].double().unsqueeze(0)
        for j in range(m):
            w = A.double() @ Q[-1]
            alpha[b, j] = Q[-1] @ w
            for _ in range(2):
                w = w - Q.T @ (Q @ w)
            beta[b, j] = w.norm()
            Q = torch.cat([Q, (w / w.norm()).unsqueeze(0)])
    return alpha, beta[:, :-1]


def test_zero_and_identity_take_one_step(path):
    lengths = [4, 1, 50]
    n = sum(lengths)
    factor = torch.repeat_interleave(torch.tensor([0.0, 3.0, 1.0]), torch.tensor(lengths))
    runs = batched_lanczos(lambda v: factor * v, bounds_of(lengths), 5)
    assert runs.steps.tolist() == [1, 1, 1]
    torch.testing.assert_close(runs.alpha[:, 0], torch.tensor([0.0, 3.0, 1.0]).double(), atol=1e-6, rtol=0)
    assert not bool(runs.alpha[:, 1:].any() or runs.beta.any() or runs.basis[1:].any())
    assert float(runs.residual_norm.max()) < 1e-6
    torch.testing.assert_close(runs.basis[0].abs(), torch.cat([torch.full((k,), k**-0.5) for k in lengths]))
    assert runs.basis.shape == (5, n)


def test_a_recurrence_ends_when_its_eigenvalues_are_found(path):
    values = [torch.tensor([1.0, -2.0, 5.0]).repeat(20), torch.linspace(-1, 1, 80), torch.tensor([2.0, 3.0]).repeat(9)]
    d, calls = torch.cat(values), []
    runs = batched_lanczos(lambda v: calls.append(v.clone()) or d * v, bounds_of([60, 80, 18]), 12)
    assert runs.steps.tolist() == [3, 12, 2]
    for b, distinct in ((0, [-2.0, 1.0, 5.0]), (2, [2.0, 3.0])):
        found = torch.linalg.eigvalsh(tridiagonal(runs, b))
        torch.testing.assert_close(found, torch.tensor(distinct).double(), atol=1e-5, rtol=0)
    assert not bool(calls[3][:60].any()), "an ended recurrence asks for the product with zero"
    assert bool(calls[11][60:140].any())
    ended = batched_lanczos(lambda v: calls.append(v) or d[:60] * v, [0, 60], 12)
    assert (len(calls), int(ended.steps)) == (15, 3), "no call once all have ended"


@DTYPES
@pytest.mark.parametrize("power", [-80, 60])
def test_units_of_the_operator_do_not_matter(path, dtype, power):
    """By a power of two everything scales exactly: no sum of squares vanishes or overflows."""
    plain, scaled = Blocks([20, 90], dtype), Blocks([20, 90], dtype, factor=2.0**power)
    runs, other = (batched_lanczos(op, op.offsets, 8, dtype=dtype) for op in (plain, scaled))
    assert torch.equal(other.basis, runs.basis)
    assert torch.equal(other.alpha, runs.alpha * 2.0**power)
    assert torch.equal(other.residual_norm, runs.residual_norm * 2.0**power)


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_starts_of_any_length(path, length):
    op = Blocks([40])
    start = torch.randn(40, generator=torch.Generator().manual_seed(0))
    runs, other = (batched_lanczos(op, op.offsets, 6, start=s) for s in (start, length * start))
    torch.testing.assert_close(other.alpha, runs.alpha, atol=1e-5, rtol=0)
    torch.testing.assert_close(runs.basis[0], start / start.norm())


def test_a_product_that_is_not_finite_names_recurrence_and_step(path):
    bad = torch.ones(30)
    bad[14] = math.inf
    with pytest.raises(NonFiniteProduct, match="recurrence 1 NaN or infinite entries in step 0") as caught:
        batched_lanczos(lambda v: v * bad, [0, 10, 20, 30], 3)
    assert (caught.value.recurrence, caught.value.step) == (1, 0)
    calls = []

    def later(v):
        calls.append(v)
        return torch.full_like(v, math.nan) if len(calls) == 3 else v * torch.arange(30.0)

    with pytest.raises(NonFiniteProduct, match="recurrence 0 .* step 2"):
        batched_lanczos(later, [0, 10, 30], 5)


def test_what_is_not_finite_stays_in_its_recurrence(path):
    """Step by step, as on a GPU, where nothing raises."""
    lengths = [20, 40, 30]
    op, results = Blocks(lengths), []
    for poison in (0.0, math.nan):
        state = State.empty(torch.tensor(op.offsets).numpy(), 5, torch.float32, torch.device("cpu"))
        work = MODULE.choose("lanczos", state.basis.device).VectorWork(state)
        work.begin(torch.linspace(1, 2, 90))
        for j in range(5):
            w = op(state.basis[j])
            w[25] += poison if j == 2 else 0.0
            work.step(w, j)
        results.append(state)
    clean, poisoned = results
    for b, part in ((0, slice(0, 20)), (2, slice(60, 90))):
        assert torch.equal(clean.basis[:, part], poisoned.basis[:, part])
        assert torch.equal(clean.alpha[b], poisoned.alpha[b])
    assert (int(poisoned.steps[1]), int(poisoned.open[1])) == (3, 0)
    assert math.isnan(poisoned.alpha[1, 2])
    assert not bool(poisoned.basis[3:, 20:60].any())


@pytest.mark.parametrize("lengths", [[150_000], [1, 70_000, 33, 60_000]])
def test_threads_change_no_bit(lengths):
    if reason := lanczos_c.why_unavailable():
        pytest.skip(reason)
    n, runs, before = sum(lengths), [], torch.get_num_threads()
    d = torch.linspace(-1, 1, n)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(batched_lanczos(lambda v: d * v, bounds_of(lengths), 12))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0].basis, runs[1].basis)
    assert torch.equal(runs[0].alpha, runs[1].alpha)


def test_coefficients_of_long_vectors_keep_their_digits(path):
    """A float32 dot product summed in one go would lose two to three digits here."""
    n = 20_000 if path == "cuda" else 1_000_000
    d = torch.linspace(1, 2, n)
    runs = batched_lanczos(lambda v: d * v, [0, n], 2)
    assert float(runs.alpha[0, 0]) == pytest.approx(float(d.double().mean()), rel=2e-6)
    assert float(runs.beta[0, 0]) == pytest.approx(float(d.double().std(correction=0)), rel=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    m=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_any_ragged_offsets(lengths, m, dtype, seed):
    op = Blocks(lengths, dtype)
    runs = batched_lanczos(op, torch.tensor(op.offsets), m, seed=seed, dtype=dtype)
    for n, k in zip(lengths, runs.steps.tolist(), strict=True):
        assert 1 <= k <= min(n, m)
    check_against_dense(runs, op.matrices, dtype)


def test_seeds_repeat_and_the_global_stream_stays():
    op, state = Blocks([50, 60]), torch.random.get_rng_state()
    first, again, other = (batched_lanczos(op, op.offsets, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, other.basis)
    assert torch.equal(state, torch.random.get_rng_state())
    assert set((first.basis[0, :50] * 50**0.5).round().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode(mode):
    op = Blocks([30])
    expected = batched_lanczos(op, op.offsets, 5, start=torch.ones(30))
    with mode():
        found = batched_lanczos(op, op.offsets, 5, start=torch.ones(30, requires_grad=True))
    assert torch.equal(found.basis, expected.basis)
    assert not found.basis.is_inference()
    assert not found.basis.requires_grad


def test_products_may_be_strided_or_their_argument():
    wide = torch.arange(40.0)[::2]
    runs = batched_lanczos(lambda v: torch.stack([wide * v, v], dim=1)[:, 0], [0, 20], 20, dtype=torch.float32)
    torch.testing.assert_close(torch.linalg.eigvalsh(tridiagonal(runs, 0)), wide.double(), atol=1e-4, rtol=0)
    assert batched_lanczos(lambda v: v, [0, 20], 3).steps.tolist() == [1]


@pytest.mark.parametrize(
    ("offsets", "num_steps", "options", "error", "message"),
    [
        ([0, 5], 0, {}, ValueError, "`num_steps` is 0; it must be an int of at least 1"),
        ([0, 5], 2.0, {}, ValueError, "`num_steps` is 2.0"),
        ([0], 3, {}, ValueError, r"`offsets` is int64 of shape \[1\]; it must be integers \[B \+ 1\]"),
        ([0.0, 5.0], 3, {}, ValueError, "`offsets` is float64"),
        ([[0, 5]], 3, {}, ValueError, r"`offsets` is int64 of shape \[1, 2\]"),
        ([1, 5], 3, {}, ValueError, "`offsets` begins with 1; it must begin with 0"),
        ([0, 3, 3, 5], 3, {}, ValueError, "`offsets` gives recurrence 1 the entries 3 to 3"),
        ([0, 4, 2], 3, {}, ValueError, "`offsets` gives recurrence 1 the entries 4 to 2"),
        ([0, 2, 4], 3, {"start": torch.ones(5)}, ValueError, r"`start` has shape \[5\]; `offsets` end at 4"),
        ([0, 2, 4], 3, {"start": torch.tensor([1.0, 0, 0, 0])}, ValueError, "`start` is zero in recurrence 1"),
        ([0, 2, 4], 3, {"start": torch.tensor([1.0, math.nan, 1, 0])}, ValueError, "`start` has NaN .* recurrence 0"),
        ([0, 4], 3, {"start": torch.ones(4, dtype=torch.bfloat16)}, ValueError, "`start` is torch.bfloat16; Lanczos"),
        ([0, 4], 3, {"start": [1.0] * 4}, TypeError, "`start` is a list"),
        ([0, 4], 3, {"dtype": torch.float16}, ValueError, "`dtype` is torch.float16"),
        ([0, 4], 3, {"dtype": "float32"}, TypeError, "`dtype` is 'float32'"),
    ],
)
def test_bad_arguments_are_named(offsets, num_steps, options, error, message):
    with pytest.raises(error, match=message):
        batched_lanczos(lambda v: v, offsets, num_steps, **options)


@pytest.mark.parametrize(
    ("product", "error", "message"),
    [
        (lambda v: v[:2], ValueError, r"`matvec` returned torch.float32 \[2\] on cpu; .* torch.float32 \[4\] on cpu"),
        (lambda v: v.double(), ValueError, r"`matvec` returned torch.float64 \[4\]"),
        (lambda v: v.to("meta"), ValueError, "on meta; it must return what it was given"),
        (lambda v: v.numpy(), TypeError, "`matvec` returned a ndarray"),
    ],
)
def test_bad_products_are_named(product, error, message):
    with pytest.raises(error, match=message):
        batched_lanczos(product, [0, 4], 3)


def test_a_product_that_writes_to_the_basis_is_refused():
    with pytest.raises(ValueError, match="`matvec` wrote to its argument"):
        batched_lanczos(lambda v: v.mul_(2), [0, 5], 3)
    with pytest.raises(TypeError, match="`matvec` is a Tensor"):
        batched_lanczos(torch.eye(5), [0, 5], 3)
