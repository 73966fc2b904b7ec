"""Bytes are counted, and losses of encoding compared with a computation by hand."""

import math

import pytest
import torch
from sharpscope.dynamics.optimizer_measurements import CodecError, OptimizerStateBytes, nibbles
from sharpscope.dynamics.optimizers.adamw4bit import AdamW4bit
from sharpscope.dynamics.optimizers.combined import CombinedOptimizer
from sharpscope.dynamics.optimizers.moment_codecs import Uncompressed
from sharpscope.dynamics.point import Measurement, Point
from sharpscope.kernels import dequantize, quantize_m, quantize_v
from sharpscope.landscape.objective import Objective
from torch import nn


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    data = (torch.randn(50, 20), torch.randint(0, 3, (50,)))
    return model, Objective.supervised(model, nn.functional.cross_entropy, data)


def trained(model, objective, optimizer, steps=4):
    for _ in range(steps):
        gradients = objective.unflatten(objective.gradient())
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.step()
    return Point(steps, objective, optimizer)


def rows(measurement, point):
    assert isinstance(measurement, Measurement)
    return {(row.quantity, row.block): row.value for row in measurement.measure(point)}


def test_bytes_are_those_of_the_states_tensors(case):
    model, objective = case
    n = sum(p.numel() for p in model.parameters())
    found = rows(OptimizerStateBytes(), trained(model, objective, torch.optim.AdamW(model.parameters())))
    assert found["optimizer_state_bytes", ""] == 8 * n + 4 * 4  # a count for each tensor
    assert found["optimizer_state_bytes_per_parameter", ""] == pytest.approx((8 * n + 16) / n)
    sgd = rows(OptimizerStateBytes(), trained(model, objective, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert sgd["optimizer_state_bytes", ""] == 0
    assert rows(OptimizerStateBytes(), Point(0, objective)) == {}


def test_bytes_of_combined_optimizers_add_up(case):
    model, objective = case
    parts = [torch.optim.AdamW(model[0].parameters()), AdamW4bit(model[2].parameters(), min_size=0)]
    found = rows(OptimizerStateBytes(), trained(model, objective, CombinedOptimizer(parts)))
    assert found["optimizer_state_bytes", ""] == (8 * 630 + 8) + (2 * 45 + 2 * 4 + 12) + (2 * 2 + 2 * 4 + 12)


def test_what_encoding_loses_is_that_of_the_next_moments(case):
    model, objective = case
    optimizer = AdamW4bit(model.parameters(), v="block", min_size=0)
    point = trained(model, objective, optimizer)
    found = rows(CodecError(), point)
    p, g = model[0].weight, objective.unflatten(objective.gradient())["0.weight"]
    m, v = optimizer.moments(p)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    coarse_m, packed = dequantize(quantize_m(m)), quantize_v(v, scale="block128")
    coarse_v = dequantize(packed)

    def step(m, v):
        return (m / ((v / (1 - 0.999**5)).sqrt() + 1e-8)).reshape(-1).double()

    cosine = nn.functional.cosine_similarity(step(m, v), step(coarse_m, coarse_v), dim=0)
    codes, before = nibbles(packed.codes, 600), nibbles(optimizer.state[p]["v_codes"], 600)
    expected = {
        "codec_error_m": (coarse_m - m).norm() / m.norm(),
        "codec_error_v": (coarse_v - v).norm() / v.norm(),
        "codec_error_update": 1 - cosine,
        "codec_error_lowest": (codes == 0).float().mean(),
        "codec_error_changed": (codes != before).float().mean(),
    }
    assert {quantity for quantity, _ in found} == set(expected)
    assert {block for _, block in found} == set(objective.parameters)
    for quantity, value in expected.items():
        assert found[quantity, "0.weight"] == pytest.approx(float(value), rel=1e-4, abs=1e-7), quantity
    assert found["codec_error_lowest", "0.weight"] > 0


def test_measuring_changes_nothing(case):
    model, objective = case
    optimizer = AdamW4bit(model.parameters(), min_size=0, rounding="stochastic")
    point = trained(model, objective, optimizer)
    before = [{key: x.clone() for key, x in optimizer.state[p].items()} for p in model.parameters()]
    rows(CodecError(), point)
    for p, kept in zip(model.parameters(), before, strict=True):
        assert all(torch.equal(kept[key], x) for key, x in optimizer.state[p].items())


def test_before_the_first_step_there_is_an_error_and_no_change(case):
    model, objective = case
    found = rows(CodecError(), Point(0, objective, AdamW4bit(model.parameters(), min_size=0)))
    assert {quantity for quantity, _ in found} == {
        "codec_error_m",
        "codec_error_v",
        "codec_error_update",
        "codec_error_lowest",
    }
    assert all(math.isfinite(value) for value in found.values())


def test_only_what_is_compressed_has_rows(case):
    model, objective = case
    assert rows(CodecError(), Point(0, objective)) == {}
    assert rows(CodecError(), Point(0, objective, torch.optim.AdamW(model.parameters()))) == {}
    assert rows(CodecError(), Point(0, objective, AdamW4bit(model.parameters()))) == {}  # all tensors are small
    exact = AdamW4bit(model.parameters(), min_size=0, codec=Uncompressed())
    assert rows(CodecError(), Point(0, objective, exact)) == {}
    partly = CombinedOptimizer(
        [torch.optim.SGD(model[0].parameters(), lr=0.1), AdamW4bit(model[2].parameters(), min_size=0)]
    )
    blocks = {block for _, block in rows(CodecError(), Point(0, objective, partly))}
    assert blocks == {"2.weight", "2.bias"}


def test_factored_moments_lose_what_is_not_of_rank_one(case):
    model, objective = case
    optimizer = AdamW4bit(model.parameters(), v="factor", min_size=0)
    found = rows(CodecError(), trained(model, objective, optimizer))
    # The step divides by what is kept, so that its moment is encoded without loss.
    assert found["codec_error_v", "0.weight"] < 1e-6
    assert ("codec_error_changed", "0.weight") not in found
    assert 0 < found["codec_error_m", "0.weight"] < 0.5


def test_codes_are_unpacked_the_earlier_in_the_low_nibble():
    assert nibbles(torch.tensor([0x21, 0x43], dtype=torch.uint8), 3).tolist() == [1, 2, 3]
