"""The codec on a GPU: every byte as defined."""

import os

import pytest
import torch
from sharpscope.kernels import dequantize, quantize_m, quantize_v
from sharpscope.landscape.memory import available_bytes

pytestmark = pytest.mark.gpu

COMBINATIONS = [
    ("de", "block128"),
    ("linear", "block128"),
    ("square", "block128"),
    ("linear", "rank1"),
    ("square", "rank1"),
]
HOW = {"nearest": {}, "stochastic": {"rounding": "stochastic", "seed": 2**62 + 12345, "step": 2**31 + 7, "id": 9}}
SIZES = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 191, 255, 256, 257, 511, 512, 513, 1000, 1023, 1025]
SIZES += [2047, 2048, 2049, 3333, 4095, 4096, 4097, 4999, 5000, 65537]
SHAPES = [(1, 1), (1, 5000), (5000, 1), (3, 7), (33, 129), (128, 128), (64, 1000), (257, 31), (2, 3, 5, 7), (9, 1, 4)]
SHAPES += [(70001, 3), (3, 70001)]
GIB = 2**30


def shapes_for(scale):
    return SHAPES if scale == "rank1" else [(n,) for n in SIZES]


@pytest.fixture
def check(device, encode, defined, assert_same_bits):
    """`check(x, map, scale, **how)`: x, encoded and decoded on the device, against the definition."""

    def call(x, map, scale, **how):
        packed = encode(x.to(device), map, scale, **how)
        codes, scales, bad, values = defined(x, map, scale, **how)
        what = f"{map} {scale} {list(x.shape)} {how}"
        for name, got, true in zip(("scales", "columns"), packed.scales, scales, strict=False):
            assert_same_bits(got, true, f"{what} {name}")
        assert len(packed.scales) == len(scales)
        assert_same_bits(packed.codes, codes, f"{what} codes")
        assert packed.codes.device.type == device.type
        assert packed.bad.item() == bad.item()
        torch.testing.assert_close(dequantize(packed).cpu(), values, rtol=0, atol=0, equal_nan=True, msg=what)

    return call


@pytest.mark.parametrize("rounding", HOW)
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_bytes_are_those_of_the_definition(check, moments, map, scale, rounding):
    for seed, shape in enumerate(shapes_for(scale)):
        check(moments(shape, map, seed), map, scale, **HOW[rounding])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_narrow_floats(check, moments, map, scale, dtype):
    for shape in shapes_for(scale)[3:24:4]:
        check(moments(shape, map, 1).to(dtype), map, scale)


@pytest.mark.parametrize("rounding", HOW)
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_values_on_and_beside_the_borders_between_codes(check, map, scale, rounding):
    steps = torch.arange(0, 4097, dtype=torch.float64) / 4096
    near = torch.cat([steps, torch.nextafter(steps.float(), torch.ones(())).double(), steps.square()])
    tens = torch.tensor([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0], dtype=torch.float64)
    border = torch.cat([near, tens, (tens[1:] + tens[:-1]) / 2]).float()
    y = torch.cat([border, -border]) if map == "de" else border
    y = y[: y.numel() // 32 * 32].reshape(-1, 32)
    blocks = torch.cat([y, torch.ones(len(y), 1), torch.zeros(len(y), 95)], dim=1)  # the scale of every block is 1
    for factor in (1.0, 3.0, 1e-38, 2.0**-126):
        check(blocks * factor, map, scale, **HOW[rounding])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_views_at_odd_addresses(device, check, defined, encode, moments, assert_same_bits, map, scale, dtype):
    for shift in (1, 2, 3, 5):
        for shape in ((1291,), (128,)) if scale == "block128" else ((17, 129), (4, 128)):
            x = moments(shape, map, shift).to(dtype)
            base = torch.full((x.numel() + shift + 1,), 7.0, dtype=dtype, device=device)
            base[shift : shift + x.numel()] = x.reshape(-1).to(device)
            packed = encode(base[shift : shift + x.numel()].view(shape), map, scale)
            assert_same_bits(packed.codes, defined(x, map, scale)[0], f"shift {shift}")


@pytest.mark.parametrize("rounding", HOW)
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_broken_blocks_and_rows(check, moments, map, scale, rounding):
    for bad in (torch.nan, torch.inf, -torch.inf) if map == "de" else (torch.nan, torch.inf, -1.0):
        for at in (0, 127, 128, 300, 901):
            x = moments((902,) if scale == "block128" else (22, 41), map, at)
            x.view(-1)[at] = bad
            check(x, map, scale, **HOW[rounding])
        check(torch.full((22, 41), bad), map, scale, **HOW[rounding])


@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_zeros_decode_to_zeros(device, encode, map, scale):
    packed = encode(torch.zeros(40, 77, device=device), map, scale)
    assert not dequantize(packed).any()


@pytest.mark.parametrize("rounding", HOW)
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_memory_is_written_to_the_last_byte_and_not_beyond(
    device, encode, moments, assert_same_bits, map, scale, rounding
):
    """Whatever the allocator hands out: memory full of ones gives the same bytes as memory full of zeros."""
    x = moments((77, 13), map, 3).to(device)
    found = []
    for fill in (0, 255):
        poison = [torch.full((size,), fill, dtype=torch.uint8, device=device) for size in (512, 1024, 4096) * 8]
        del poison
        found.append(encode(x, map, scale, **HOW[rounding]))
    for a, b in zip((found[0].codes, *found[0].scales), (found[1].codes, *found[1].scales), strict=True):
        assert_same_bits(a, b)


def test_side_streams_are_followed(cuda, moments, defined, assert_same_bits):
    x = moments((300_001,), "de", 1)
    source, target = x.to(cuda), torch.zeros(300_001, device=cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        target.copy_(source)
        packed = quantize_m(target)
        back = dequantize(packed)
    stream.synchronize()
    codes, _, _, values = defined(x, "de")
    assert_same_bits(packed.codes, codes)
    assert_same_bits(back, values)


def test_another_current_device_does_not_matter(cuda, moments, defined, assert_same_bits):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = moments((5001,), "de", 1)
    with torch.cuda.device(0):
        packed = quantize_m(x.to("cuda:1"))
    assert packed.codes.device == torch.device("cuda", 1)
    assert_same_bits(packed.codes, defined(x, "de")[0])


@pytest.mark.parametrize("rounding", HOW)
@pytest.mark.parametrize(("map", "scale"), COMBINATIONS)
def test_many_elements_as_on_the_cpu(device, encode, assert_same_bits, map, scale, rounding):
    rows, columns = (8192, 16384) if device.type == "cuda" else (64, 256)
    x = torch.randn(rows, columns, generator=torch.Generator(device=device).manual_seed(1), device=device)
    x = x if map == "de" else x.square_()
    got, true = encode(x, map, scale, **HOW[rounding]), encode(x.cpu(), map, scale, **HOW[rounding])
    for a, b in zip((got.codes, *got.scales), (true.codes, *true.scales), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(dequantize(got), dequantize(true))


def need_room(cuda, gpu_gib, host_gib=4):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(cuda)[0]
    host = available_bytes(torch.device("cpu"))
    if free < gpu_gib * GIB or host < host_gib * GIB:
        pytest.skip(f"needs {gpu_gib} GiB of the GPU and {host_gib} GiB of the host")


def random_on(cuda, *shape):
    generator = torch.Generator(device=cuda).manual_seed(2)
    return torch.empty(shape, device=cuda, dtype=torch.bfloat16).uniform_(generator=generator)


def test_more_than_2_to_the_31_entries_equal_their_pieces(cuda, assert_same_bits):
    need_room(cuda, 45)
    x, piece = random_on(cuda, 2**31 + 129).sub_(0.5), 2**29
    whole = quantize_m(x)
    parts = [quantize_m(x[first : first + piece]) for first in range(0, x.numel(), piece)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scales[0], torch.cat([part.scales[0] for part in parts]))
    decoded = dequantize(whole)
    assert_same_bits(decoded[-129:], dequantize(parts[-1]))
    assert torch.equal(decoded[-129 - piece : -129], dequantize(parts[-2]))


def test_a_matrix_of_more_than_2_to_the_31_entries_equals_its_pieces(cuda):
    rows, columns = 65537, 32770
    need_room(cuda, 45)
    v = random_on(cuda, rows, columns)
    v[0] = 1.0  # the maximum of every column, so that a piece with this row has the column maxima of the whole
    whole = quantize_v(v)
    for first, last in ((1, 1000), (rows - 1000, rows)):
        piece = quantize_v(torch.cat([v[:1], v[first:last]]))
        assert torch.equal(whole.codes.view(rows, -1)[first:last], piece.codes.view(-1, columns // 2)[1:])
        assert torch.equal(whole.scales[0][first:last], piece.scales[0][1:])
        assert torch.equal(whole.scales[1], piece.scales[1])
        assert torch.equal(dequantize(whole)[first:last], dequantize(piece)[1:])


def test_more_than_2_to_the_31_entries_round_randomly_as_on_the_cpu(cuda):
    need_room(cuda, 30, host_gib=40)
    x = random_on(cuda, 2**31 + 129).sub_(0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        true = quantize_m(x.cpu(), **HOW["stochastic"])
    finally:
        torch.set_num_threads(threads)
    got = quantize_m(x, **HOW["stochastic"])
    assert torch.equal(got.codes.cpu(), true.codes)
    assert torch.equal(got.scales[0].cpu(), true.scales[0])
