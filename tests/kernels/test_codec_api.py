"""The public codec: what it takes, what it refuses, what comes back. The bits are tested path by path."""

import copy
import dataclasses
import io

import pytest
import torch
from sharpscope.kernels import Packed, dequantize, quantize_m, quantize_v

GENERATOR = torch.Generator().manual_seed(3)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (129,), (7, 33), (4, 3, 3, 3), (1, 500), (500, 1)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_shape_comes_back_within_the_bounds(shape, rounding):
    x = normal(*shape)
    back = dequantize(quantize_m(x, rounding=rounding))
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    assert (back - x).abs().max() <= (0.1126 if rounding == "nearest" else 0.2251) * x.abs().max()
    for map, bounds in (("linear", (0.0626, 0.0626)), ("square", (0.0616, 0.1212))):
        for scale in ("rank1", "block128"):
            v = quantize_v(x.square(), map=map, scale=scale, rounding=rounding)
            assert v.scale == (scale if len(shape) > 1 else "block128")
            bound = bounds[rounding == "stochastic"]
            assert (dequantize(v) - x.square()).abs().max() <= bound * x.square().max()


def test_bytes_are_those_of_the_formulas():
    m, v = quantize_m(normal(256, 512)), quantize_v(normal(256, 512).square())
    assert m.nbytes == 256 * 512 * (0.5 + 4 / 128)
    assert v.nbytes == 256 * 512 // 2 + 4 * (256 + 512)
    assert quantize_m(normal(5)).nbytes == 3 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_are_encoded_as_their_float32_values(dtype):
    x = normal(300).to(dtype)
    narrow, wide = quantize_m(x), quantize_m(x.float())
    assert torch.equal(narrow.codes, wide.codes)
    assert torch.equal(narrow.scales[0], wide.scales[0])


def test_random_streams_are_reproducible_and_distinct():
    x = normal(4096)

    def codes(**how):
        return quantize_m(x, rounding="stochastic", **how).codes

    assert torch.equal(codes(seed=5, step=2, id=1), codes(seed=5, step=2, id=1))
    for other in ({"seed": 6, "step": 2, "id": 1}, {"seed": 5, "step": 3, "id": 1}, {"seed": 5, "step": 2, "id": 2}):
        assert not torch.equal(codes(seed=5, step=2, id=1), codes(**other))
    state = torch.get_rng_state()
    codes(seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_broken_blocks_decode_to_nan_and_are_counted_while_the_others_are_as_ever():
    x = normal(400)
    clean = dequantize(quantize_m(x))
    x[200] = torch.inf
    packed = quantize_m(x)
    back = dequantize(packed)
    assert packed.bad.item() == 1
    assert back[128:256].isnan().all()
    assert torch.equal(back[:128], clean[:128])
    assert torch.equal(back[256:], clean[256:])
    v = normal(20, 30).square()
    clean = dequantize(quantize_v(v))
    v[4, 7] = -1.0
    packed = quantize_v(v)
    assert packed.bad.item() == 1
    assert dequantize(packed)[4].isnan().all()
    assert dequantize(packed)[5:].isfinite().all()
    assert clean.isfinite().all()


def test_payloads_survive_torch_save_and_deepcopy():
    packed = quantize_v(normal(9, 31).square(), map="square")
    buffer = io.BytesIO()
    torch.save(dataclasses.asdict(packed), buffer)
    buffer.seek(0)
    loaded = Packed(**torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(packed)):
        assert torch.equal(dequantize(other), dequantize(packed))
        assert other.codes.dtype == torch.uint8


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize_m([1.0]), TypeError, "`x` is a list"),
        (lambda: quantize_m(torch.zeros(3, dtype=torch.float64)), TypeError, "float64.*use x.float"),
        (lambda: quantize_m(torch.zeros(3, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: quantize_m(torch.zeros(0, 4)), ValueError, r"\[0, 4\].*no entries"),
        (lambda: quantize_m(torch.zeros(4, 5).T), ValueError, "strides.*contiguous"),
        (lambda: quantize_m(torch._neg_view(torch.ones(4))), ValueError, "negated view"),
        (lambda: quantize_m(torch._efficientzerotensor(4)), ValueError, "no memory of its own"),
        (lambda: quantize_m(torch.zeros(4), rounding="up"), ValueError, "`rounding` is 'up'"),
        (lambda: quantize_m(torch.zeros(4), seed=-1), ValueError, "`seed` is -1"),
        (lambda: quantize_m(torch.zeros(4), seed=2**63), ValueError, "`seed`"),
        (lambda: quantize_m(torch.zeros(4), step=2**32), ValueError, "`step`"),
        (lambda: quantize_m(torch.zeros(4), id=0.5), TypeError, "`id` is 0.5"),
        (lambda: quantize_v(torch.zeros(4), map="de"), ValueError, "`map` is 'de'"),
        (lambda: quantize_v(torch.zeros(4), scale="rank2"), ValueError, "`scale` is 'rank2'"),
        (lambda: quantize_m(torch.zeros(4, device="meta")), ValueError, "'meta'"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 1.*encode it again"),
        ({"codes": torch.zeros(4, dtype=torch.uint8)}, r"needs uint8 \[465\]"),
        ({"codes": torch.zeros(465)}, "float32.*needs uint8"),
        ({"scales": (torch.zeros(7),)}, r"needs float32 \[8\]"),
        ({"scales": (torch.zeros(31), torch.zeros(31))}, r"needs float32 \[30\]"),
        ({"scales": ()}, "0 tensors"),
        ({"map": "cubic"}, "`map` is 'cubic'"),
        ({"map": "de"}, "scales of blocks only"),
        ({"codes": torch.zeros(930, dtype=torch.uint8)[::2]}, "contiguous"),
    ],
)
def test_payloads_that_do_not_fit_are_refused(change, words):
    packed = quantize_v(normal(31, 30).square())
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(packed, **change)
    forged = copy.copy(packed)
    for name, value in change.items():
        object.__setattr__(forged, name, value)
    with pytest.raises(ValueError, match=words):
        dequantize(forged)
