"""Long sums against float64 sums of the same numbers."""

import pytest
import torch
from sharpscope.kernels import accurate
from sharpscope.kernels.accurate import combine, dot, norm, project, rotate_


def test_dot_of_a_long_float32_vector_is_exact_to_float64():
    x = torch.rand(3_000_017, generator=torch.Generator().manual_seed(0))
    truth = float((x.double() * x.double()).sum())
    assert float(dot(x, x)) == pytest.approx(truth, rel=1e-13)  # a few thousand roundings of float64
    assert dot(x, x).dtype == torch.float64
    assert dot(x, x).shape == ()


def test_norm_of_a_hundred_million_entries():
    """Where torch.linalg.vector_norm is off by percents on a CPU."""
    x = torch.full((100_000_000,), 0.1)
    assert float(norm(x)) == pytest.approx(float(torch.tensor(0.1)) * 1e4, rel=1e-6)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_norm_neither_overflows_nor_vanishes(size):
    assert float(norm(torch.full((400,), size))) == pytest.approx(20 * size, rel=1e-6)


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 5000])
def test_chunks_cover_every_entry_once(n, monkeypatch):
    monkeypatch.setattr(accurate, "CPU_ENTRIES", 1)  # the shortest chunks
    x = torch.arange(1.0, n + 1)
    assert float(dot(x, torch.ones(n))) == n * (n + 1) / 2
    assert project(x.repeat(3, 1), torch.ones(n)).tolist() == [n * (n + 1) / 2] * 3
    assert torch.equal(combine(torch.stack([x, x]), torch.tensor([1.0, 1.0])), 2 * x)


def test_project_keeps_small_terms_beside_a_large_one():
    """One large entry and many small ones: a float32 partial sum loses the small ones."""
    Q = torch.full((2, 200_000), 1e-5)
    Q[:, 0] = 1.0
    w = torch.full((200_000,), 1e-2)
    w[0] = 1.0
    truth = 1.0 + 199_999 * float(Q[0, 1]) * float(w[1])
    assert project(Q, w).tolist() == pytest.approx([truth] * 2, rel=1e-11)  # 2e5 roundings of float64
    assert project(Q, w, rough=True).tolist() == pytest.approx([truth] * 2, rel=1e-4)


def test_combine_and_rotate_agree_with_matrix_products():
    generator = torch.Generator().manual_seed(1)
    Q = torch.randn(5, 3000, generator=generator)
    c = torch.randn(5, generator=generator, dtype=torch.float64)
    S = torch.linalg.qr(torch.randn(5, 3, generator=generator, dtype=torch.float64))[0]
    assert torch.allclose(combine(Q, c).double(), Q.double().T @ c, atol=1e-5)  # five float32 terms of size 1
    assert torch.equal(combine(Q, S), (S.T @ Q.double()).float())  # float64 sums, rounded once
    rotated = Q.clone()
    rotate_(rotated, S)
    assert torch.equal(rotated[:3], combine(Q, S))
    assert torch.equal(rotated[3:], Q[3:])


def test_an_empty_basis_projects_to_nothing():
    empty, w = torch.empty(0, 7), torch.ones(7)
    assert project(empty, w).shape == (0,)
    assert torch.equal(combine(empty, torch.empty(0, dtype=torch.float64)), torch.zeros(7))


def test_autocast_does_not_reach_in():
    Q = torch.randn(4, 2000, generator=torch.Generator().manual_seed(2))
    c = torch.ones(4, dtype=torch.float64)
    plain = project(Q, Q[0]), project(Q, Q[0], rough=True), combine(Q, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = project(Q, Q[0]), project(Q, Q[0], rough=True), combine(Q, c)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_half_precision_vectors_are_summed_wide():
    x = torch.ones(100_000, dtype=torch.bfloat16)
    assert float(dot(x, x)) == 100_000
    assert project(x[None], x, rough=True).tolist() == [100_000]
    assert combine(x[None], torch.tensor([0.5])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dot(torch.ones(3), torch.ones(4)), r"`x` has shape \[3\] and `y` \[4\]"),
        (lambda: dot(torch.ones(3, 1), torch.ones(3, 1)), r"must be one shape \[n\]"),
        (lambda: project(torch.ones(2, 3), torch.ones(4)), r"\[j, n\] and \[n\]"),
        (lambda: combine(torch.ones(2, 3), torch.ones(3)), r"`c` \[3\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
