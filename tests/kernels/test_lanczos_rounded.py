"""Batched Lanczos over a basis in float16 against the run that rounds nothing."""

import math

import pytest
import torch
from sharpscope.kernels import lanczos_rounded
from sharpscope.kernels.batched_lanczos import NonFiniteProduct, batched_lanczos
from sharpscope.kernels.lanczos_state import State

N = 5000
OUTLIERS = (10.0, 8.0, 6.0, 5.0, -4.0)


def diagonal(n=N):
    bulk = torch.rand(n - len(OUTLIERS), generator=torch.Generator().manual_seed(0)) - 0.5
    return torch.cat([torch.tensor(OUTLIERS), bulk])


def both(num_steps, d=None, offsets=None):
    d = diagonal() if d is None else d
    offsets = [0, len(d)] if offsets is None else offsets
    return (batched_lanczos(lambda v: d * v, offsets, num_steps, basis_dtype=x) for x in (None, torch.float16))


def eigenvalues(runs, b=0):
    k = int(runs.steps[b])
    off = runs.beta[b, : k - 1]
    return torch.linalg.eigvalsh(torch.diag(runs.alpha[b, :k]) + torch.diag(off, 1) + torch.diag(off, -1))


def test_coefficients_are_those_of_the_unrounded_run():
    """As long as rounding has not made the recurrences part: until the outliers have converged."""
    plain, rounded = both(7)
    # The rounding of a stored vector is 1e-4 of it. Subtracted with the diagonal coefficient it would show.
    torch.testing.assert_close(rounded.alpha, plain.alpha, atol=2e-5, rtol=0)
    torch.testing.assert_close(rounded.beta, plain.beta, atol=2e-5, rtol=0)
    assert rounded.basis.dtype == torch.float16
    assert rounded.alpha.dtype == torch.float64


def test_latest_vectors_are_not_rounded():
    """A q_j − α q_j − β q_{j−1} − β' q_{j+1} holds what inner products with rounded vectors are off by, 10 · 3e-4 / √n
    for each of up to 30, as in a random walk. Rounding the latest would leave 10 · 3e-4."""
    d, seen = diagonal(), []

    def product(v):
        seen.append(v.clone())
        return d * v

    runs = batched_lanczos(product, [0, N], 30, basis_dtype=torch.float16)
    for j in range(1, 29):
        rest = (
            d * seen[j] - runs.alpha[0, j] * seen[j] - runs.beta[0, j - 1] * seen[j - 1] - runs.beta[0, j] * seen[j + 1]
        )
        assert float(rest.norm()) < 4e-4
    torch.testing.assert_close(runs.vector(0, 3), seen[3], atol=0, rtol=6e-4)
    assert float((runs.vector(0, 3) - seen[3]).norm()) < 5e-4


def test_long_runs_show_no_ghosts_and_say_how_orthogonal_they_are():
    plain, rounded = both(100)
    for runs, limit in ((plain, 1e-6), (rounded, 1e-4)):
        found = eigenvalues(runs)
        for value in OUTLIERS:
            near = found[(found - value).abs() < 0.4]
            assert len(near) == 1
            assert float(near) == pytest.approx(value, abs=2e-5)
        Q = torch.stack([runs.vector(0, j).double() for j in range(100)])
        gram = Q @ Q.T
        assert runs.orthogonality(0) < limit
        assert runs.orthogonality(0) == pytest.approx(float(gram[:-1, -1].abs().max()), rel=0.2, abs=1e-8)
        assert float((gram - torch.eye(100)).abs().max()) < 20 * limit


def test_entries_are_stored_times_a_power_of_two_near_the_root_of_the_length():
    lengths = [1, 16, 5000, 40]
    d = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(3))
    _, runs = both(4, d, [0, *torch.tensor(lengths).cumsum(0).tolist()])
    assert runs.unit.tolist() == [1.0, 4.0, 64.0, 4.0]
    for b in range(4):
        for j in range(int(runs.steps[b])):
            stored = runs.vectors(b)[j].float() / runs.unit[b]
            torch.testing.assert_close(float(stored.norm()), 1.0, atol=1e-3, rtol=0)
            assert torch.equal(stored, runs.vector(b, j))


def test_recurrences_end_where_the_unrounded_ones_do():
    d = torch.cat([torch.tensor([1.0, -2.0, 5.0]).repeat(20), torch.linspace(-1, 1, 80), torch.tensor([2.0]).repeat(9)])
    plain, rounded = both(12, d, [0, 60, 140, 149])
    assert rounded.steps.tolist() == plain.steps.tolist() == [3, 12, 1]
    torch.testing.assert_close(eigenvalues(rounded), torch.tensor([-2.0, 1.0, 5.0]).double(), atol=1e-5, rtol=0)
    for b in (0, 2):
        assert not bool(rounded.vectors(b)[int(rounded.steps[b]) :].any())
        assert not bool(rounded.alpha[b, int(rounded.steps[b]) :].any())


def test_zero_and_one_entry():
    runs = batched_lanczos(lambda v: 0 * v, [0, 5, 6], 3, basis_dtype=torch.float16)
    assert runs.steps.tolist() == [1, 1]
    assert not bool(runs.alpha.any())
    assert runs.orthogonality(0) == 0.0


@pytest.mark.parametrize("power", [-80, 60])
def test_units_of_the_operator_do_not_matter(power):
    d, factor = diagonal(), 2.0**power
    runs, scaled = (
        batched_lanczos(lambda v, c=c: c * d * v, [0, N], 8, basis_dtype=torch.float16) for c in (1.0, factor)
    )
    assert torch.equal(runs.basis, scaled.basis)
    assert torch.equal(runs.alpha * factor, scaled.alpha)


def test_a_product_that_is_not_finite_is_named():
    d = torch.ones(30)
    d[14] = math.inf
    with pytest.raises(NonFiniteProduct, match="recurrence 1 .* step 0"):
        batched_lanczos(lambda v: d * v, [0, 10, 30], 3, basis_dtype=torch.float16)


@pytest.mark.parametrize(
    ("dtype", "basis_dtype"),
    [(torch.float64, torch.float16), (torch.float32, torch.float64), (torch.float32, torch.int16)],
)
def test_other_types_are_refused(dtype, basis_dtype):
    with pytest.raises(ValueError, match=f"`basis_dtype` is {basis_dtype}"):
        batched_lanczos(lambda v: v, [0, 5], 2, dtype=dtype, basis_dtype=basis_dtype)


def test_naming_the_type_of_the_run_rounds_nothing():
    d = diagonal()
    runs = batched_lanczos(lambda v: d * v, [0, N], 3, basis_dtype=torch.float32)
    assert torch.equal(runs.basis, batched_lanczos(lambda v: d * v, [0, N], 3).basis)
    state = State.empty(torch.tensor([0, 4]).numpy(), 2, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="unrounded"):
        lanczos_rounded.VectorWork(state)
