"""The CUDA AdamW step, run on the CPU, against the definition: every byte, under any order of threads."""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from guarded import Guards, same_bits
from sharpscope.kernels import adamw4_cuda, adamw4_reference, codec_reference
from sharpscope.kernels.adamw4_batch import Batch, scalars, scalars_tensor
from sharpscope.kernels.codec_tables import BLOCK

F32, BF16 = torch.float32, torch.bfloat16
PAIRS = [(param, grad) for param in (F32, BF16) for grad in (F32, BF16)]
VARIANTS = [(map, stochastic) for map in adamw4_cuda.MAPS for stochastic in (False, True)]
FIELDS = ("params", "grads", "m_codes", "m_scales", "v_codes", "v_scales", "v_columns", "skipped")


class Spec(NamedTuple):
    """One tensor: n entries, [n / columns, columns] with rank-1 scales unless columns = 0."""

    n: int
    columns: int = 0
    param: torch.dtype = F32
    grad: torch.dtype = F32
    shift: int = 0


BLOCK_SIZES = [1, 2, 3, 5, 127, 128, 129, 255, 256, 257, 383, 1000, 2049, 4096, 4097, 5000]
# Strips of rank-1 scales: of 8 rows where the columns are a multiple of 128, of 1024 entries elsewhere.
UPRIGHT = [(1, 128), (2, 128), (7, 128), (8, 128), (9, 128), (17, 256), (3, 384), (40, 128), (1, 1024), (33, 128)]
RAGGED = [(1, 1), (5, 1), (700, 1), (1, 3), (2, 1023), (3, 1025), (1, 2000), (257, 3), (33, 65), (9, 129), (40, 127)]


def numbers(step, **other):
    return scalars(**{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "step": step} | other)


def gradient(spec, rng):
    g = rng.standard_normal(spec.n) * 10 ** rng.uniform(-8, 1, spec.n) * (rng.random(spec.n) > 0.1)
    return torch.from_numpy(g.astype(np.float32)).to(spec.grad)


def batch_of(specs, map="linear", stochastic=False, seed=0):
    """Parameters, gradients and encoded moments in the middle of a training."""
    rng = np.random.default_rng(seed)
    rows = []
    for spec in specs:
        n, count = spec.n, torch.zeros(1, dtype=torch.int64)
        p, m, v = (torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for _ in range(3))
        m, v = m * 1e-3, (v * 1e-3) ** 2
        codes = [torch.empty((n + 1) // 2, dtype=torch.uint8) for _ in range(2)]
        m_scales, columns = torch.empty(-(-n // BLOCK)), torch.empty(spec.columns)
        codec_reference.quantize_block(m, codes[0], m_scales, count, map="de")
        if spec.columns:
            v = v.view(-1, spec.columns)
            v_scales = torch.empty(len(v))
            codec_reference.quantize_rank1(v, codes[1], v_scales, columns, count, map=map)
        else:
            v_scales = torch.empty_like(m_scales)
            codec_reference.quantize_block(v, codes[1], v_scales, count, map=map)
        g = gradient(spec, rng)
        rows.append((p.to(spec.param), g, codes[0], m_scales, codes[1], v_scales, columns, torch.tensor([3])))
    lists = {field: list(column) for field, column in zip(FIELDS, zip(*rows, strict=True), strict=True)}
    ids = [5 * i + 2**30 for i in range(len(specs))]
    return Batch(**lists, ids=ids, map=map, stochastic=stochastic, seed=2**63 + seed)


def guarded_copy(batch, guards, specs):
    """The same in guarded memory; parameters, gradients and codes begin `shift` entries late."""
    lists = {
        field: [guards.copy(x, spec.shift) for x, spec in zip(getattr(batch, field), specs, strict=True)]
        for field in FIELDS
    }
    return Batch(**lists, ids=batch.ids, map=batch.map, stochastic=batch.stochastic, seed=batch.seed)


def differing(a, b):
    """Where two batches have different bits."""
    found = []
    for field in FIELDS:
        for i, (x, y) in enumerate(zip(getattr(a, field), getattr(b, field), strict=True)):
            if not same_bits(x, y):
                found.append((field, i, int((x != y).sum())))
    return found


def assert_as_defined(specs, emulated, *, map="linear", stochastic=False, steps=2, change=None, **other):
    """Steps by the definition and by the kernels; `change(batch, t)` alters both before step t."""
    guards = Guards()
    expected = batch_of(specs, map, stochastic)
    got = guarded_copy(expected, guards, specs)
    for t in range(1, steps + 1):
        for batch in (expected, got):
            rng = np.random.default_rng(t)
            for g, spec in zip(batch.grads, specs, strict=True):
                g.copy_(gradient(spec, rng))
            if change:
                change(batch, t)
        adamw4_reference.step(expected, numbers(t, **other))
        adamw4_cuda.step(got, numbers(t, **other), launcher=emulated(t - 1))
        assert not differing(expected, got), (t, map, stochastic)
        guards.check()
    return expected


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_many_tensors_of_every_kind_at_once(emulated, map, stochastic):
    """Dtypes, kinds of scales and lengths mixed in one step."""
    specs = [Spec(n, 0, *PAIRS[i % 4]) for i, n in enumerate((1, 300, 129, 5000, 4, 127, 1000, 2))]
    shapes = [(7, 128), (17, 256), (33, 65), (5, 1), (9, 128), (1, 257), (16, 128), (2, 1025)]
    specs += [Spec(R * C, C, *PAIRS[i % 4]) for i, (R, C) in enumerate(shapes)]
    assert_as_defined(specs, emulated, map=map, stochastic=stochastic, steps=3)


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_scales_of_blocks_for_any_length(emulated, map, stochastic):
    assert_as_defined([Spec(n) for n in BLOCK_SIZES], emulated, map=map, stochastic=stochastic)


@pytest.mark.parametrize(("map", "stochastic"), VARIANTS)
def test_rank1_scales_for_any_shape(emulated, map, stochastic):
    specs = [Spec(R * C, C) for R, C in UPRIGHT + RAGGED]
    assert_as_defined(specs, emulated, map=map, stochastic=stochastic)


@pytest.mark.parametrize(("param", "grad"), PAIRS)
def test_views_that_begin_anywhere(emulated, param, grad):
    shapes = [(700, 0), (128, 0), (5 * 128, 128), (9 * 65, 65)]
    specs = [Spec(n, columns, param, grad, shift) for n, columns in shapes for shift in (1, 2, 3)]
    assert_as_defined(specs, emulated, steps=1)


def test_the_order_of_threads_changes_nothing(emulated):
    specs = [Spec(900), Spec(20 * 128, 128), Spec(33 * 65, 65)]
    expected = batch_of(specs, stochastic=True)
    start = guarded_copy(expected, Guards(), specs)
    adamw4_reference.step(expected, numbers(7))
    for seed in range(6):
        got = guarded_copy(start, Guards(), specs)
        adamw4_cuda.step(got, numbers(7), launcher=emulated(seed))
        assert not differing(expected, got), seed


@pytest.mark.parametrize("map", adamw4_cuda.MAPS)
def test_what_is_not_finite_is_skipped(emulated, map):
    """NaN and infinity in gradients, overflow of g g, scales of m and v that are not finite; and on from there."""
    specs = [Spec(1000), Spec(9 * 256, 256), Spec(33 * 65, 65), Spec(700, 0, BF16, BF16)]

    def change(batch, t):
        for i, g in enumerate(batch.grads):
            if t == 1:
                g[5], g[300], g[-1] = torch.nan, torch.inf, -torch.inf
            if t == 2:
                g[130] = 3e19  # its square is infinite
                batch.m_scales[i][0] = torch.nan
            if t == 3:
                batch.v_scales[i][1] = torch.nan

    after = assert_as_defined(specs, emulated, map=map, steps=4, change=change)
    assert all(count > 3 for count in after.skipped)


def test_a_nan_changes_nothing_but_the_counter(emulated):
    specs = [Spec(5 * 128)]
    batch = batch_of(specs)
    before = guarded_copy(batch, Guards(), specs)
    batch.grads[0][2 * 128 + 7] = torch.nan
    adamw4_cuda.step(batch, numbers(1), launcher=emulated(1))
    entries, nibbles = slice(256, 384), slice(128, 192)
    assert torch.equal(batch.params[0][entries], before.params[0][entries])
    assert torch.equal(batch.m_codes[0][nibbles], before.m_codes[0][nibbles])
    assert torch.equal(batch.v_codes[0][nibbles], before.v_codes[0][nibbles])
    assert batch.m_scales[0][2] == before.m_scales[0][2]
    assert batch.v_scales[0][2] == before.v_scales[0][2]
    assert batch.skipped[0] == before.skipped[0] + 1
    assert (batch.params[0] != before.params[0]).sum() > 4 * 128 - 20  # the other blocks went on


def test_zeros_stay_zeros(emulated):
    """Moments of zero and no gradient: only the weight decay acts."""
    specs = [Spec(300), Spec(6 * 128, 128), Spec(40, 8)]

    def change(batch, t):
        for x in (*batch.grads, *batch.m_scales, *batch.v_scales, *batch.v_columns):
            x.zero_()

    after = assert_as_defined(specs, emulated, change=change, steps=1)
    assert all((scales == 0).all() for scales in [*after.m_scales, *after.v_scales, *after.v_columns])


@pytest.mark.parametrize("power", [-44, -38, -20, 15, 18])
def test_moments_of_any_magnitude(emulated, power):
    """From subnormal numbers, whose scales are flushed to zero, to the largest whose squares exist."""
    specs = [Spec(500), Spec(9 * 128, 128), Spec(12 * 70, 70)]

    def change(batch, t):
        for g in batch.grads:
            g.clamp_(-1, 1).mul_(10.0 ** (power / 2 if power < 0 else power))

    assert_as_defined(specs, emulated, change=change, betas=(0.5, 0.25), eps=1e-30, steps=3)


def test_numbers_on_the_device_replace_those_by_value(emulated):
    specs = [Spec(300), Spec(8 * 128, 128), Spec(40, 8)]
    for stochastic in (False, True):
        expected = batch_of(specs, stochastic=stochastic)
        got = guarded_copy(expected, Guards(), specs)
        adamw4_reference.step(expected, numbers(2**31 + 5))
        there = scalars_tensor(numbers(2**31 + 5))
        adamw4_cuda.step(got, numbers(1, lr=9.0, betas=(0.0, 0.0)), device_numbers=there, launcher=emulated())
        assert not differing(expected, got)


def test_one_launch_for_each_kind(emulated):
    launcher = emulated()
    shapes = [(300, 0), (8 * 128, 128), (40, 8)]
    specs = [Spec(n, columns) for n, columns in shapes for _ in range(5)]
    adamw4_cuda.step(batch_of(specs), numbers(1), launcher=launcher)
    ranks = [f"adamw4_{part}_{strips}" for strips in ("upright", "ragged") for part in ("moments", "encode")]
    assert sorted(launcher.launched) == sorted(["adamw4_block", *ranks, "adamw4_scales", "adamw4_scales"])


def test_tables_are_made_once_for_the_same_memory(emulated):
    specs = [Spec(300), Spec(8 * 128, 128)]
    batch = batch_of(specs)
    adamw4_cuda.step(batch, numbers(1), launcher=emulated())
    first = adamw4_cuda._groups(batch)
    adamw4_cuda.step(batch, numbers(2), launcher=emulated())
    assert adamw4_cuda._groups(batch) is first
    batch = replace(batch, grads=[batch.grads[0].clone(), *batch.grads[1:]])
    moved = adamw4_cuda._groups(batch)
    assert moved is not first
    addresses = {int(group.entries[1]) for group in moved}
    assert batch.grads[0].data_ptr() in addresses


def in_new_memory(batch, count):
    """The same batch with `count` other places of its first gradient."""
    return [replace(batch, grads=[batch.grads[0].clone(), *batch.grads[1:]]) for _ in range(count)]


def test_tables_are_kept_up_to_a_number_of_words(monkeypatch):
    """Those used last; of tensors that are stepped one by one, thousands."""
    tables = adamw4_cuda._Tables()
    monkeypatch.setattr(adamw4_cuda, "_tables", tables)
    batches = in_new_memory(batch_of([Spec(300)]), 50)
    made = [adamw4_cuda._groups(batch) for batch in batches]
    assert all(adamw4_cuda._groups(batch) is groups for batch, groups in zip(batches, made, strict=True))
    assert tables.words == 50 * adamw4_cuda.LEAST_WORDS
    assert 5000 * adamw4_cuda.LEAST_WORDS < adamw4_cuda.KEPT_WORDS
    monkeypatch.setattr(adamw4_cuda, "KEPT_WORDS", 3 * adamw4_cuda.LEAST_WORDS)
    newest = adamw4_cuda._groups(in_new_memory(batches[0], 1)[0])
    assert newest[0].entries is not made[0][0].entries
    assert [adamw4_cuda._groups(batches[i]) is made[i] for i in (48, 49)] == [True, True]
    assert adamw4_cuda._groups(batches[47]) is not made[47]
    assert tables.words == adamw4_cuda.KEPT_WORDS
    large = batch_of([Spec(200)] * 20)  # more than the limit by itself
    assert adamw4_cuda._groups(large) is adamw4_cuda._groups(large)
    assert tables.words > adamw4_cuda.KEPT_WORDS


class OnCuda(torch.Tensor):
    """A CPU tensor that claims to be on a CUDA device."""

    device = property(lambda self: torch.device("cuda", 0))


def test_a_capture_takes_known_tables_and_makes_none(monkeypatch):
    known, unknown = in_new_memory(batch_of([Spec(300)]), 2)
    for batch in (known, unknown):
        batch.params[0] = batch.params[0].as_subclass(OnCuda)
    capturing, streams, built = [False], [1], []
    monkeypatch.setattr(adamw4_cuda, "_tables", adamw4_cuda._Tables())
    monkeypatch.setattr(adamw4_cuda, "_captured", captured := [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[0]))

    def build(batch, device, stream):
        built.append(adamw4_cuda._Table([], torch.zeros(20), stream))
        return built[-1]

    monkeypatch.setattr(adamw4_cuda, "_built", build)
    groups = adamw4_cuda._groups(known)
    capturing[0], streams[0] = True, 2
    assert all(adamw4_cuda._groups(known) is groups for _ in range(3))
    assert captured == built
    assert len(built) == 1
    with pytest.raises(RuntimeError, match="being captured.* 1 tensors .*run one step on these very tensors before"):
        adamw4_cuda._groups(unknown)
    assert len(built) == 1
    capturing[0] = False
    assert adamw4_cuda._groups(known) is not groups  # another stream would not wait for the upload
    assert captured == built[:1]


def test_no_tensors_is_no_step(emulated):
    launcher = emulated()
    adamw4_cuda.step(Batch([], [], [], [], [], [], [], [], [], "linear", False, 0), numbers(1), launcher=launcher)
    assert launcher.launched == []
