"""AdamW in four bits: what it keeps, what it divides by, when it is stable. Parity stands in the table."""

import io
import math

import numpy as np
import pytest
import torch
from optimizer_rows.adamw4bit import PlainAdamW4bit
from sharpscope.dynamics.optimizers.adamw4bit import AdamW4bit
from sharpscope.dynamics.optimizers.moment_codecs import Factored, SignedFourBit, Uncompressed, UnsignedFourBit
from sharpscope.kernels import from_torchao
from torch import nn

KINDS = [
    {"v": "block"},
    {"v": "rank1"},
    {"v": "rank1", "map": "square", "rounding": "stochastic"},
    {"v": "factor"},
    {"codec": Uncompressed()},
]
LARGE = (40, 64)


def drawn(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes, dtype=torch.float32):
    return [nn.Parameter(drawn(shape, i, dtype)) for i, shape in enumerate(shapes)]


def step_with(optimizer, params, t):
    for i, p in enumerate(params):
        p.grad = drawn(p.shape, 1000 * t + i, p.dtype) * (1 + i)
    optimizer.step()


def after(steps, params, **options):
    optimizer = AdamW4bit(params, **{"lr": 1e-2, "min_size": 0, **options})
    for t in range(steps):
        step_with(optimizer, params, t)
    return optimizer


@pytest.mark.parametrize("map", ["linear", "square"])
def test_rank_1_scales_step_as_a_transcription_of_the_paper_does(map):
    shapes = [LARGE, (16, 8, 5, 5), (200,)]
    mine, theirs = parameters(shapes), parameters(shapes)
    options = {"lr": 1e-2, "betas": (0.8, 0.97), "weight_decay": 0.1}
    ours = AdamW4bit(mine, v="rank1", map=map, min_size=0, **options)
    # The vector has scales of blocks on both sides.
    oracle = PlainAdamW4bit(theirs, v="rank1", map=map, **options)
    for t in range(200):
        step_with(ours, mine, t)
        step_with(oracle, theirs, t)
    assert "v_columns" in ours.state[mine[0]]
    assert "v_columns" in ours.state[mine[1]]
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)


def test_it_steps_as_torchao_does(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    torchao = pytest.importorskip("torchao.optim")
    shape = (64, 128)  # a block is a row
    mine, theirs = parameters([shape]), parameters([shape])
    ours, oracle = AdamW4bit(mine, lr=1e-2, v="block"), torchao.AdamW4bit(theirs, lr=1e-2)
    agree = torch.ones(shape, dtype=torch.bool)
    for t in range(10):
        step_with(ours, mine, t)
        step_with(oracle, theirs, t)
        # A value half way between codes goes to one or the other with the last bit of the scale, and from then on
        # the states of its block differ.
        assert bool(((mine[0] - theirs[0]).abs() <= 2e-6)[agree].all())
        for name, kept, map in (("m", "exp_avg", "de"), ("v", "exp_avg_sq", "linear")):
            kept = oracle.state[theirs[0]][kept]
            codes = from_torchao(kept.codes, kept.scale, shape, map).codes
            agree &= (codes == ours.state[mine[0]][f"{name}_codes"]).view(64, 64).all(1, keepdim=True)
    assert float(agree.double().mean()) > 0.9


def test_small_tensors_step_as_torchs_adamw_in_float32():
    shapes = [(64, 64), (7, 5), ()]
    mine, theirs = parameters(shapes), parameters(shapes)
    ours, oracle = AdamW4bit(mine, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    for t in range(200):
        step_with(ours, mine, t)
        step_with(oracle, theirs, t)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # 200 roundings of some 1e-8


def test_tensors_above_the_size_are_compressed_and_others_are_not():
    params = parameters([(64, 64), (64, 65)])
    optimizer = after(1, params, min_size=4096)
    assert not optimizer.is_compressed(params[0])
    assert optimizer.is_compressed(params[1])
    assert optimizer.state[params[0]]["m_values"].dtype == torch.float32
    assert optimizer.state[params[1]]["m_codes"].dtype == torch.uint8
    everything = after(1, parameters([(64, 65)]), min_size=math.inf)
    assert all("codes" not in key for state in everything.state.values() for key in state)


@pytest.mark.parametrize(("v", "scales"), [("block", 2 * 20), ("rank1", 20 + 104), ("factor", 20 + 104)])
def test_its_state_takes_the_bytes_of_codes_and_scales(v, scales):
    params = parameters([LARGE])
    optimizer = after(2, params, v=v)
    codes = 2560 // 2 * (1 if v == "factor" else 2)
    counters = 4 if v == "factor" else 4 + 8
    assert optimizer.state_bytes() == codes + 4 * scales + counters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_codes_stay_codes_in_a_file_and_the_run_goes_on_bit_for_bit(dtype, options):
    shapes = [LARGE, (300,), (3, 4, 5, 6)]
    whole = parameters(shapes, dtype)
    after(10, whole, **options)
    params = parameters(shapes, dtype)
    optimizer = after(4, params, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdamW4bit(again, min_size=0, **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(params, again, strict=True):
        kept, loaded = optimizer.state[p], resumed.state[q]
        assert kept.keys() == loaded.keys()
        assert all(kept[key].dtype == loaded[key].dtype and torch.equal(kept[key], loaded[key]) for key in kept)
        assert all(kept[key].dtype == torch.uint8 for key in kept if key.endswith("codes"))
    for t in range(4, 10):
        step_with(resumed, again, t)
    assert all(torch.equal(p, q) for p, q in zip(again, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_preconditioner_is_what_the_next_step_divides_by(options, dtype):
    shapes = [LARGE, (300,), (3, 4, 5, 6)]
    params = parameters(shapes, dtype)
    lr, decay, b1 = 1e-2, 0.1, 0.9
    optimizer = after(5, params, lr=lr, weight_decay=decay, **options)
    expected = []
    for i, p in enumerate(params):
        p.grad = drawn(p.shape, 77 + i, dtype)
        m = b1 * optimizer.moments(p)[0] + (1 - b1) * p.grad
        expected.append((1 - lr * decay) * p.detach() - lr * m / optimizer.preconditioner(p, p.grad))
    before = [dict(optimizer.state[p]) for p in params]
    assert all(torch.equal(before[i][key], x) for i, p in enumerate(params) for key, x in optimizer.state[p].items())
    optimizer.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_the_preconditioner_of_the_last_step_is_made_of_what_was_kept():
    params = parameters([LARGE])
    optimizer = after(3, params, v="block")
    v = optimizer.moments(params[0])[1]
    expected = (1 - 0.9**3) * ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    torch.testing.assert_close(optimizer.preconditioner(params[0]), expected)
    fresh = AdamW4bit(params)
    with pytest.raises(ValueError, match="has not made a step"):
        fresh.preconditioner(params[0])
    with pytest.raises(ValueError, match="is no parameter of this AdamW4bit"):
        fresh.preconditioner(nn.Parameter(torch.ones(2)))


def test_reading_what_the_monitor_reads_changes_nothing():
    for options in KINDS:
        params = parameters([LARGE, (300,)])
        optimizer = after(3, params, **options)
        before = [{key: x.clone() for key, x in optimizer.state[p].items()} for p in params]
        for p in params:
            optimizer.preconditioner(p, p.grad)
            optimizer.preconditioner(p)
            m, v = optimizer.next_moments(p, p.grad)
            optimizer.direction(p, *optimizer.decoded(p, optimizer.encoded(p, m, v)))
        for p, kept in zip(params, before, strict=True):
            assert all(torch.equal(kept[key], x) for key, x in optimizer.state[p].items())


@pytest.mark.parametrize("what", ["parameters", "gradients", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_do_not_matter(what, dtype):
    plain = parameters([LARGE], dtype)
    strided = [
        nn.Parameter(drawn(LARGE, 0, dtype).t().contiguous().t() if what != "gradients" else drawn(LARGE, 0, dtype))
    ]
    one, other = (AdamW4bit(p, lr=1e-2, min_size=0) for p in (plain, strided))
    for t in range(5):
        g = drawn(LARGE, 50 + t, dtype)
        plain[0].grad = g
        strided[0].grad = g.t().contiguous().t() if what != "parameters" else g.clone()
        one.step()
        other.step()
    assert strided[0].is_contiguous() == (what == "gradients")
    assert torch.equal(plain[0], strided[0])
    assert torch.equal(one.state[plain[0]]["m_codes"], other.state[strided[0]]["m_codes"])


def test_empty_tensors_and_numbers_train_too():
    params = [nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(1, 1))]
    optimizer = AdamW4bit(params, lr=0.1, weight_decay=0.0, min_size=0)
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    assert float(params[1].detach()) == pytest.approx(1.9)
    assert float(params[2].detach()) == pytest.approx(0.9)


def test_bfloat16_parameters_have_steps_and_scales_in_float32():
    rough = nn.Parameter(drawn(LARGE).bfloat16())
    fine = nn.Parameter(rough.detach().float())
    optimizers = [AdamW4bit([p], lr=1e-2, min_size=0) for p in (rough, fine)]
    rough.grad = drawn(LARGE, 9).bfloat16()
    fine.grad = rough.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(rough.detach(), fine.detach().bfloat16())
    kept, exact = (optimizer.state[p] for optimizer, p in zip(optimizers, (rough, fine), strict=True))
    assert all(torch.equal(kept[key], exact[key]) for key in exact)
    assert kept["v_scales"].dtype == torch.float32


def test_parameters_that_start_later_have_their_own_count():
    params = parameters([LARGE, LARGE])
    optimizer = AdamW4bit(params, lr=1e-2, min_size=0)
    alone = [nn.Parameter(params[1].detach().clone())]
    late = AdamW4bit(alone, lr=1e-2, min_size=0)
    for t in range(4):
        params[0].grad = drawn(LARGE, t)
        params[1].grad = alone[0].grad = drawn(LARGE, 90 + t) if t >= 2 else None
        optimizer.step()
        late.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 2]
    assert torch.equal(params[1], alone[0])


def test_factored_second_moments_are_exact_for_gradients_of_rank_one():
    p = nn.Parameter(torch.zeros(2, 30, 20, dtype=torch.float64))
    optimizer = AdamW4bit([p], v="factor", min_size=0)
    a, b = drawn((2, 30, 1), 1, torch.float64), drawn((2, 1, 20), 2, torch.float64)
    v = torch.zeros_like(p)
    for t in range(1, 30):
        p.grad = t * a * b
        v = 0.999 * v + 0.001 * p.grad.square()
        optimizer.step()
        torch.testing.assert_close(optimizer.moments(p)[1], v, rtol=1e-12, atol=0)


def test_factored_encoding_is_the_recurrence_of_the_means():
    codec, b2 = Factored(), 0.9
    rows, columns = torch.zeros(6, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    parts = codec.encode(torch.zeros(6, 5, dtype=torch.float64), step=0, id=0)
    assert torch.equal(codec.decode(parts, torch.Size((6, 5)), torch.float64), torch.zeros(6, 5, dtype=torch.float64))
    for t in range(20):
        square = drawn((6, 5), t, torch.float64).square()
        rows, columns = b2 * rows + (1 - b2) * square.mean(1), b2 * columns + (1 - b2) * square.mean(0)
        v = codec.decode(parts, torch.Size((6, 5)), torch.float64)
        parts = codec.encode(b2 * v + (1 - b2) * square, step=t, id=0)
        torch.testing.assert_close(parts["row_means"], rows, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts["column_means"], columns, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel and the codec
def test_stochastic_rounding_keeps_the_mean_of_the_moments(dtype):
    g = drawn(LARGE, 5, dtype)
    totals, draws = [torch.zeros(LARGE, dtype=torch.float64) for _ in range(2)], 400
    for seed in range(draws):
        p = nn.Parameter(torch.zeros(LARGE, dtype=dtype))
        optimizer = AdamW4bit([p], v="block", rounding="stochastic", seed=seed, min_size=0)
        p.grad = g
        optimizer.step()
        for total, moment in zip(totals, optimizer.moments(p), strict=True):
            total += moment
    for total, exact, width, low in zip(
        totals, (0.1 * g, 0.001 * g * g), (0.225, 1 / 16), (-0.8875, 1 / 16), strict=True
    ):
        exact = exact.double()
        scale = exact.reshape(-1, 128).abs().amax(1).repeat_interleave(128).view(LARGE)
        inside = exact / scale >= low
        # A rounded value is within one width, so its deviation is at most half of it; five of those.
        bound = 5 * 0.5 * width * scale / math.sqrt(draws)
        assert bool(((total / draws - exact).abs() <= bound)[inside].all())
        assert float((total / draws - exact).abs()[inside].max()) > 0


def test_every_parameter_and_step_has_its_own_random_numbers():
    p, q = parameters([LARGE]) + parameters([LARGE])
    optimizer = AdamW4bit([p, q], rounding="stochastic", min_size=0, v="block", betas=(0.0, 0.0))
    seen = []
    for _ in range(2):
        p.grad = q.grad = drawn(LARGE, 5)
        optimizer.step()
        seen += [optimizer.state[x]["m_codes"].clone() for x in (p, q)]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_what_the_next_step_will_keep_is_known_before():
    p, q = parameters([LARGE] * 2)
    optimizer = AdamW4bit([p, q], rounding="stochastic", min_size=0)
    for t in range(3):
        p.grad, q.grad = drawn(LARGE, t), drawn(LARGE, 10 + t)
        told = optimizer.encoded(q, *optimizer.next_moments(q, q.grad))
        optimizer.step()
        for parts, name in zip(told, ("m_codes", "v_codes"), strict=True):
            differ = parts["codes"] != optimizer.state[q][name]
            assert float(differ.double().mean()) < 1e-2  # the kernel rounds in another order


def test_blocks_with_moments_that_are_not_finite_are_left_out_and_counted():
    p = nn.Parameter(torch.zeros(4, 128))
    optimizer = AdamW4bit([p], v="block", min_size=0)
    p.grad = torch.ones(4, 128)
    p.grad[1, 7] = math.inf
    optimizer.step()
    assert int(optimizer.state[p]["skipped"]) == 1
    assert torch.equal(p.detach()[1], torch.zeros(128))
    assert bool((p.detach()[[0, 2, 3]] < 0).all())


def test_groups_have_kinds_of_their_own():
    params = parameters([LARGE] * 3)
    groups = [
        {"params": params[:1], "v": "factor"},
        {"params": params[1:2], "v": "block", "map": "square"},
        {"params": params[2:], "min_size": math.inf},
    ]
    optimizer = AdamW4bit(groups, lr=1e-2, min_size=0)
    for t in range(3):
        step_with(optimizer, params, t)
    kinds = [set(optimizer.state[p]) - {"step", "skipped"} for p in params]
    assert kinds[0] == {"m_codes", "m_scales", "v_row_means", "v_column_means"}
    assert kinds[1] == {"m_codes", "m_scales", "v_codes", "v_scales"}
    assert kinds[2] == {"m_values", "v_values"}
    alone = parameters([LARGE] * 2)[1:]
    square = AdamW4bit(alone, lr=1e-2, min_size=0, v="block", map="square")
    for t in range(3):
        alone[0].grad = drawn(LARGE, 1000 * t + 1) * 2
        square.step()
    assert torch.equal(alone[0], params[1])


def test_the_codec_outside_of_the_kernel_gives_what_the_kernel_does():
    params, again = parameters([LARGE]), parameters([LARGE])
    one = after(1, params)
    other = after(1, again, codec=(SignedFourBit(), UnsignedFourBit()))
    torch.testing.assert_close(params[0], again[0], rtol=0, atol=1e-7)
    differ = one.state[params[0]]["v_codes"] != other.state[again[0]]["v_codes"]
    assert float(differ.double().mean()) < 1e-3  # one rounding more or less in v


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v": "rank2"}, "`v` is 'rank2'"),
        ({"map": "de"}, "`map` is 'de'"),
        ({"rounding": "up"}, "`rounding` is 'up'"),
        ({"min_size": -1}, "`min_size` is -1"),
        ({"seed": -1}, "`seed` is -1"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` is 1"),
        ({"eps": -1e-8}, "`eps` is -1e-08"),
        ({"weight_decay": math.nan}, "`weight_decay` is nan"),
        ({"codec": "identity"}, "`codec` is 'identity'"),
        ({"codec": (Uncompressed(),) * 3}, "or a pair of them"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        AdamW4bit(parameters([LARGE]), **options)


def test_codes_of_another_format_are_refused():
    params = parameters([LARGE])
    saved = after(1, params).state_dict()
    saved["param_groups"][0]["format"] = 99
    with pytest.raises(ValueError, match="format 99"):
        AdamW4bit(params).load_state_dict(saved)


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({"codec": Uncompressed()}, {}),
        ({}, {"codec": Uncompressed()}),
        ({"v": "factor"}, {"group": {"v": "rank1"}}),
        ({"v": "rank1"}, {"group": {"v": "factor"}}),
        ({}, {"group": {"min_size": math.inf}}),
    ],
    ids=str,
)
def test_moments_that_were_kept_otherwise_are_not_lost_in_silence(before, change):
    params = parameters([LARGE])
    saved = after(2, params, **before)
    resumed = AdamW4bit(params, min_size=0, codec=change.get("codec"))
    resumed.load_state_dict(saved.state_dict())
    resumed.param_groups[0].update(change.get("group", {}))
    with pytest.raises(ValueError, match="must stay what they were at its first step"):
        step_with(resumed, params, 2)


def test_options_may_be_tensors_of_one_number():
    plain, given = parameters([LARGE]), parameters([LARGE])
    one = after(2, plain, lr=1e-2, weight_decay=0.5)
    other = after(2, given, lr=torch.tensor(1e-2, dtype=torch.float64), weight_decay=torch.tensor(0.5))
    assert torch.equal(plain[0], given[0])
    assert one.stability_threshold() == other.stability_threshold()


def test_an_own_codec_is_used_for_both_moments():
    class Halves:
        divides_decoded = False

        def encode(self, x, *, step, id):
            return {"half": x.half()}

        def decode(self, parts, shape, dtype):
            return parts["half"].to(dtype)

    p = nn.Parameter(torch.zeros(LARGE))
    optimizer = AdamW4bit([p], codec=Halves(), min_size=0)
    p.grad = drawn(LARGE, 3)
    optimizer.step()
    assert optimizer.state[p]["m_half"].dtype == torch.float16
    torch.testing.assert_close(optimizer.moments(p)[0], (0.1 * p.grad).half().float(), rtol=1e-3, atol=0)


def test_a_first_moment_whose_largest_entry_is_negative_shrinks_when_encoded_again():
    # The map has 1 and not −1, so encoding is no projection.
    x = np.float32([-1.0] + [0.5] * 127)
    codec = SignedFourBit()
    once = codec.decode(codec.encode(torch.tensor(x), step=1, id=0), torch.Size((128,)), torch.float32)
    twice = codec.decode(codec.encode(once, step=1, id=0), torch.Size((128,)), torch.float32)
    assert float(once[0]) == pytest.approx(-0.8875)
    assert float(twice[0]) == pytest.approx(-(0.8875**2))
