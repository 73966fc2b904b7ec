"""The fused step on a GPU: every byte as defined, on any stream, in graphs, compiled."""

import pytest
import torch
from sharpscope.kernels import adamw4_numbers, adamw4_state, adamw4_step, dequantize

pytestmark = pytest.mark.gpu

SHAPES = [(1,), (2,), (127,), (128,), (129,), (30, 17), (5, 1), (1, 300), (64, 128), (4, 3, 3, 3), (1000, 37), (20001,)]
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    (map, scale, rounding)
    for map in ("linear", "square")
    for scale in ("block128", "rank1", "mixed")
    for rounding in ("nearest", "stochastic")
]
CASE = pytest.mark.parametrize(("map", "scale", "rounding"), CASES)


def number(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(shapes, step, dtypes):
    """Of very different sizes, with zeros."""
    factors = (1.0, 1e-4, 1e-12, 1e4, 0.0)
    return [
        number(1000 * step + i, shape, dtypes[i % len(dtypes)]) * factors[(i + step) % 5]
        for i, shape in enumerate(shapes)
    ]


def problem(shapes, map, scale, *, p_dtypes=(torch.float32,)):
    params = [number(i, shape, p_dtypes[i % len(p_dtypes)]) for i, shape in enumerate(shapes)]
    scales = ("block128", "rank1") if scale == "mixed" else (scale,)
    states = [adamw4_state(p, map=map, scale=scales[i % len(scales)], id=3 * i) for i, p in enumerate(params)]
    return params, states


@pytest.fixture
def on_device(device, state_to):
    """`on_device(params, states)`: copies there."""
    return lambda params, states: ([p.to(device) for p in params], [state_to(state, device) for state in states])


@CASE
def test_steps_are_those_of_the_definition(device, on_device, defined_step, assert_same_states, map, scale, rounding):
    for p_dtypes, g_dtypes in ((DTYPES, DTYPES[::-1] + DTYPES), (DTYPES[:1], DTYPES[:1]), (DTYPES[1:], DTYPES[1:])):
        params, states = problem(SHAPES, map, scale, p_dtypes=p_dtypes)
        others, other_states = on_device(params, states)
        for t in (1, 2, 3, 50):
            grads = gradients(SHAPES, t, g_dtypes)
            how = {
                "lr": 1e-2,
                "betas": (0.9, 0.99),
                "weight_decay": 0.1,
                "step": t,
                "rounding": rounding,
                "seed": 2**40 + 1,
            }
            defined_step(params, grads, states, **how)
            adamw4_step(others, [g.to(device) for g in grads], other_states, **how)
            assert_same_states(others, other_states, params, states, f"step {t}")


@CASE
def test_broken_blocks_are_left_alone_and_counted(
    device, on_device, defined_step, assert_same_states, map, scale, rounding
):
    params, states = problem(SHAPES, map, scale)
    others, other_states = on_device(params, states)
    for t, bad in ((1, None), (2, torch.nan), (3, torch.inf), (4, 3e38), (5, None)):
        grads = gradients(SHAPES, t, DTYPES[:1])
        if bad is not None:
            for g in grads:
                g.view(-1)[:: 1 + g.numel() // 3] = bad
        how = {"lr": 1e-2, "step": t, "rounding": rounding}
        defined_step(params, grads, states, **how)
        adamw4_step(others, [g.to(device) for g in grads], other_states, **how)
        assert_same_states(others, other_states, params, states, f"step {t}")
    assert all(int(state.skipped) >= 3 for state in other_states)


@pytest.mark.parametrize("scale", ["block128", "rank1"])
def test_views_at_odd_addresses(device, on_device, defined_step, assert_same_states, scale):
    shapes = [(33, 65), (4, 128), (1, 1001)]
    for shift in (1, 2, 3, 5):
        for dtype in DTYPES:
            params, states = problem(shapes, "linear", scale, p_dtypes=(dtype,))
            others, other_states = on_device(params, states)
            grads = gradients(shapes, 1, (dtype,))

            def shifted(x, shift=shift, dtype=dtype):
                base = torch.full((x.numel() + shift + 8,), 3.0, dtype=dtype, device=device)
                base[shift : shift + x.numel()] = x.reshape(-1).to(device)
                return base, base[shift : shift + x.numel()].view(x.shape)

            bases, others = zip(*map(shifted, others), strict=True)
            defined_step(params, grads, states, lr=1e-2, step=1)
            adamw4_step(others, [shifted(g)[1] for g in grads], other_states, lr=1e-2, step=1)
            assert_same_states(others, other_states, params, states, f"shift {shift} {dtype}")
            assert all((base[:shift] == 3).all() and (base[-8:] == 3).all() for base in bases)


def test_a_thousand_tiny_tensors(device, on_device, defined_step, assert_same_states):
    shapes = [(1 + 37 * i % 211, 1 + 11 * i % 7)[: 1 + i % 2] for i in range(1000)]
    params, states = problem(shapes, "square", "mixed", p_dtypes=DTYPES)
    others, other_states = on_device(params, states)
    for t in (1, 2):
        grads = gradients(shapes, t, DTYPES[::-1])
        how = {"lr": 1e-2, "step": t, "rounding": "stochastic", "seed": 1}
        defined_step(params, grads, states, **how)
        adamw4_step(others, [g.to(device) for g in grads], other_states, **how)
    assert_same_states(others, other_states, params, states)


def test_gradients_in_new_memory_are_found(device, on_device, defined_step, assert_same_states):
    params, states = problem(SHAPES, "linear", "mixed")
    others, other_states = on_device(params, states)
    old = []
    for t in (1, 2, 3):
        grads = gradients(SHAPES, t, DTYPES[:1])
        defined_step(params, grads, states, lr=1e-2, step=t)
        there = [g.to(device) for g in grads]  # elsewhere: the earlier ones are alive, and poisoned
        adamw4_step(others, there, other_states, lr=1e-2, step=t)
        old += there
        for g in old:
            g.fill_(torch.nan)
    assert_same_states(others, other_states, params, states)


def test_lists_may_change_between_calls(device, on_device, defined_step, assert_same_states):
    params, states = problem(SHAPES, "linear", "mixed")
    others, other_states = on_device(params, states)
    for t, chosen in ((1, slice(None)), (2, slice(0, 5)), (3, slice(None, None, -2)), (4, slice(None))):
        grads = gradients(SHAPES, t, DTYPES[:1])[chosen]
        defined_step(params[chosen], grads, states[chosen], lr=1e-2, step=t)
        adamw4_step(others[chosen], [g.to(device) for g in grads], other_states[chosen], lr=1e-2, step=t)
    assert_same_states(others, other_states, params, states)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_has_the_same_bits(device, on_device, assert_same_states, backend):
    shapes = SHAPES[5:10]
    params, states = on_device(*problem(shapes, "linear", "mixed"))
    twins, twin_states = [p.clone() for p in params], on_device([], states)[1]

    @torch.compile(fullgraph=True, backend=backend)
    def train(params, grads, t):
        adamw4_step(params, [2 * g for g in grads], twin_states, lr=1e-2, step=t, rounding="stochastic", seed=1)

    for t in (1, 2, 3):
        grads = [g.to(device) for g in gradients(shapes, t, DTYPES[:1])]
        adamw4_step(params, [2 * g for g in grads], states, lr=1e-2, step=t, rounding="stochastic", seed=1)
        train(twins, grads, t)
    assert_same_states(twins, twin_states, params, states)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", ["block128", "rank1", "mixed"])
def test_a_captured_graph_follows_its_numbers(cuda, on_device, assert_same_states, scale, rounding):
    params, states = on_device(*problem(SHAPES, "linear", scale))
    twins, twin_states = [p.clone() for p in params], on_device([], states)[1]
    grads = [torch.zeros_like(p) for p in params]
    numbers = adamw4_numbers(lr=1e-2, step=1).to(cuda)
    how = {"rounding": rounding, "seed": 5}

    def step(params, states):
        adamw4_step(params, grads, states, lr=1e-2, step=1, numbers=numbers, **how)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and loads the kernels, and makes the tables
        step(params, states)
    torch.cuda.current_stream().wait_stream(side)
    for p, q, state, other in zip(params, twins, states, twin_states, strict=True):  # back to the beginning
        p.copy_(q)
        for packed, first in ((state.m, other.m), (state.v, other.v)):
            packed.codes.copy_(first.codes)
            for part, at in zip(packed.scales, first.scales, strict=True):
                part.copy_(at)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(params, states)
    for t in (1, 2, 3, 4):
        for g, new in zip(grads, gradients(SHAPES, t, DTYPES[:1]), strict=True):
            g.copy_(new)
        lr = 1e-2 / t
        numbers.copy_(adamw4_numbers(lr=lr, step=t))
        graph.replay()
        adamw4_step(twins, grads, twin_states, lr=lr, step=t, **how)
        assert_same_states(params, states, twins, twin_states, f"replay {t}")


def test_a_capture_without_a_step_before_is_refused(cuda, on_device, assert_same_states):
    params, states = on_device(*problem(SHAPES[:3], "linear", "block128"))
    twins, twin_states = [p.clone() for p in params], on_device([], states)[1]
    others, other_states = [p.clone() for p in params], on_device([], states)[1]
    grads = [torch.ones_like(p) for p in params]
    numbers = adamw4_numbers(lr=1e-2, step=1).to(cuda)
    adamw4_step(others, grads, other_states, lr=1e-2, step=1, numbers=numbers)  # others, which do not help
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="one step on these very tensors before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        adamw4_step(params, grads, states, lr=1e-2, step=1, numbers=numbers)
    torch.cuda.synchronize()
    assert_same_states(params, states, twins, twin_states, "after the refusal")
    adamw4_step(params, grads, states, lr=1e-2, step=1, numbers=numbers)
    assert_same_states(params, states, others, other_states, "a step after that")


def test_side_streams_are_followed(cuda, on_device, defined_step, assert_same_states):
    params, states = problem(SHAPES, "linear", "mixed")
    others, other_states = on_device(params, states)
    grads = gradients(SHAPES, 1, DTYPES[:1])
    there = [torch.full(shape, torch.nan, device=cuda) for shape in SHAPES]
    sources = [g.to(cuda) for g in grads]
    defined_step(params, grads, states, lr=1e-2, step=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for g, source in zip(there, sources, strict=True):
            g.copy_(source)
        adamw4_step(others, there, other_states, lr=1e-2, step=1)
    stream.synchronize()
    assert_same_states(others, other_states, params, states)


def test_a_second_gpu(cuda, on_device, defined_step, assert_same_states, state_to):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params, states = problem(SHAPES, "linear", "mixed")
    other = torch.device("cuda", 1)
    others, other_states = [p.to(other) for p in params], [state_to(state, other) for state in states]
    grads = gradients(SHAPES, 1, DTYPES[:1])
    defined_step(params, grads, states, lr=1e-2, step=1)
    with torch.cuda.device(0):
        adamw4_step(others, [g.to(other) for g in grads], other_states, lr=1e-2, step=1)
    assert_same_states(others, other_states, params, states)


@CASE
def test_the_path_of_torch_operations_is_within_two_roundings(
    device, state_to, monkeypatch, defined_step, assert_same_bits, map, scale, rounding
):
    params, states = problem(SHAPES, map, scale)
    for t in (1, 2, 3):
        grads = gradients(SHAPES, t, DTYPES[:1])
        how = {"lr": 1e-2, "step": t, "rounding": rounding}
        others, other_states = [p.to(device) for p in params], [state_to(state, device) for state in states]
        with monkeypatch.context() as patch:
            patch.setenv("SHARPSCOPE_KERNELS", "torch")
            adamw4_step(others, [g.to(device) for g in grads], other_states, **how)
        old = [p.clone() for p in params]
        defined_step(params, grads, states, **how)
        for before, p, q, state, other in zip(old, params, others, states, other_states, strict=True):
            assert_same_bits(other.m.codes, state.m.codes)
            assert_same_bits(other.v.codes, state.v.codes)
            assert ((q.cpu() - p).abs() <= 2 * 2.0**-23 * torch.maximum(before.abs(), p.abs())).all()


def test_more_than_2_to_the_31_entries_equal_their_last_piece(cuda, assert_same_bits):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(cuda)[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of the GPU")
    n, tail = 2**31 + 129, 128 * 1000 + 1
    n -= (n - tail) % 128
    generator = torch.Generator(device=cuda).manual_seed(1)
    p, g = (torch.empty(n, device=cuda).uniform_(-1, 1, generator=generator) for _ in range(2))
    last, last_g = p[-tail:].clone(), g[-tail:].clone()
    state, last_state = (adamw4_state(x, scale="block128") for x in (p, last))
    for t in (1, 2):
        adamw4_step([p], [g], [state], lr=1e-2, step=t)
        adamw4_step([last], [last_g], [last_state], lr=1e-2, step=t)
    assert_same_bits(p[-tail:], last)
    assert_same_bits(state.m.codes[-(tail // 2 + 1) :], last_state.m.codes)
    assert_same_bits(state.v.scales[0][-1001:], last_state.v.scales[0])


def test_small_gradients_lose_nothing(device):
    """Gradients 1e-4 times as large move the weights as the large ones do: no scale is clipped."""
    steps = []
    for factor in (1.0, 1e-4):
        p, state = torch.zeros(4096, device=device), adamw4_state(torch.zeros(4096, device=device), scale="block128")
        for t in range(1, 6):
            adamw4_step(
                [p], [number(t, (4096,)).to(device) * factor], [state], lr=1e-2, eps=1e-30, weight_decay=0.0, step=t
            )
        steps.append((p, dequantize(state.v)))
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=1e-3, atol=1e-5)
    assert (steps[1][1] > 0).all()
