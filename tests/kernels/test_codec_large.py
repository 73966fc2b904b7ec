"""Tensors of more than 2³¹ entries: indices take 64 bits on every path."""

import pytest
import torch
from sharpscope.kernels import dequantize, quantize_m, quantize_v

LENGTH = 2**31 + 3 * 128 + 5


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [quantize_m, quantize_v])
def test_the_end_of_a_long_tensor_is_encoded_as_it_is_alone(quantize):
    tail = torch.rand(3 * 128 + 5, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(LENGTH)  # zero pages: only what is written takes memory
    x[-len(tail) :] = tail
    packed, alone = quantize(x), quantize(tail)
    assert torch.equal(packed.codes[-len(alone.codes) :], alone.codes)
    assert torch.equal(packed.scales[0][-4:], alone.scales[0])
    assert not packed.scales[0][:-4].any()
    del x
    assert torch.equal(dequantize(packed)[-len(tail) :], dequantize(alone))
