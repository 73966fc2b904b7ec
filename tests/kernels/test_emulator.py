"""The emulator notices planted bugs, and passes their correct twins."""

from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import EmulatorError
from sharpscope.kernels._launch import Source

PLANTED = Source((str(Path(__file__).parent / "emulator" / "planted.cu"),))
SEEDS = range(6)
PAIR = np.dtype([("value", np.float32), ("n", np.int32)])


def poisoned(n, dtype=torch.float32):
    return torch.full((n,), float("nan"), dtype=dtype) if dtype.is_floating_point else torch.full((n,), -1, dtype=dtype)


@pytest.fixture
def run(emulated):
    """`run(kernel, *inputs, ...)` -> the output y after a launch with the given seed."""

    def go(kernel, *inputs, seed=0, grid=1, block=64, size=64, shared_bytes=0):
        y = poisoned(size)
        emulated(seed).launch(PLANTED, kernel, grid, block, [*inputs, y], shared_bytes=shared_bytes)
        return y

    return go


@pytest.mark.parametrize(
    ("kernel", "right"),
    [("reverse", True), ("reverse_without_barrier", False), ("reverse_with_warp_barrier", False)],
)
def test_missing_barrier_changes_the_result(run, kernel, right):
    x = torch.arange(128.0)
    wanted = x.view(2, 64).flip(1).flatten()
    agree = [torch.equal(run(kernel, x, seed=seed, grid=2, size=128), wanted) for seed in SEEDS]
    assert all(agree) if right else not all(agree)


def test_missing_second_barrier_depends_on_the_seed(run):
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    wanted = 15 * torch.arange(1.0, 65.0)
    assert all(torch.equal(run("rounds", x, seed=seed), wanted) for seed in SEEDS)
    assert not all(torch.equal(run("rounds_without_second_barrier", x, seed=seed), wanted) for seed in SEEDS)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        ("divergent_barriers", "divergent __syncthreads"),
        ("exit_before_barrier", "deadlock: 41 threads wait at __syncthreads, which 23 threads will not reach"),
        (
            "barrier_against_collective",
            "deadlock: 16 threads wait at __syncthreads, 16 at a warp collective, 32 have exited",
        ),
        ("mask_of_exited", "names a lane that has exited"),
        ("mask_without_caller", "calling lane is not in its mask"),
        ("masks_that_differ", "(lanes that name each other pass different masks|names a lane that has exited)"),
        ("half_written_dynamic", "dynamic shared memory is used, but the launch gives none"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wrong_synchronisation_is_an_error(run, kernel, complaint, seed):
    with pytest.raises(EmulatorError, match=f"{kernel}: .*{complaint}"):
        run(kernel, seed=seed)


def test_failure_names_the_block_and_leaves_the_emulator_usable(emulated):
    y = poisoned(192)
    with pytest.raises(EmulatorError, match=r"\[block 2, thread \d+\]"):
        emulated(1).launch(PLANTED, "divergent_barriers", 3, 64, [y])
    emulated(1).launch(PLANTED, "one_barrier", 1, 64, [y])
    assert y[:64].tolist() == [1.0] * 7 + [2.0] * 57


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives_of_part_of_a_warp(run, seed):
    lanes = torch.arange(64)
    half = run("half_mask", seed=seed)
    assert torch.equal(half[lanes % 32 < 16], (lanes + (lanes ^ 1)).float()[lanes % 32 < 16])
    assert half[lanes % 32 >= 16].isnan().all()
    assert torch.equal(run("mask_of_each_half", seed=seed), torch.where(lanes % 32 < 16, 16.0, 32.0))


def test_shuffle_from_a_lane_outside_the_mask_gives_nan(run):
    y = run("shuffle_from_outside_mask")
    assert y.view(2, 2, 16)[:, 0].isnan().all()
    assert (y.view(2, 2, 16)[:, 1] == 0).all()


def test_shared_memory_that_nothing_wrote_is_nan(run):
    for y in (run("half_written_shared"), run("half_written_dynamic", shared_bytes=256)):
        assert (y[:32] == 1).all()
        assert y[32:].isnan().all()


@pytest.mark.parametrize(("kernel", "agree"), [("count_blocks", True), ("trust_block_order", False)])
def test_dependence_on_the_order_of_blocks_shows(emulated, kernel, agree):
    x = torch.tensor([1, 10, 100], dtype=torch.int32)
    results = set()
    for seed in SEEDS:
        y = torch.zeros(1, dtype=torch.int32)
        emulated(seed).launch(PLANTED, kernel, 3, 32, [x, y])
        results.add(y.item())
    assert results == {111} if agree else len(results) > 1


def test_right_arguments_arrive(emulated):
    y = poisoned(4)
    emulated().launch(PLANTED, "fill", 1, 4, [y, np.int32(3), np.float32(2)])
    assert y[:3].tolist() == [2, 2, 2]
    assert y[3].isnan()
    emulated().launch(PLANTED, "fill", 1, 4, [None, np.int32(3), np.float32(2)])
    emulated().launch(PLANTED, "fill_pair", 1, 4, [y, np.array([(5.0, 2)], PAIR)])
    assert y[:3].tolist() == [5, 5, 2]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (lambda y: [y, np.int32(4)], "2 arguments for 3 parameters"),
        (lambda y: [y, 4, np.float32(2)], "argument 1 is int; must be"),
        (lambda y: [y, np.int64(4), np.float32(2)], "argument 1 is int64; its parameter is i4"),
        (lambda y: [y, np.int32(4), np.float64(2)], "argument 2 is float64; its parameter is f4"),
        (lambda y: [y, np.int32(4), np.int32(2)], "argument 2 is int32; its parameter is f4"),
        (lambda y: [y, np.int32(4), None], "argument 2 is None"),
        (lambda y: [y, y, np.float32(2)], "argument 1 is a tensor"),
        (lambda y: [y.numpy(), np.int32(4), np.float32(2)], "argument 0 is ndarray"),
        (lambda y: [y.double(), np.int32(4), np.float32(2)], "argument 0 is a tensor of torch.float64"),
        (lambda y: [y[::2], np.int32(2), np.float32(2)], "argument 0 is not contiguous"),
        (lambda y: [y.to("meta"), np.int32(2), np.float32(2)], "argument 0 is on meta"),
    ],
)
def test_wrong_arguments_are_refused(emulated, args, complaint):
    y = poisoned(4)
    with pytest.raises(EmulatorError, match=f"fill: {complaint}"):
        emulated().launch(PLANTED, "fill", 1, 4, args(y))
    assert y.isnan().all()


def test_struct_of_another_size_is_refused(emulated):
    wide = np.dtype([("value", np.float64), ("n", np.int32)])
    for struct in (np.zeros(1, wide), np.zeros(2, PAIR)):
        with pytest.raises(EmulatorError, match="fill_pair: argument 1 is"):
            emulated().launch(PLANTED, "fill_pair", 1, 4, [poisoned(4), struct])


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "complaint"),
    [
        ("fill_bounded", 0, 64, "a grid of 0 blocks"),
        ("fill_bounded", 1, 0, "0 threads per block; must be 1 to 64"),
        ("fill_bounded", 1, 96, "96 threads per block; must be 1 to 64"),
        ("one_barrier", 1, 1056, "1056 threads per block; must be 1 to 1024"),
        ("no_such_kernel", 1, 64, "is not in"),
    ],
)
def test_wrong_launches_are_refused(emulated, kernel, grid, block, complaint):
    with pytest.raises(EmulatorError, match=complaint):
        emulated().launch(PLANTED, kernel, grid, block, [poisoned(2000)])


def test_text_that_does_not_compile_names_its_file_and_line(emulated, tmp_path):
    (tmp_path / "broken.cu").write_text('\nextern "C" __global__ void broken(float* y) { atomicAdd(y, 1.0f); }\n')
    with pytest.raises(EmulatorError, match="broken.cu:2"):
        emulated().launch(Source((str(tmp_path / "broken.cu"),)), "broken", 1, 1, [poisoned(1)])


def test_intrinsics_that_a_compiler_would_not_check(emulated, tmp_path):
    """Against their definitions: saturating conversions, byte selection, high products, shifts of lanes."""
    (tmp_path / "intrinsics.cu").write_text("""
typedef unsigned long long wide;
extern "C" __global__ void intrinsics(const float* x, int* rounded, unsigned* bytes, wide* high, int* lanes) {
    const int t = threadIdx.x;
    rounded[t] = __float2int_rn(x[t]);
    bytes[t] = __byte_perm(0x33221100u, 0x77665544u, SELECTOR);
    high[t] = __umul64hi(0xffffffffffffffffull, (wide)t) + __umulhi(0x80000000u, 2u * t);
    lanes[t] = __shfl_up_sync(0xffffffffu, t, 1) + 100 * __shfl_down_sync(0xffffffffu, t, 1, 8)
        + 10000 * __reduce_max_sync(0xffffffffu, -t) + (__clz(t) == 32 ? 1000000 : 0);
}""")
    source = Source((str(tmp_path / "intrinsics.cu"),), (("SELECTOR", "0x7350u"),))
    x = torch.linspace(-8, 7.5, 32)
    x[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.5, 3e9])
    rounded, lanes = torch.zeros(2, 32, dtype=torch.int32)
    bytes_, high = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int64)
    emulated().launch(source, "intrinsics", 1, 32, [x, rounded, bytes_, high, lanes])
    assert rounded[:5].tolist() == [0, 2**31 - 1, -(2**31), 2, 2**31 - 1]
    assert torch.equal(rounded[5:], x[5:].round().int())
    assert (bytes_ == 0x77335500).all()
    t = torch.arange(32)
    assert torch.equal(high, (t - 1).clamp(min=0) + t)
    down = torch.where(t % 8 == 7, t, t + 1)
    assert torch.equal(lanes.long(), (t - 1).clamp(min=0) + 100 * down + 1000000 * (t == 0))
