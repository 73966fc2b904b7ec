"""Four-bit states of torchao 0.18 and ours: one set of codes, two orders of nibbles."""

import importlib

import numpy as np
import pytest
import torch
from sharpscope.kernels.adamw4 import adamw4_state, adamw4_step
from sharpscope.kernels.codec import dequantize, quantize_m, quantize_v
from sharpscope.kernels.codec_tables import DE_THRESHOLDS
from sharpscope.kernels.torchao_layout import from_torchao, to_torchao

NUMBERS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


@pytest.fixture
def ao():
    """torchao's module of four-bit states."""
    return pytest.importorskip("torchao.optim.subclass_4bit", reason="torchao is not installed; pip install torchao")


@pytest.fixture
def single_param_adam(ao):
    """Its step, without the compiler around it."""
    return importlib.import_module("torchao.optim.adam").single_param_adam


def theirs(ao, x, *, signed):
    state = ao.OptimState4bit.zeros(x.shape, signed=signed)
    state.copy_(x)
    return state


def nibbles(codes):
    return torch.stack([codes & 15, codes >> 4], dim=1).view(-1)


@pytest.mark.parametrize(("signed", "map"), [(True, "de"), (False, "linear")])
def test_codes_agree_but_at_ties(ao, signed, map):
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.square()
    state = theirs(ao, x, signed=signed)
    ours = quantize_m(x) if signed else quantize_v(x, scale="block128")
    codes, scale, _ = to_torchao(ours)
    assert torch.equal(scale, state.scale)
    differ = (nibbles(codes) != nibbles(state.codes)).view(-1, 2).flip(1).reshape(-1)  # the first is the high one
    y = (x.view(-1, 128) / scale[:, None]).view(-1).numpy()
    ties = DE_THRESHOLDS if signed else (np.arange(1, 16, dtype=np.float32) + 0.5) / 16
    near = np.abs(y[:, None] - ties).min(axis=1) < 1e-6
    assert not (differ.numpy() & ~near).any()
    assert near.sum() < 20


def test_at_ties_they_go_up_and_we_go_down_or_to_even(ao):
    x = torch.zeros(128)
    x[:4] = torch.tensor([1.0, 2.5 / 16, 3.5 / 16, 0.0])
    ours, up = to_torchao(quantize_v(x, scale="block128"))[0], theirs(ao, x, signed=False).codes
    assert [int(ours[0]) & 15, int(ours[1]) >> 4] == [1, 3]  # 2/16 and 4/16
    assert [int(up[0]) & 15, int(up[1]) >> 4] == [2, 3]  # 3/16 and 4/16


@pytest.mark.parametrize(("signed", "map"), [(True, "de"), (False, "linear")])
def test_a_payload_goes_there_and_back(ao, signed, map):
    x = torch.randn(6, 64, 2, generator=torch.Generator().manual_seed(1))
    ours = quantize_m(x) if signed else quantize_v(x.square(), scale="block128")
    codes, scale, table = to_torchao(ours)
    assert torch.equal(ao.OptimState4bit(codes, scale, table, signed, x.shape).dequantize(), dequantize(ours))
    back = from_torchao(codes, scale, x.shape, map)
    assert (back.shape, back.map, back.scale, int(back.bad)) == (x.shape, map, "block128", 0)
    assert torch.equal(back.codes, ours.codes)
    assert torch.equal(back.scales[0], ours.scales[0])
    codes.zero_()
    assert not torch.equal(codes, back.codes)  # a copy


def test_their_state_decodes_here_as_it_does_there(ao):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2))
    for signed, map, values in ((True, "de", x), (False, "linear", x.square())):
        state = theirs(ao, values, signed=signed)
        ours = dequantize(from_torchao(state.codes, state.scale, state.shape, map))
        assert torch.allclose(ours, state.dequantize(), rtol=2e-7, atol=0)  # a unit in the last place of the table


def test_a_step_is_theirs(single_param_adam, ao):
    """Parameters agree to 1e-6 at every step that begins from one and the same state."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(64, 128, generator=generator)
    state = adamw4_state(p, scale="block128")
    for step in range(1, 6):
        g, their_p = torch.randn(p.shape, generator=generator), p.clone()
        m, v = (
            ao.OptimState4bit(*to_torchao(moment), signed, p.shape)
            for moment, signed in ((state.m, True), (state.v, False))
        )
        betas, wd, eps = NUMBERS["betas"], NUMBERS["weight_decay"], NUMBERS["eps"]
        lr, count = torch.tensor(NUMBERS["lr"]), torch.tensor(float(step))
        single_param_adam(their_p, g, count, m, v, None, lr, *betas, wd, eps, True, False)
        adamw4_step([p], [g], [state], **NUMBERS, step=step)
        assert np.allclose(p, their_p, rtol=1e-6, atol=1e-8)
        for moment, their in ((state.m, m), (state.v, v)):
            assert torch.allclose(moment.scales[0], their.scale, rtol=1e-6, atol=0)
            assert float((nibbles(to_torchao(moment)[0]) != nibbles(their.codes)).float().mean()) < 1e-3


def update_error(g, v, coded):
    exact, found = g / (v.sqrt() + 1e-8), g / (coded.sqrt() + 1e-8)
    return float((found - exact).norm() / exact.norm())


def test_small_gradients_are_lost_there_and_not_here(ao):
    """Their scales are at least 1e-12; the gradients here are of size 1e-3, and 1e-4 times that."""
    history = torch.randn(20, 64, 128, generator=torch.Generator().manual_seed(4)) * 1e-3
    ours, lost = [], []
    for factor in (1.0, 1e-4):
        g = history * factor
        v = g.square().mean(0)
        ours.append(update_error(g[0], v, dequantize(quantize_v(v, scale="block128"))))
        lost.append(update_error(g[0], v, theirs(ao, v, signed=False).dequantize()))
    assert ours[1] == pytest.approx(ours[0], rel=0.2)  # ε is a tenth of √v there
    assert lost[0] == pytest.approx(ours[0], rel=1e-3)
    assert lost[1] > 0.5 > 10 * ours[1]


def test_zeros_stay_zeros_here_and_not_there(ao):
    zeros = torch.zeros(128)
    assert not dequantize(quantize_v(zeros, scale="block128")).any()
    assert (theirs(ao, zeros, signed=False).dequantize() > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_torchao(quantize_v(torch.ones(128), map="square")), "`map` is 'square'; torchao has"),
        (lambda: to_torchao(quantize_v(torch.ones(4, 64))), "rank1 scales; torchao has scales of blocks only"),
        (lambda: to_torchao(quantize_m(torch.ones(130))), r"\[130\] has 130 entries; torchao needs a multiple of 128"),
        (lambda: from_torchao(torch.zeros(64, dtype=torch.uint8), torch.ones(1), [127], "de"), "multiple of 128"),
        (lambda: from_torchao(torch.zeros(64, dtype=torch.uint8), torch.ones(1), [0], "de"), "multiple of 128"),
        (lambda: from_torchao(torch.zeros(64, dtype=torch.uint8), torch.ones(1), [128], "square"), "`map` is 'square'"),
        (
            lambda: from_torchao(torch.zeros(63, dtype=torch.uint8), torch.ones(1), [128], "de"),
            r"`codes` is torch.uint8 \[63\]; shape \[128\] in blocks of 128 needs torch.uint8 \[64\]",
        ),
        (lambda: from_torchao(torch.zeros(64), torch.ones(1), [128], "de"), r"`codes` is torch.float32"),
        (lambda: from_torchao(torch.zeros(64, dtype=torch.uint8), torch.ones(2), [128], "de"), r"`scale` is .* \[2\]"),
    ],
)
def test_what_torchao_cannot_hold_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
