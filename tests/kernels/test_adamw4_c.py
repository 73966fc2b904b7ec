"""The fused step in C against its definition, byte for byte, in both of its forms."""

import numpy as np
import pytest
import torch
from sharpscope.kernels import adamw4_c, adamw4_reference
from sharpscope.kernels.adamw4_batch import Batch, scalars

F32, BF16 = torch.float32, torch.bfloat16
STATE = ("params", "m_codes", "m_scales", "v_codes", "v_scales", "v_columns", "skipped")
VECTORS = [(1,), (2,), (63,), (127,), (128,), (129,), (255,), (256,), (301,), (640,)]
MATRICES = [(1, 1), (1, 200), (200, 1), (7, 3), (3, 129), (5, 128), (2, 300), (17, 19), (43, 16), (129, 2)]


@pytest.fixture(autouse=True)
def compiled(compiled_as, monkeypatch):
    """With the instructions of this processor and as plain loops; every block is worth a thread."""
    compiled_as("adamw4")
    monkeypatch.setattr(adamw4_c, "_GRAIN", 1)


def batch_of(shapes, *, map="linear", stochastic=False, dtypes=(F32, F32), seed=0):
    """Moments of zero; matrices have rank-1 scales."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[] for _ in range(8)]
    for shape in shapes:
        n = int(np.prod(shape))
        blocks, rank1 = -(-n // 128), len(shape) == 2
        tensors = (
            torch.randn(n, generator=generator).to(dtypes[0]),
            torch.zeros(n, dtype=dtypes[1]),
            torch.full((-(-n // 2),), 0x77, dtype=torch.uint8),
            torch.zeros(blocks),
            torch.zeros(-(-n // 2), dtype=torch.uint8),
            torch.zeros(shape[0] if rank1 else blocks),
            torch.zeros(shape[1] if rank1 else 0),
            torch.zeros(1, dtype=torch.int64),
        )
        for members, tensor in zip(lists, tensors, strict=True):
            members.append(tensor)
    ids = [2**31 + 3 * i for i in range(len(shapes))]
    return Batch(*lists, ids=ids, map=map, stochastic=stochastic, seed=2**63 + 5)


def copy_of(batch):
    lists = {name: [x.clone() for x in getattr(batch, name)] for name in (*STATE, "grads")}
    return Batch(**lists, ids=batch.ids, map=batch.map, stochastic=batch.stochastic, seed=batch.seed)


def numbers(step, lr=1e-3):
    return scalars(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, step=step)


def set_gradients(batch, step, size=1e-3, strange=()):
    """The same for equal batches; `strange` values go to places of their own."""
    rng = np.random.default_rng(step)
    for g in batch.grads:
        values = rng.standard_normal(g.numel()) * size
        for value in strange:
            values[rng.integers(g.numel())] = value
        g.copy_(torch.from_numpy(values.astype(np.float32)))


def assert_same_bits(a, b):
    for name in STATE:
        for i, (x, y) in enumerate(zip(getattr(a, name), getattr(b, name), strict=True)):
            same = x.view(torch.uint8).equal(y.view(torch.uint8))
            assert same, f"{name}[{i}], n = {a.params[i].numel()}, {int((x != y).sum())} differ"


def check(batch, sizes, strange=()):
    """One step for each size of the gradients."""
    expected = copy_of(batch)
    for step, size in enumerate(sizes, 1):
        for one in (batch, expected):
            set_gradients(one, step, size, strange if step == 2 else ())
        adamw4_c.step(batch, numbers(step))
        with np.errstate(all="ignore"):
            adamw4_reference.step(expected, numbers(step))
        assert_same_bits(batch, expected)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("map", ["linear", "square"])
class TestParity:
    @pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32)])
    def test_steps(self, map, stochastic, dtypes):
        batch = batch_of([*VECTORS, *MATRICES], map=map, stochastic=stochastic, dtypes=dtypes)
        check(batch, (1e-3, 1e-3, 1e-1, 1e-5))
        assert all(not int(count) for count in batch.skipped)

    def test_very_small_gradients_and_zeros(self, map, stochastic):
        """Second moments that are subnormal or vanish."""
        check(batch_of([*VECTORS, *MATRICES], map=map, stochastic=stochastic), (1e-20, 1e-22, 0.0, 1e-19))

    @pytest.mark.parametrize("strange", [(np.nan,), (np.inf, -np.inf), (1e30,), (3e38, np.nan)])
    def test_blocks_that_are_skipped(self, map, stochastic, strange):
        batch = batch_of([*VECTORS, *MATRICES], map=map, stochastic=stochastic)
        check(batch, (1e-3, 1e-3, 1e-3), strange)
        assert all(int(count) >= 1 for count in batch.skipped)

    def test_scales_that_are_nan(self, map, stochastic):
        """Of states made from moments that were not finite."""
        batch = batch_of([(300,), (6, 100), (100, 6)], map=map, stochastic=stochastic)
        check(batch, (1e-3,))
        batch.m_scales[0][1] = batch.m_scales[1][4] = np.nan
        batch.v_scales[0][2] = batch.v_scales[1][2] = batch.v_scales[2][7] = np.nan
        check(batch, (1e-3, 1e-3))

    def test_number_of_threads(self, map, stochastic):
        """Ranges cut matrices and their rows anywhere."""
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                batch = batch_of([(57, 23), (130,), (2, 700), (900, 1), (5,), (3, 128)], map=map, stochastic=stochastic)
                for step in (1, 2, 3):
                    set_gradients(batch, step, strange=(np.nan,) if step == 2 else ())
                    adamw4_c.step(batch, numbers(step))
                results.append(batch)
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert_same_bits(other, results[0])


def test_bfloat16_parameters_are_rounded_to_nearest_even():
    """Without a gradient and a moment p' = p · decay, whose rounding torch does independently."""
    p = torch.arange(1, 2**15, 7, dtype=torch.int32).to(torch.int16).view(BF16)
    p = p[torch.isfinite(p)]
    p = p[: p.numel() // 128 * 128]
    batch = batch_of([(p.numel(),)], dtypes=(BF16, BF16))
    batch.params[0].copy_(p)
    k = scalars(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3, step=1)
    adamw4_c.step(batch, k)
    assert batch.params[0].equal((p.float() * float(k.decay)).to(BF16))


def test_parameters_that_are_not_finite_stay_so():
    batch = batch_of([(128,), (128,)], dtypes=(BF16, BF16))
    batch.params[0][:3] = torch.tensor([np.nan, np.inf, -np.inf])
    batch.params[1].view(torch.int16)[0] = -1  # a NaN whose rounding would carry over
    set_gradients(batch, 1)
    adamw4_c.step(batch, numbers(1))
    assert batch.params[0][:3].float().numpy() == pytest.approx([np.nan, np.inf, -np.inf], nan_ok=True)
    assert batch.params[1].isnan().tolist() == [True] + [False] * 127
    assert int(batch.skipped[0]) == 0


def test_an_empty_batch():
    adamw4_c.step(batch_of([]), numbers(1))
