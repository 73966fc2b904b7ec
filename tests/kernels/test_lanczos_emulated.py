"""The CUDA text of Lanczos on the CPU: its launches, its schedule, its tiles, and what it may write to."""

import dataclasses

import numpy as np
import pytest
import torch
from sharpscope.kernels import lanczos_cuda
from sharpscope.kernels.lanczos_state import State, Tiles

CPU = torch.device("cpu")
STEP = [f"lanczos_{name}" for name in ("dots", "reduce", "update", "reduce", "update", "finish", "next")]
LENGTHS = [1, 2, 31, 32, 33, 255, 256, 257, 600]
GUARD = 64


def bounds_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def operator(bounds, dtype):
    """Two-by-two coupling of neighbours within a recurrence, beside a diagonal that differs everywhere."""
    n = int(bounds[-1])
    d = torch.linspace(-1, 1, n).to(dtype)
    inside = torch.ones(n - 1, dtype=dtype)
    inside[torch.from_numpy(bounds[1:-1]) - 1] = 0

    def product(v):
        w = d * v
        w[1:] += 0.3 * inside * v[:-1]
        w[:-1] += 0.3 * inside * v[1:]
        return w

    return product


def run(launcher, bounds, m, dtype=torch.float32, change=lambda state, work: (state, work)):
    state = State.empty(bounds, m, dtype, CPU)
    work = lanczos_cuda.VectorWork(state, launcher=launcher)
    state, work = change(state, work)
    A = operator(bounds, dtype)
    work.begin(torch.linspace(1, 2, int(bounds[-1])).to(dtype))
    for j in range(m):
        work.step(A(state.basis[j]), j)
    return state


def results(state):
    return [getattr(state, name) for name in ("basis", "alpha", "remainder", "scale", "steps", "open")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_schedule_changes_a_bit(emulated, dtype):
    expected = results(run(emulated(0), bounds_of(LENGTHS), 35, dtype))
    assert expected[4].tolist() == [min(n, 35) for n in LENGTHS]
    for seed in (1, 2, 9):
        for found, wanted in zip(results(run(emulated(seed), bounds_of(LENGTHS), 35, dtype)), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_step_is_seven_launches(emulated):
    launcher = emulated()
    run(launcher, bounds_of([5, 40]), 3)
    begin = ["lanczos_dots", "lanczos_update", "lanczos_finish", "lanczos_next"]
    assert launcher.launched == begin + STEP + STEP + STEP[:-1]


@pytest.mark.parametrize("strips", [1, 2, 2048])
def test_strips_of_several_tiles(emulated, monkeypatch, strips):
    """However a recurrence is cut up, it is the same to rounding; and cut up alike, its neighbours change no bit."""
    lengths = [700, 1500, 20]
    whole = run(emulated(), bounds_of(lengths), 7)
    monkeypatch.setattr(lanczos_cuda, "STRIPS", strips)
    cut = run(emulated(3), bounds_of(lengths), 7)
    torch.testing.assert_close(cut.alpha, whole.alpha, atol=2e-6, rtol=0)
    torch.testing.assert_close(cut.remainder[:, :-1], whole.remainder[:, :-1], atol=2e-6, rtol=0)
    Q = cut.basis[:, 700:2200].double()
    assert float((Q @ Q.T - torch.eye(7)).abs().max()) < 5e-6


def sums_over(strips, launcher):
    """Coefficients, totals, remainders and scales from numbers made up for each strip: by reduce, then by finish."""
    counts, capacity, j = [len(part) for part in strips], strips[0].shape[1], 36
    B, partial = len(counts), torch.cat(strips)
    strips_of, offsets = (torch.from_numpy(bounds_of(lengths)) for lengths in (counts, [1000] * B))
    c, total, alpha, remainder = (torch.zeros(B, capacity, dtype=torch.float64) for _ in range(4))
    scale, divisor = (torch.zeros(B, dtype=torch.float64) for _ in range(2))
    steps, still_open = torch.zeros(B, dtype=torch.int64), torch.ones(B, dtype=torch.int32)
    size = np.int32(capacity)
    args = (partial, strips_of, np.int32(j + 1), size, np.int32(0), c, total)
    launcher.launch(lanczos_cuda.SOURCES[0], "lanczos_reduce", 2 * B, 32 * lanczos_cuda.GROUPS, args)
    args = (partial, strips_of, offsets, size, np.int32(j), np.float64(0), total, alpha, remainder, scale, steps)
    launcher.launch(lanczos_cuda.SOURCES[0], "lanczos_finish", B, lanczos_cuda.THREADS, (*args, still_open, divisor))
    return c, total, remainder, scale


def test_sums_over_more_strips_than_threads(emulated):
    """True to rounding, and the same bits in any schedule and beside any neighbours."""
    rng = torch.Generator().manual_seed(0)
    strips = [torch.rand(count, 40, generator=rng, dtype=torch.float64) + 0.1 for count in (700, 1, 33, 2049)]
    found = sums_over(strips, emulated())
    for b, part in enumerate(strips):
        sums = part[:, :37].sum(0)
        torch.testing.assert_close(found[0][b, :37], sums, rtol=1e-13, atol=0)
        assert torch.equal(found[1][b], found[0][b])
        assert not found[0][b, 37:].any()
        torch.testing.assert_close(found[2][b, 36], part[:, 0].sum().sqrt(), rtol=1e-13, atol=0)
        size = (sums.square().sum() + part[:, 0].sum()).sqrt()
        torch.testing.assert_close(found[3][b], size, rtol=1e-13, atol=0)
        alone = sums_over([part], emulated(5))
        assert all(torch.equal(one[0], many[b]) for one, many in zip(alone, found, strict=True))
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(sums_over(strips, emulated(seed)), found, strict=True))


def test_more_rows_than_threads(emulated):
    """Coefficients are taken up in portions of one for each thread."""
    state = run(emulated(), bounds_of([300]), 290, torch.float64)
    assert int(state.steps) == 290
    Q = state.basis
    assert float((Q @ Q.T - torch.eye(290)).abs().max()) < 1e-13


def test_nothing_is_written_beside_the_tensors(emulated):
    guards = []

    def guarded(x):
        """A copy between zones of a known pattern."""
        buffer = torch.full((x.numel() + 2 * GUARD,), 77).to(x.dtype)
        buffer[GUARD:-GUARD] = x.reshape(-1)
        guards.append(buffer)
        return buffer[GUARD:-GUARD].view(x.shape)

    def change(state, work):
        changes = {
            f.name: guarded(x)
            for f in dataclasses.fields(state)
            if isinstance(x := getattr(state, f.name), torch.Tensor)
        }
        state = dataclasses.replace(state, **changes)
        for name, value in vars(work).items():
            if isinstance(value, torch.Tensor):
                setattr(work, name, guarded(value))
            elif isinstance(value, Tiles):
                fields = dataclasses.fields(value)
                setattr(work, name, Tiles(*(guarded(getattr(value, f.name)) for f in fields)))
            elif isinstance(value, State):
                setattr(work, name, state)
        return state, work

    plain, fenced = (run(emulated(4), bounds_of(LENGTHS), 12, change=c) for c in (lambda *both: both, change))
    assert len(guards) > 12
    for buffer in guards:
        for zone in (buffer[:GUARD], buffer[-GUARD:]):
            assert bool((zone == torch.tensor(77).to(buffer.dtype)).all())
    for found, wanted in zip(results(fenced), results(plain), strict=True):
        assert torch.equal(found, wanted)


def test_tiles_cross_no_border_and_begin_with_their_recurrence():
    bounds = bounds_of([1, 256, 257, 1000])
    tiles = Tiles.of(bounds, np.array([256, 256, 256, 512]), CPU)
    assert tiles.owner.tolist() == [0, 1, 2, 2, 3, 3]
    assert tiles.first.tolist() == [0, 1, 257, 513, 514, 1026]
    assert tiles.last.tolist() == [1, 257, 513, 514, 1026, 1514]
    assert tiles.tiles_of.tolist() == [0, 1, 2, 4, 6]
    assert len(tiles) == 6
