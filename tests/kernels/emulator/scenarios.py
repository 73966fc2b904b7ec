"""`python scenarios.py MODE NAME...` runs planted kernels, and operations of the library, as built for a sanitizer.

The sanitizer's runtime must be preloaded; see test_sanitized.py. A NAME is that of a planted kernel or of a function
below. Everything runs in one process, since its start is what takes long; sanitizers report and go on.
"""

import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from emulator import EmulatedLauncher
from sharpscope.kernels._launch import Launcher, Source

PLANTED = Source((str(Path(__file__).parent / "planted.cu"),))
PLANTED_WITH_SIZE = {
    "inside": 2,
    "read_outside": 2,
    "write_outside": 2,
    "shared_outside": 1,
    "dynamic_outside": 1,
    "misaligned": 1,
    "shift_too_far": 1,
}


def planted(launcher: Launcher, kernel: str) -> None:
    x, y = torch.arange(100.0), torch.zeros(100)
    if kernel in PLANTED_WITH_SIZE:
        args = [x, y, np.int32(100)]
        launcher.launch(PLANTED, kernel, PLANTED_WITH_SIZE[kernel], 64, args, shared_bytes=256)
    else:
        launcher.launch(PLANTED, kernel, 1, 64, [x, y])


def codec(launcher: Launcher) -> None:
    """Both kinds of scale, there and back, with lengths that fill no block and no byte."""
    from sharpscope.kernels import codec_cuda

    for shape, map, stochastic in (((1,), "de", False), ((389,), "de", True), ((257,), "square", False)):
        n = shape[0]
        x, bad = torch.randn(n).abs(), torch.zeros(1, dtype=torch.int64)
        codes, scales, out = torch.empty(-(-n // 2), dtype=torch.uint8), torch.empty(-(-n // 128)), torch.empty(n)
        codec_cuda.quantize_block(x, codes, scales, bad, map=map, stochastic=stochastic, launcher=launcher)
        codec_cuda.dequantize_block(codes, scales, out, map=map, launcher=launcher)
        assert (out - x).abs().max() < x.max()
    for rows, columns, stochastic in ((1, 1, False), (7, 37, True), (3, 130, False)):
        x, bad = torch.randn(rows, columns).abs(), torch.zeros(1, dtype=torch.int64)
        codes, out = torch.empty(-(-rows * columns // 2), dtype=torch.uint8), torch.empty(rows, columns)
        r, c = torch.empty(rows), torch.empty(columns)
        codec_cuda.quantize_rank1(x, codes, r, c, bad, map="linear", stochastic=stochastic, launcher=launcher)
        codec_cuda.dequantize_rank1(codes, r, c, out, map="linear", launcher=launcher)
        assert (out - x).abs().max() < x.max()


def adamw4(launcher: Launcher) -> None:
    """Tensors of several lengths in one batch, scales of blocks and rank-1, both types of numbers, both roundings."""
    from sharpscope.kernels import adamw4_cuda
    from sharpscope.kernels.adamw4_batch import Batch, scalars

    numbers = scalars(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=3)
    zero = {"de": 0x77, "linear": 0x00}
    for dtype, stochastic in ((torch.float32, True), (torch.bfloat16, False)):
        shapes = [(1,), (300,), (3, 50), (9, 128)]
        sizes = [int(np.prod(shape)) for shape in shapes]
        rank1 = [len(shape) == 2 for shape in shapes]
        batch = Batch(
            params=[torch.randn(n).to(dtype) for n in sizes],
            grads=[torch.randn(n).to(dtype) for n in sizes],
            m_codes=[torch.full((-(-n // 2),), zero["de"], dtype=torch.uint8) for n in sizes],
            m_scales=[torch.zeros(-(-n // 128)) for n in sizes],
            v_codes=[torch.full((-(-n // 2),), zero["linear"], dtype=torch.uint8) for n in sizes],
            v_scales=[torch.zeros(s[0] if r else -(-n // 128)) for s, n, r in zip(shapes, sizes, rank1, strict=True)],
            v_columns=[torch.zeros(s[1] if r else 0) for s, r in zip(shapes, rank1, strict=True)],
            skipped=[torch.zeros(1, dtype=torch.int64) for _ in sizes],
            ids=list(range(len(sizes))),
            map="linear",
            stochastic=stochastic,
            seed=5,
        )
        adamw4_cuda.step(batch, numbers, launcher=launcher)
        adamw4_cuda.step(batch, numbers, launcher=launcher)
        assert all(torch.isfinite(p).all() for p in batch.params)


def lanczos(launcher: Launcher) -> None:
    """Ragged recurrences, one of a single entry and one longer than a tile; and one whose strip has two tiles."""
    from sharpscope.kernels import lanczos_cuda

    lanczos_runs(launcher, np.array([0, 1, 34, 334]), 3)
    strips, lanczos_cuda.STRIPS = lanczos_cuda.STRIPS, 1
    lanczos_runs(launcher, np.array([0, 520]), 3)
    lanczos_cuda.STRIPS = strips


def lanczos_runs(launcher: Launcher, bounds: np.ndarray, steps: int) -> None:
    from sharpscope.kernels import lanczos_cuda
    from sharpscope.kernels.lanczos_state import State

    state = State.empty(bounds, steps, torch.float32, torch.device("cpu"))
    state.basis.fill_(torch.nan)
    work = lanczos_cuda.VectorWork(state, launcher=launcher)
    work.begin(torch.randn(bounds[-1]))
    diagonal = torch.linspace(1, 2, bounds[-1])
    for j in range(steps):
        work.step(diagonal * state.basis[j], j)
    assert state.steps.tolist() == [min(n, steps) for n in np.diff(bounds)]


def tridiagonal(launcher: Launcher) -> None:
    """More matrices than a warp, of all lengths."""
    from sharpscope.kernels import tridiagonal_cuda

    alpha, beta = torch.randn(40, 5, dtype=torch.float64), torch.rand(40, 4, dtype=torch.float64)
    nodes, weights = torch.empty_like(alpha), torch.empty_like(alpha)
    tridiagonal_cuda.quadrature(alpha, beta, torch.arange(40) % 5 + 1, nodes, weights, launcher=launcher)
    assert torch.allclose(weights.sum(1), torch.ones(40, dtype=torch.float64))


OPERATIONS = {function.__name__: function for function in (codec, adamw4, lanczos, tridiagonal)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mode, *names = sys.argv[1:]
    launcher = EmulatedLauncher(mode, seed=3)
    for name in names:
        print(f"== {name}", flush=True)
        try:
            if name in OPERATIONS:
                OPERATIONS[name](launcher)
            else:
                planted(launcher, name)
            print("finished", flush=True)
        except Exception:
            traceback.print_exc()
