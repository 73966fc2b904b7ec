"""The public fused step: many tensors, compiled steps, refusals. The bits are tested path by path."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from sharpscope.kernels import adamw4_numbers, adamw4_state, adamw4_step, dequantize, quantize_m, quantize_v

GENERATOR = torch.Generator().manual_seed(4)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def problem(shapes=((30, 17), (5,), (1,), (4, 3, 3, 3)), scale="rank1"):
    params = [normal(*shape) for shape in shapes]
    states = [adamw4_state(p, scale=scale, id=i) for i, p in enumerate(params)]
    return params, states


def bits(params, states):
    parts = [*params, *(x for s in states for x in (s.m.codes, *s.m.scales, s.v.codes, *s.v.scales, s.skipped))]
    return [part.clone() for part in parts]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_one_call_for_many_tensors_equals_a_call_for_each(rounding):
    params, states = problem()
    twins, twin_states = [p.clone() for p in params], copy.deepcopy(states)
    for t in (1, 2, 3):
        grads = [normal(*p.shape) for p in params]
        adamw4_step(params, grads, states, lr=1e-2, step=t, rounding=rounding, seed=7)
        for one in zip(twins, grads, twin_states, strict=True):
            adamw4_step(*([x] for x in one), lr=1e-2, step=t, rounding=rounding, seed=7)
    assert same(bits(params, states), bits(twins, twin_states))


def test_the_state_takes_a_little_over_one_byte_an_entry():
    state = adamw4_state(torch.zeros(1024, 1024), scale="block128")
    assert state.nbytes == 1.0625 * 1024**2
    assert adamw4_state(torch.zeros(1024, 1024)).nbytes == 1.03125 * 1024**2 + 8 * 1024


def test_a_first_step_moves_every_entry_by_the_learning_rate():
    params, states = problem()
    before = [p.clone() for p in params]
    grads = [normal(*p.shape) for p in params]
    adamw4_step(params, grads, states, lr=1e-2, weight_decay=0.0, step=1)
    for p, old, g in zip(params, before, grads, strict=True):
        torch.testing.assert_close(old - p, 1e-2 * g.sign(), rtol=1e-3, atol=1e-6)


def test_weight_decay_acts_without_a_gradient():
    params, states = problem()
    before = [p.clone() for p in params]
    adamw4_step(params, [torch.zeros_like(p) for p in params], states, lr=0.1, weight_decay=0.5, step=1)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p, 0.95 * old)


def test_a_tensor_of_zeros_stays_zero():
    params, states = [torch.zeros(300)], [adamw4_state(torch.zeros(300))]
    for t in (1, 2):
        adamw4_step(params, [torch.zeros(300)], states, lr=0.1, step=t)
    assert not params[0].any()
    assert not dequantize(states[0].m).any()
    assert not dequantize(states[0].v).any()


@pytest.mark.parametrize("scale", ["rank1", "block128"])
def test_a_nan_changes_nothing_but_the_counter(scale):
    p = normal(64, 256)
    state = adamw4_state(p, scale=scale)
    adamw4_step([p], [normal(64, 256)], [state], lr=1e-2, step=1)
    g = normal(64, 256)
    p_clean, state_clean = p.clone(), copy.deepcopy(state)
    before, v_before = p.clone(), dequantize(state.v)
    adamw4_step([p_clean], [g], [state_clean], lr=1e-2, step=2)
    g[1, 130] = torch.nan
    adamw4_step([p], [g], [state], lr=1e-2, step=2)
    assert state.skipped.item() == 1
    hit = torch.zeros(64, 256, dtype=torch.bool)
    hit[1, 128:] = True
    assert torch.equal(p[hit], before[hit])
    assert torch.equal(p[~hit], p_clean[~hit])
    assert torch.equal(dequantize(state.m)[~hit], dequantize(state_clean.m)[~hit])
    if scale == "block128":
        assert torch.equal(dequantize(state.v)[hit], v_before[hit])
        assert torch.equal(dequantize(state.v)[~hit], dequantize(state_clean.v)[~hit])
    else:
        row_max = dequantize(state.v).amax(1, keepdim=True).expand(64, 256)[hit]
        assert ((dequantize(state.v)[hit] - v_before[hit]).abs() <= 0.0626 * row_max).all()


def test_narrow_matrices_keep_to_blocks_and_the_state_small():
    for shape in ((1, 10000), (10000, 1), (64, 9), (4, 3, 3, 3)):
        state = adamw4_state(torch.zeros(shape))
        assert state.v.scale == "block128"
        assert state.nbytes == 2 * (torch.Size(shape).numel() / 2 + 4 * -(-torch.Size(shape).numel() // 128))
    assert adamw4_state(torch.zeros(64, 64)).v.scale == "rank1"


def test_numbers_from_a_tensor_are_those_given():
    params, states = problem()
    twins, twin_states = [p.clone() for p in params], copy.deepcopy(states)
    grads = [normal(*p.shape) for p in params]
    how = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "step": 5}
    adamw4_step(params, grads, states, **how, rounding="stochastic", seed=3)
    numbers = adamw4_numbers(**how)
    adamw4_step(twins, grads, twin_states, lr=9.0, step=1, rounding="stochastic", seed=3, numbers=numbers)
    assert same(bits(params, states), bits(twins, twin_states))


def test_a_compiled_step_has_no_graph_break_and_the_same_bits():
    params, states = problem()
    twins, twin_states = [p.clone() for p in params], copy.deepcopy(states)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def train(params, grads, t):
        adamw4_step(params, [2 * g for g in grads], twin_states, lr=1e-2, step=t, rounding="stochastic", seed=1)
        return [p.sum() for p in params]

    for t in (1, 2, 3):
        grads = [normal(*p.shape) for p in params]
        adamw4_step(params, [2 * g for g in grads], states, lr=1e-2, step=t, rounding="stochastic", seed=1)
        sums = train(twins, grads, t)
        assert same(sums, [p.sum() for p in params])
    assert same(bits(params, states), bits(twins, twin_states))


def test_a_compiled_step_follows_a_schedule_through_its_numbers_and_any_seed():
    params, states = problem()
    twins, twin_states = [p.clone() for p in params], copy.deepcopy(states)
    grads = [normal(*p.shape) for p in params]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def train(numbers, seed):
        adamw4_step(twins, grads, twin_states, lr=0.0, step=1, numbers=numbers, rounding="stochastic", seed=seed)

    for t in range(1, 13):
        adamw4_step(params, grads, states, lr=1e-2 / t, step=t, rounding="stochastic", seed=t)
        train(adamw4_numbers(lr=1e-2 / t, step=t), t)
    assert same(bits(params, states), bits(twins, twin_states))


def test_a_compiled_step_refuses_shared_memory_too():
    p, state = normal(64), adamw4_state(torch.zeros(64))
    for params, grads, states in (([p], [p], [state]), ([p, p], [normal(64)] * 2, [state, adamw4_state(p)])):
        step = torch.compile(adamw4_step, backend="aot_eager")
        with pytest.raises(ValueError, match="share"):
            step(params, grads, states, lr=1e-2, step=1)


def test_the_codec_compiles():
    x = normal(30, 40).square()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(x, seed):
        packed = quantize_v(x, rounding="stochastic", seed=seed)
        return dequantize(packed) + dequantize(quantize_m(x))

    for seed in range(3):
        expected = dequantize(quantize_v(x, rounding="stochastic", seed=seed)) + dequantize(quantize_m(x))
        assert torch.equal(there_and_back(x, seed), expected)


def test_the_operators_keep_the_rules_of_torch():
    x = normal(300)
    torch.library.opcheck(torch.ops.sharpscope.quantize4.default, (x.square(), 10, "linear", True, 1, 2, 3))
    torch.library.opcheck(torch.ops.sharpscope.quantize4.default, (x, 0, "de", False, 0, 0, 0))
    p, state = normal(300), adamw4_state(torch.zeros(300))
    columns = torch.empty(0)
    codes = (state.m.codes, state.m.scales[0], columns, 300, "de")
    torch.library.opcheck(torch.ops.sharpscope.dequantize4.default, codes)
    lists = [[p], [x], [state.m.codes], [state.m.scales[0]], [state.v.codes], [state.v.scales[0]], [columns]]
    rest = ([state.skipped], [0], "linear", False, 0, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1, None)
    torch.library.opcheck(torch.ops.sharpscope.adamw4_.default, (*lists, *rest))


def test_parameters_that_need_gradients_and_empty_lists_are_fine():
    w = torch.nn.Parameter(normal(8, 8))
    w.square().sum().backward()
    adamw4_step([w], [w.grad], [adamw4_state(w)], lr=1e-2, step=1)
    assert w.requires_grad
    adamw4_step([], [], [], lr=1e-2, step=1)


def test_gradients_may_be_shared_and_parameters_may_not():
    p, q, g = normal(64), normal(64), normal(64)
    states = [adamw4_state(p, id=0), adamw4_state(q, id=1)]
    adamw4_step([p, q], [g, g], states, lr=1e-2, step=1)
    with pytest.raises(ValueError, match=r"`params\[0\]` and `params\[1\]` share memory"):
        adamw4_step([p, p], [g, g], states, lr=1e-2, step=2)
    both = normal(96)
    with pytest.raises(ValueError, match="share memory"):
        adamw4_step([both[:64], both[32:]], [g, g], states, lr=1e-2, step=2)
    with pytest.raises(ValueError, match=r"`params\[0\]` and `grads\[0\]` share memory"):
        adamw4_step([p], [p], states[:1], lr=1e-2, step=2)
    shared = replace(states[1], m=replace(states[1].m, scales=states[0].m.scales))
    with pytest.raises(ValueError, match=r"`states\[0\].m` and `states\[1\].m` share memory"):
        adamw4_step([p, q], [g, g], [states[0], shared], lr=1e-2, step=2)
    # A long gradient that holds a written tensor, with a short gradient between their beginnings.
    room = normal(512)
    long, short, written = room[:400], room[16:32], room[64:128]
    three = [adamw4_state(x, id=i) for i, x in enumerate((normal(400), normal(16), written))]
    with pytest.raises(ValueError, match=r"`params\[2\]` and `grads\[0\]` share memory"):
        adamw4_step([normal(400), normal(16), written], [long, short, normal(64)], three, lr=1e-2, step=1)
    with pytest.raises(ValueError, match=r"`states\[0\].\w+` and `states\[1\].\w+` share memory"):
        adamw4_step([p, q], [g, g], [states[0], states[0]], lr=1e-2, step=2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"params": [torch.zeros(8, dtype=torch.float64)]}, TypeError, r"`params\[0\]` is torch.float64"),
        ({"grads": [torch.zeros(8, dtype=torch.float16)]}, TypeError, r"`grads\[0\]` is torch.float16"),
        ({"params": [torch.zeros(16)[::2]]}, ValueError, "strides.*contiguous"),
        ({"grads": [torch.zeros(7)]}, ValueError, r"\[8\].*\[7\]"),
        ({"grads": []}, ValueError, "1 `params`, 0 `grads` and 1 `states`"),
        ({"lr": -1.0}, ValueError, "`lr` is -1.0"),
        ({"lr": float("nan")}, ValueError, "`lr` is nan"),
        ({"eps": -1e-8}, ValueError, "`eps`"),
        ({"eps": 1e-50}, ValueError, "`eps` is 1e-50; in float32"),
        ({"lr": 1e39}, ValueError, "`lr` is 1e"),
        ({"grads": [torch._neg_view(torch.ones(8))]}, ValueError, r"`grads\[0\]` is a negated view"),
        ({"betas": (0.9, 1.0)}, ValueError, "`betas`"),
        ({"betas": 0.9}, ValueError, "`betas` is 0.9"),
        ({"betas": (0.9, 1 - 1e-11)}, ValueError, "below 1 in float32"),
        ({"step": 0}, ValueError, "`step` is 0"),
        ({"step": 1.5}, TypeError, "`step` is 1.5"),
        ({"step": True}, TypeError, "`step` is True"),
        ({"lr": "a"}, TypeError, "`lr` is 'a'"),
        ({"grads": [None]}, TypeError, r"`grads\[0\]` is a NoneType.*leave out parameters without a gradient"),
        ({"states": [None]}, TypeError, r"`states\[0\]` is a NoneType.*see adamw4_state"),
        ({"params": torch.zeros(8)}, TypeError, "`params` is a Tensor; pass a list"),
        ({"params": (p for p in [torch.zeros(8)])}, TypeError, "`params` is a generator; pass a list"),
        ({"grads": [torch.zeros(8).to_sparse()]}, ValueError, r"`grads\[0\]` is torch.sparse_coo.*to_dense"),
        ({"rounding": "down"}, ValueError, "`rounding` is 'down'"),
        ({"seed": -2}, ValueError, "`seed` is -2"),
        ({"numbers": torch.zeros(9, dtype=torch.float64)}, ValueError, "`numbers` is torch.float64"),
        ({"numbers": torch.zeros(8)}, ValueError, r"`numbers` is torch.float32 \[8\]"),
        (
            {"states": [replace(adamw4_state(torch.zeros(8)), skipped=torch.zeros(1))]},
            ValueError,
            "skipped. is torch.float32",
        ),
        ({"params": [torch.zeros(8, device="meta")]}, ValueError, "meta"),
    ],
)
def test_bad_input_is_named(change, error, words):
    call = {"params": [torch.zeros(8)], "grads": [torch.zeros(8)], "states": [adamw4_state(torch.zeros(8))]}
    call |= {"lr": 1e-3, "step": 1} | change
    lists = [call.pop(name) for name in ("params", "grads", "states")]
    with pytest.raises(error, match=words):
        adamw4_step(*lists, **call)


def test_states_of_two_maps_need_two_calls():
    params = [normal(8), normal(8)]
    states = [adamw4_state(params[0]), adamw4_state(params[1], map="square", id=1)]
    with pytest.raises(ValueError, match=r"`states\[1\]` holds maps 'de' and 'square'"):
        adamw4_step(params, [normal(8), normal(8)], states, lr=1e-3, step=1)


def test_states_are_refused_for_what_has_no_entries_or_no_such_map():
    with pytest.raises(ValueError, match="no entries"):
        adamw4_state(torch.zeros(0))
    with pytest.raises(ValueError, match="`map` is 'de'"):
        adamw4_state(torch.zeros(3), map="de")
    with pytest.raises(ValueError, match="`scale` is 'row'"):
        adamw4_state(torch.zeros(3), scale="row")
    with pytest.raises(TypeError, match="`param` is torch.int64"):
        adamw4_state(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="`param` is a list"):
        adamw4_state([1.0])


def test_autograd_notices_that_a_parameter_it_saved_has_moved():
    w = torch.nn.Parameter(normal(8))
    loss = (w * w).sum()
    adamw4_step([w], [normal(8)], [adamw4_state(w)], lr=1e-2, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_states_are_saved_and_loaded_as_torch_does_by_default():
    params, states = problem()
    adamw4_step(params, [normal(*p.shape) for p in params], states, lr=1e-2, step=1)
    file = io.BytesIO()
    torch.save({"params": params, "states": states}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    grads = [normal(*p.shape) for p in params]
    adamw4_step(params, grads, states, lr=1e-2, step=2)
    adamw4_step(loaded["params"], grads, loaded["states"], lr=1e-2, step=2)
    assert same(bits(params, states), bits(loaded["params"], loaded["states"]))
    object.__setattr__(loaded["states"][0].m, "version", 2)
    with pytest.raises(ValueError, match="`version` of the payload is 2"):
        adamw4_step(loaded["params"], grads, loaded["states"], lr=1e-2, step=3)


def test_states_print_in_a_line_and_compare_by_identity():
    first, second = adamw4_state(torch.zeros(300)), adamw4_state(torch.zeros(300))
    assert first != second
    assert "Packed([300], map='de', scale='block128', 162 bytes)" in repr(first)


def test_random_numbers_are_not_shared():
    params = [normal(8), normal(8)]
    with pytest.raises(ValueError, match=r"`states` have the ids \[0, 0\]"):
        adamw4_step(params, params, [adamw4_state(p) for p in params], lr=1e-3, step=1, rounding="stochastic")
