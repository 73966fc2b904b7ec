"""Packing is exact and as small as it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharpscope.dynamics.optimizers.packed_codes import pack_codes, unpack_codes
from sharpscope.dynamics.optimizers.sign_rounding import SignRound


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from([2, 3, 4, 8]), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_codes_come_back(bits, count, seed):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, count), generator=gen, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-count * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_known_bytes():
    byte = lambda codes, bits: pack_codes(torch.tensor(codes, dtype=torch.uint8), bits).tolist()
    assert byte([1, 2], 4) == [0x21]
    assert byte([3, 0, 1, 2], 2) == [0b10_01_00_11]
    assert byte([0, 1, 2, 3, 4, 5, 6, 7], 3) == [0b10_001_000, 0b1_100_011_0, 0b111_110_10]
    assert byte([200, 7], 8) == [200, 7]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`codes` has 16; with 4 bits it must be below 16"):
        pack_codes(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match="uint8"):
        pack_codes(torch.tensor([1]), 4)
    with pytest.raises(ValueError, match="`bits` is 9"):
        pack_codes(torch.tensor([1], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="3 bytes a row; 8 codes of 4 bits are 4"):
        unpack_codes(torch.zeros(2, 3, dtype=torch.uint8), 4, 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_packed_weight_decodes_to_the_parameter(bits, symmetric, scale_dtype, dtype):
    gen = torch.Generator().manual_seed(bits)
    p = torch.nn.Parameter(torch.randn(6, 5, 3, generator=gen).to(dtype))
    full = p.detach().clone()
    optimizer = SignRound([p], bits=bits, group_size=4, symmetric=symmetric, lr=0.1, scale_dtype=scale_dtype)
    for _ in range(8):
        p.grad = torch.randn(6, 5, 3, generator=gen).to(dtype)
        optimizer.step()
    quantized = optimizer.quantized(p)
    packed = quantized.pack()
    again = packed.unpack()
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.zero_points, quantized.zero_points)
    assert torch.equal(again.dequantize(), p.detach())
    assert again.dequantize().dtype == dtype
    assert not torch.equal(p.detach(), full)
    groups, of_scale = 4, 2 if scale_dtype == "float16" else 4
    zeros = 0 if symmetric else -(-groups * bits // 8)
    assert packed.num_bytes == 6 * (-(-15 * bits // 8) + groups * of_scale + zeros)
    if symmetric:
        assert bool((quantized.scales < 0).any())
        assert bool((quantized.scales > 0).any())
