"""The fused step: every path gives the bytes of the definition, and the definition is AdamW."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sharpscope.kernels import _dispatch, adamw4_reference, codec_reference
from sharpscope.kernels.adamw4 import adamw4_state, adamw4_step
from sharpscope.kernels.adamw4_batch import Batch, scalars
from sharpscope.kernels.codec import dequantize

NUMBERS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
DTYPES = (torch.float32, torch.bfloat16)
PARTS = ("params", "m_codes", "m_scales", "v_codes", "v_scales", "v_columns", "skipped")
kinds = st.sampled_from(["normal", "decades", "tiny", "huge", "sparse", "bad"])
tensors = st.lists(
    st.tuples(
        st.integers(1, 70) | st.sampled_from([127, 128, 129, 255, 257, 1023]),
        st.integers(1, 70) | st.sampled_from([128]),
        st.booleans(),
        st.sampled_from(DTYPES),
        st.sampled_from(DTYPES),
        kinds,
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(params=["c", "numba", "torch"])
def path(request):
    reason = _dispatch.why_unavailable("adamw4", request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return importlib.import_module(f"sharpscope.kernels.adamw4_{request.param}")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradient(n, kind, rng):
    g = rng.standard_normal(n).astype(np.float32)
    if kind == "decades":
        g *= (10 ** rng.uniform(-12, 4, n)).astype(np.float32)
    if kind == "tiny":
        g *= (10 ** rng.uniform(-44, -18, n)).astype(np.float32)  # squares are subnormal or vanish
    if kind == "huge":
        g *= (10 ** rng.uniform(15, 19.5, n)).astype(np.float32)  # some squares overflow
    if kind == "sparse":
        g[rng.random(n) < 0.99] = 0
    if kind == "bad":
        spoilt = rng.random(n) < 0.003
        g[spoilt] = rng.choice(np.array([np.nan, np.inf, -np.inf, 1e30], np.float32), int(spoilt.sum()))
    return torch.from_numpy(g)


def make_batch(specs, map, stochastic, seed):
    """Tensors (rows, columns, rank-1?, dtype, dtype of the gradient, kind) with states that random moments left."""
    rng = np.random.default_rng(seed)
    lists = {name: [] for name in (*PARTS, "grads")}
    for rows, columns, rank1, dtype, grad_dtype, kind in specs:
        n = rows * columns
        count, codes = torch.zeros(1, dtype=torch.int64), lambda n=n: torch.empty(-(-n // 2), dtype=torch.uint8)
        m_codes, m_scales, v_codes = codes(), torch.empty(-(-n // 128)), codes()
        m, v = gradient(n, kind, rng) * 0.1, gradient(n, kind, rng).square() * 0.01
        codec_reference.quantize_block(m, m_codes, m_scales, count, map="de")
        if rank1:
            v_scales, v_columns = torch.empty(rows), torch.empty(columns)
            codec_reference.quantize_rank1(v.view(rows, columns), v_codes, v_scales, v_columns, count, map=map)
        else:
            v_scales, v_columns = torch.empty(-(-n // 128)), torch.empty(0)
            codec_reference.quantize_block(v, v_codes, v_scales, count, map=map)
        p = torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(dtype)
        parts = (p, m_codes, m_scales, v_codes, v_scales, v_columns, torch.tensor([7]))
        for name, part in zip(PARTS, parts, strict=True):
            lists[name].append(part)
        lists["grads"].append(gradient(n, kind, rng).to(grad_dtype))
    ids = [int(i) for i in rng.permutation(1000)[: len(specs)]]
    return Batch(**lists, ids=ids, map=map, stochastic=stochastic, seed=seed)


def copied(batch):
    lists = {name: [part.clone() for part in getattr(batch, name)] for name in (*PARTS, "grads")}
    return Batch(**lists, ids=batch.ids, map=batch.map, stochastic=batch.stochastic, seed=batch.seed)


def assert_same(ours, reference):
    words = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    for name in PARTS:
        for i, (found, expected) in enumerate(zip(getattr(ours, name), getattr(reference, name), strict=True)):
            same = found == expected
            if expected.dtype in words:
                same = found.view(words[expected.dtype]) == expected.view(words[expected.dtype])
                same |= found.isnan() & expected.isnan()
            wrong = (~same).nonzero()
            assert not wrong.numel(), f"{name}[{i}]: {len(wrong)} differ, first at {wrong[0].tolist()}"


def run_both(path, batch, steps, **numbers):
    reference = copied(batch)
    for step in steps:
        k = scalars(**{**NUMBERS, **numbers}, step=step)
        path.step(batch, k)
        adamw4_reference.step(reference, k)
        assert_same(batch, reference)
        for g, h in zip(batch.grads, reference.grads, strict=True):
            g.neg_().mul_(0.5)
            h.copy_(g)


@pytest.mark.parametrize("map", ["linear", "square"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_steps(path, map, stochastic):
    @settings(max_examples=40, deadline=None, database=None)
    @given(specs=tensors, seed=st.integers(0, 2**63 - 1), step=st.integers(1, 10_000), eps=st.sampled_from([1e-8, 0.0]))
    @example(specs=[(1, 1, False, *DTYPES, "normal"), (1, 1, True, *DTYPES, "bad")], seed=0, step=1, eps=0.0)
    @example(specs=[(70, 70, True, *DTYPES, "bad"), (4999, 1, False, *DTYPES[::-1], "bad")], seed=3, step=9, eps=1e-8)
    @example(specs=[(1, 4999, True, *DTYPES, "tiny"), (4999, 1, True, *DTYPES, "huge")], seed=4, step=9, eps=1e-8)
    def check(specs, seed, step, eps):
        run_both(path, make_batch(specs, map, stochastic, seed), (step, step + 1, step + 2), eps=eps)

    check()


@pytest.mark.parametrize("map", ["linear", "square"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_chunks_and_threads_leave_no_trace(path, map, stochastic, two_threads):
    specs = [(301, 499, rank1, dtype, dtype, "bad") for rank1 in (False, True) for dtype in DTYPES]
    specs += [(2, 70_001, True, *DTYPES, "bad"), (70_001, 2, True, *DTYPES, "decades")]
    run_both(path, make_batch(specs, map, stochastic, 11), (5,))


def test_a_spoilt_block_changes_nothing_but_the_counter(path):
    """With scales of blocks to the very bit; with rank-1 scales in p and m, and v stays within its code's error."""
    for rank1 in (False, True):
        batch = make_batch([(20, 50, rank1, torch.float32, torch.float32, "normal")], "linear", False, 1)
        batch.grads[0][300] = torch.nan
        before = copied(batch)
        path.step(batch, scalars(**NUMBERS, step=3))
        kept, codes = slice(256, 384), slice(128, 192)
        assert int(batch.skipped[0]) == 8
        assert torch.equal(batch.params[0][kept], before.params[0][kept])
        assert torch.equal(batch.m_codes[0][codes], before.m_codes[0][codes])
        assert batch.m_scales[0][2] == before.m_scales[0][2]
        changed = batch.params[0] != before.params[0]
        assert changed[:256].all()
        assert changed[384:].all()
        if not rank1:
            assert torch.equal(batch.v_codes[0][codes], before.v_codes[0][codes])
            assert batch.v_scales[0][2] == before.v_scales[0][2]


# The definition.


def decoded_state(state):
    return dequantize(state.m), dequantize(state.v)


def stepped_state(shape, generator, **how):
    """A parameter and its state after three steps, so that the state holds nothing but decoded numbers."""
    p = torch.randn(shape, generator=generator)
    state = adamw4_state(p, **how)
    for step in (1, 2, 3):
        adamw4_step([p], [torch.randn(shape, generator=generator)], [state], **NUMBERS, step=step)
    return p, state


@pytest.mark.parametrize("how", [{"scale": "rank1"}, {"scale": "block128"}, {"map": "square"}])
def test_one_step_is_that_of_adamw(how):
    generator = torch.Generator().manual_seed(0)
    p, state = stepped_state((37, 111), generator, **how)
    m, v = decoded_state(state)
    g = torch.randn(p.shape, generator=generator)

    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g
    optimizer = torch.optim.AdamW([parameter], **NUMBERS, foreach=False)
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()

    exact, (b1, b2) = p.double().numpy(), NUMBERS["betas"]
    wide_m = b1 * m.double().numpy() + (1 - b1) * g.double().numpy()
    wide_v = b2 * v.double().numpy() + (1 - b2) * g.double().numpy() ** 2
    exact = exact * (1 - NUMBERS["lr"] * NUMBERS["weight_decay"])
    exact -= NUMBERS["lr"] * (wide_m / (1 - b1**4)) / (np.sqrt(wide_v / (1 - b2**4)) + NUMBERS["eps"])

    adamw4_step([p], [g], [state], **NUMBERS, step=4)
    # Relative to p, and where p is nearly 0 to a step of size lr.
    assert np.allclose(p, parameter.detach(), rtol=1e-6, atol=1e-9)
    assert np.allclose(p, exact, rtol=2e-7, atol=1e-9)
    for new, wide in zip(decoded_state(state), (wide_m, wide_v), strict=True):
        error = new.double().numpy() - wide
        assert np.sqrt((error**2).sum() / (wide**2).sum()) < 0.2  # 0.15 for normal numbers, 0.18 for their squares


def test_several_steps_from_zero_follow_adamw():
    """With a gradient that every block represents exactly, quantisation has nothing to round."""
    p = torch.linspace(-1, 1, 256)
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = torch.full((256,), 0.25)
    optimizer = torch.optim.AdamW([parameter], **NUMBERS, foreach=False)
    state = adamw4_state(p)
    for step in range(1, 21):
        adamw4_step([p], [parameter.grad], [state], **NUMBERS, step=step)
        optimizer.step()
    assert np.allclose(p, parameter.detach(), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("map", ["linear", "square"])
@pytest.mark.parametrize("scale", ["rank1", "block128"])
def test_the_unit_of_the_gradients_does_not_matter(map, scale):
    """Gradients times 1e-4, far below torchao's smallest scale for v: the update has the same relative error."""
    errors = []
    for factor in (1.0, 1e-4):
        generator = torch.Generator().manual_seed(1)
        p = torch.zeros(64, 256)
        state, m, v = adamw4_state(p, map=map, scale=scale), torch.zeros(64, 256), torch.zeros(64, 256)
        for step in range(1, 9):
            g = torch.randn(p.shape, generator=generator) * factor
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            adamw4_step([p], [g], [state], lr=0, step=step)
        coded_m, coded_v = decoded_state(state)
        exact, ours = m / v.sqrt(), m / coded_v.sqrt()
        errors.append(float((ours - exact).norm() / exact.norm()))
        assert float((coded_m - m).norm() / m.norm()) < 0.5
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_digits_are_learnt_as_with_32_bits():
    """An MLP 64-256-256-10, all tensors in four bits, 600 steps: losses to 0.006 and accuracies within a point."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]

    def trained(make_step):
        torch.manual_seed(0)
        layers = (torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU())
        model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))
        update, generator = make_step(list(model.parameters())), torch.Generator().manual_seed(1)
        for step in range(1, 601):
            batch = train[torch.randint(0, len(train), (128,), generator=generator)]
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            update(step)
        with torch.no_grad():
            loss = float(torch.nn.functional.cross_entropy(model(x[train]), y[train]))
            return loss, float((model(x[test]).argmax(1) == y[test]).float().mean())

    def wide(params):
        optimizer = torch.optim.AdamW(params, lr=3e-3)
        return lambda step: optimizer.step()

    def narrow(**how):
        def make(params):
            states = [adamw4_state(p, id=i, **how) for i, p in enumerate(params)]
            return lambda step: adamw4_step(params, [p.grad for p in params], states, lr=3e-3, step=step)

        return make

    _, reference = trained(wide)
    for how in ({"scale": "block128"}, {"scale": "rank1"}, {"map": "square"}):
        loss, accuracy = trained(narrow(**how))
        assert loss <= 0.006, how  # false for NaN, too
        assert abs(accuracy - reference) <= 0.0101, how
