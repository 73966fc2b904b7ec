"""What the library says of this GPU."""

import pytest
import torch
from sharpscope.kernels import quantize_m
from sharpscope.kernels.batched_lanczos import batched_lanczos
from sharpscope.kernels.capabilities import capabilities

pytestmark = pytest.mark.gpu


def test_every_function_runs_on_its_cuda_kernels(cuda, monkeypatch):
    monkeypatch.delenv("SHARPSCOPE_KERNELS", raising=False)
    found = {c.function: c for c in capabilities() if c.device == "cuda"}
    assert {name: (c.path, c.why) for name, c in found.items()} == {
        name: ("cuda", "") for name in ("codec", "adamw4", "lanczos", "tridiagonal")
    }


def test_nothing_is_left_in_the_random_state_of_the_gpu(cuda):
    before = torch.cuda.get_rng_state(cuda)
    quantize_m(torch.ones(500, device=cuda), rounding="stochastic", seed=1)
    batched_lanczos(lambda v: 2 * v, [0, 100, 500], 5, device=cuda)
    assert torch.equal(torch.cuda.get_rng_state(cuda), before)
