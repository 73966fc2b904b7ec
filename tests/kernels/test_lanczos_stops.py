"""The emulated CUDA text of Lanczos ends every recurrence of 1 to 33 entries when its vectors span them."""

import numpy as np
import pytest
import torch
from sharpscope.kernels import lanczos_cuda, lanczos_state
from sharpscope.kernels.lanczos_state import State

LENGTHS = range(1, 34)
STEPS = 34


def run(launcher, product, lengths, dtype):
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    state = State.empty(bounds, STEPS, dtype, torch.device("cpu"))
    state.basis.fill_(torch.nan)
    work = lanczos_cuda.VectorWork(state, launcher=launcher)
    work.begin(torch.randn(int(bounds[-1]), generator=torch.Generator().manual_seed(3)).to(dtype))
    for j in range(STEPS):
        work.step(product(state.basis[j]), j)
    return state


def check_end(state, b, steps):
    """Nothing was written after the last step, and the vectors are zero from there on."""
    assert int(state.steps[b]) == steps
    assert int(state.open[b]) == 0
    assert not bool(state.alpha[b, steps:].any() or state.remainder[b, steps:].any())
    part = slice(int(state.bounds[b]), int(state.bounds[b + 1]))
    assert not bool(state.basis[steps:, part].any())
    Q = state.basis[:steps, part].double()
    torch.testing.assert_close(Q @ Q.T, torch.eye(steps).double(), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "noise"),
    [(torch.float32, 8), (torch.float64, 8), (torch.float64, 0)],
    ids=["float32", "float64", "exact"],
)
def test_a_recurrence_takes_as_many_steps_as_it_has_entries(emulated, monkeypatch, dtype, noise):
    """With no remainder small enough to be noise, too: then it is the number of vectors that ends a recurrence."""
    monkeypatch.setattr(lanczos_state, "BREAKDOWN_EPS", noise)
    generator = torch.Generator().manual_seed(noise)
    halves = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in LENGTHS]
    A = torch.block_diag(*(X + X.T for X in halves)).to(dtype)
    state = run(emulated(noise), lambda v: A @ v, LENGTHS, dtype)
    for b, n in enumerate(LENGTHS):
        check_end(state, b, n)
        eigenvalues = torch.linalg.eigvalsh(halves[b] + halves[b].T)
        off = state.remainder[b, : n - 1]
        T = torch.diag(state.alpha[b, :n]) + torch.diag(off, 1) + torch.diag(off, -1)
        atol = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(torch.linalg.eigvalsh(T), eigenvalues, atol=atol, rtol=0)


def test_a_recurrence_ends_early_where_its_operator_has_few_eigenvalues(emulated):
    values = torch.cat([torch.tensor([1.0, -2.0, 4.0])[torch.arange(n) % 3] for n in LENGTHS])
    state = run(emulated(), lambda v: values * v, LENGTHS, torch.float64)
    for b, n in enumerate(LENGTHS):
        check_end(state, b, min(n, 3))
