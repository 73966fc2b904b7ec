"""The device of the GPU tests, and what they compare with.

`SHARPSCOPE_GPU_TESTS_ON=cpu pytest -m gpu tests/kernels/gpu` rehearses them on a CPU: what needs CUDA itself is
skipped, the rest runs on the paths of the CPU.
"""

import importlib.util
import os

import pytest
import torch
from sharpscope.kernels import AdamW4State, Packed, adamw4_step, quantize_m, quantize_v
from sharpscope.kernels import codec_reference as reference


def why_no_gpu():
    """None where the CUDA kernels can run, else the reason."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None if importlib.util.find_spec("cupy") else "CuPy is not installed"


@pytest.fixture(scope="session")
def device():
    """Where the tests run."""
    if os.environ.get("SHARPSCOPE_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    reason = why_no_gpu()
    if reason:
        pytest.skip(reason)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def cuda(device):
    """The same for tests of what only CUDA has: streams, graphs, several devices."""
    if device.type != "cuda":
        pytest.skip("needs CUDA itself, no rehearsal")
    return device


@pytest.fixture(scope="session")
def assert_same_bits():
    """`assert_same_bits(a, b, what)`: equal shapes, dtypes and bytes, NaN included."""

    def check(a, b, what=""):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), what
        first, second = a.detach().cpu().reshape(-1), b.detach().cpu().reshape(-1)
        if not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            differ = (first.view(torch.uint8) != second.view(torch.uint8)).view(-1, first.element_size()).any(1)
            at = differ.nonzero().flatten()
            pytest.fail(
                f"{what}: {len(at)} of {len(first)} entries differ, first at {at[:4].tolist()}: "
                f"{first[at[:4]].tolist()} and {second[at[:4]].tolist()}"
            )

    return check


@pytest.fixture(scope="session")
def moments():
    """`moments(shape, map, seed)` on the CPU: magnitudes of 1e-44 to 1e2, some zero blocks, signs for map "de"."""

    def make(shape, map="de", seed=0):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=rng).reshape(-1)
        blocks = -(-x.numel() // 128)
        powers = torch.empty(blocks).uniform_(-42, 2, generator=rng).where(torch.rand(blocks, generator=rng) < 0.2, 0.0)
        factors = (10.0 ** powers.double()).where(torch.rand(blocks, generator=rng) > 0.05, 0.0)
        x = (x.double() * factors.repeat_interleave(128)[: x.numel()]).float()
        return (x if map == "de" else x.abs()).reshape(shape)

    return make


@pytest.fixture(scope="session")
def encode():
    """`encode(x, map, scale, **how)` by the public functions."""

    def call(x, map, scale="block128", **how):
        return quantize_m(x, **how) if map == "de" else quantize_v(x, map=map, scale=scale, **how)

    return call


@pytest.fixture(scope="session")
def defined():
    """`defined(x, map, scale, rounding, seed, step, id)` -> codes, scales, bad, values: what the definition gives."""

    def call(x, map, scale="block128", *, rounding="nearest", seed=0, step=0, id=0):
        x = x.detach().cpu().float()
        n, rank1 = x.numel(), scale == "rank1" and x.ndim > 1
        codes, bad = torch.empty((n + 1) // 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        stream = 2 * id + (map != "de")
        how = {"map": map, "stochastic": rounding == "stochastic", "seed": seed, "step": step, "stream": stream}
        if rank1:
            matrix = x.reshape(x.shape[0], -1)
            rows, columns, out = torch.empty(matrix.shape[0]), torch.empty(matrix.shape[1]), torch.empty(matrix.shape)
            reference.quantize_rank1(matrix, codes, rows, columns, bad, **how)
            reference.dequantize_rank1(codes, rows, columns, out, map=map)
            return codes, (rows, columns), bad, out.reshape(x.shape)
        scales, out = torch.empty(-(-n // 128)), torch.empty(n)
        reference.quantize_block(x.reshape(-1), codes, scales, bad, **how)
        reference.dequantize_block(codes, scales, out, map=map)
        return codes, (scales,), bad, out.reshape(x.shape)

    return call


@pytest.fixture(scope="session")
def state_to():
    """`state_to(state, device)`: a copy."""

    def moved(packed, device):
        codes, bad = (part.detach().clone().to(device) for part in (packed.codes, packed.bad))
        return Packed(codes, tuple(s.detach().clone().to(device) for s in packed.scales), packed.shape, packed.map, bad)

    def call(state, device):
        skipped = state.skipped.clone().to(device)
        return AdamW4State(moved(state.m, device), moved(state.v, device), skipped, state.id)

    return call


@pytest.fixture
def defined_step(monkeypatch):
    """`defined_step(params, grads, states, **how)` on CPU tensors, in place: what the definition gives."""

    def call(params, grads, states, **how):
        with monkeypatch.context() as patch:
            patch.setenv("SHARPSCOPE_KERNELS", "reference")
            adamw4_step(params, grads, states, **how)

    return call


@pytest.fixture(scope="session")
def assert_same_states(assert_same_bits):
    """`assert_same_states(params, states, others, other_states, what)`: every byte."""

    def parts(state):
        return {
            "m codes": state.m.codes,
            "m scales": state.m.scales[0],
            "v codes": state.v.codes,
            **{f"v scales {i}": part for i, part in enumerate(state.v.scales)},
            "skipped": state.skipped,
        }

    def check(params, states, others, other_states, what=""):
        for i, (p, state, q, other) in enumerate(zip(params, states, others, other_states, strict=True)):
            for name, part in parts(state).items():
                assert_same_bits(part, parts(other)[name], f"{what} tensor {i} {list(p.shape)} {name}")
            assert_same_bits(p, q, f"{what} tensor {i} {list(p.shape)} p")

    return check
