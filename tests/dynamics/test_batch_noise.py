"""The noise scale from parts of batches: unbiased step by step, and the one of single examples in the end."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from sharpscope import Objective, per_example_statistics
from sharpscope.dynamics.batch_noise import BatchNoise
from sharpscope.landscape.intervals import ratio_interval, student_quantile
from torch import nn


def squares_of(rows, sizes):
    """‖G_j‖² of consecutive parts, and ‖G‖²."""
    parts = rows.split(list(sizes))
    return [float(part.mean(dim=0).square().sum()) for part in parts], float(rows.mean(dim=0).square().sum())


def per_example(rows):
    """tr Σ and |G|² of a data set, both without bias."""
    trace = float(rows.var(dim=0).sum())
    return trace, float(rows.mean(dim=0).square().sum()) - trace / len(rows)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 2)])
def test_a_step_is_unbiased(sizes):
    """Over all ordered draws without replacement the mean is exactly what the examples give."""
    torch.manual_seed(0)
    rows = torch.randn(5, 3, dtype=torch.float64) + 0.4
    found = []
    for drawn in itertools.permutations(range(5), sum(sizes)):
        squares, whole = squares_of(rows[list(drawn)], sizes)
        found.append(BatchNoise().add(squares, sizes, whole))
    assert torch.tensor(found).double().mean(dim=0).tolist() == pytest.approx(per_example(rows), rel=1e-6)


def test_equal_parts_are_the_equations_of_the_paper():
    """|G|² = (B_big |G_big|² − B_small |G_small|²) / (B_big − B_small), S likewise."""
    small, big, b, B = 5.0, 2.0, 4, 16
    trace, squared_norm = BatchNoise().add([small + 1, small - 1, small, small], [b] * 4, big)
    assert squared_norm == pytest.approx((B * big - b * small) / (B - b))
    assert trace == pytest.approx((small - big) / (1 / b - 1 / B))


def in_epochs(rows, seed, *, epochs, parts=4, size=8):
    """Batches of `parts` micro-batches, every example once in an epoch, as a data loader draws them."""
    noise, random = BatchNoise(), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in rows[torch.randperm(len(rows), generator=random)].split(parts * size):
            squares, whole = squares_of(batch, [size] * parts)
            noise.add(squares, [size] * parts, whole)
    return noise.noise_scale()


def test_the_interval_holds_the_noise_scale_of_the_examples():
    """A network and a data set for each seed."""
    covered, limited = 0, 0
    for seed in range(100):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        data = torch.randn(256, 4, dtype=torch.float64), torch.randint(0, 3, (256,))
        statistics = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data))
        found = in_epochs(statistics.gradients, seed, epochs=20)
        covered += found.low <= statistics.noise_scale().estimate <= found.high
        limited += found.high < 10 * found.low
    assert covered >= 95
    assert limited >= 80  # by intervals that say something


def test_interval_and_error_are_those_of_the_means_over_steps():
    torch.manual_seed(1)
    noise, steps = BatchNoise(confidence=0.9), []
    for _ in range(12):
        squares, whole = squares_of(torch.randn(8, 6, dtype=torch.float64) + 1, (3, 5))
        steps.append(noise.add(squares, (3, 5), whole))
    found, table = noise.noise_scale(), torch.tensor(steps, dtype=torch.float64)
    trace, squared_norm = table.mean(dim=0).tolist()
    ((tt, tg), (_, gg)) = (table.T.cov() / 12).tolist()
    assert (found.trace, found.squared_norm) == pytest.approx((trace, squared_norm))
    assert found.estimate == pytest.approx(trace / squared_norm)
    expected = ratio_interval(trace, squared_norm, tt, gg, tg, student_quantile(11, 0.9))
    assert (found.low, found.high) == pytest.approx(expected)
    slope = torch.tensor([1 / squared_norm, -trace / squared_norm**2], dtype=torch.float64)
    assert found.stderr == pytest.approx(float(slope @ (table.T.cov() / 12) @ slope) ** 0.5)
    assert found.confidence == 0.9


def test_decay_weighs_the_steps():
    noise, given = BatchNoise(decay=0.8), [(4.0, 1.0), (5.0, 2.0), (3.0, 1.5)]
    steps = [noise.add([square, square], [2, 2], whole) for square, whole in given]
    weights = [0.64, 0.8, 1.0]
    expected = sum(w * trace for w, (trace, _) in zip(weights, steps, strict=True)) / sum(weights)
    assert noise.noise_scale().trace == pytest.approx(expected)
    assert noise.steps == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights))


def test_no_positive_squared_norm_has_no_upper_limit():
    noise = BatchNoise()
    for whole in (1.0, 1.1):
        noise.add([4.0, 4.2], [1, 1], whole)
    found = noise.noise_scale()
    assert found.squared_norm < 0
    assert (found.estimate, found.high) == (math.inf, math.inf)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.extra = nn.Parameter(torch.ones(2))  # has no gradient
    return model, torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)


def gradients(model, x, y):
    return torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters())[1:])


def pieces(x, y):
    return zip(x.split(3), y.split(3), strict=True)


def gradients_now(model, x, y):
    used = [p for name, p in model.named_parameters() if name not in ("extra", "sometimes")]
    return torch.autograd.grad(nn.functional.mse_loss(model(x), y), used)


def expected_step(cuts):
    model, x, y = make()
    squares = [
        sum(float(g.square().sum()) for g in gradients(model, *part))
        for part in zip(x.split(cuts), y.split(cuts), strict=True)
    ]
    return BatchNoise().add(squares, cuts, sum(float(g.square().sum()) for g in gradients(model, x, y)))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_accumulated_micro_batches(scale):
    model, x, y = make()
    noise, cuts = BatchNoise(), [2, 3, 4]
    for _ in range(2):
        model.zero_grad()
        for part, target in zip(x.split(cuts), y.split(cuts), strict=True):
            factor = scale * len(part) / 9
            (nn.functional.mse_loss(model(part), target) * factor).backward()
            noise.micro_batch(model.parameters(), len(part), factor=factor)
        assert noise.step() == pytest.approx(expected_step(cuts), rel=1e-9)
    assert noise.steps == 2


def test_a_parameter_that_only_one_micro_batch_uses():
    """Its gradient is 0 in the others, whichever comes first."""
    for order in ([0, 1], [1, 0]):
        a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
        noise = BatchNoise()
        for k in order:
            ((k + 1) * (a, b)[k].sum() * 0.5).backward()
            noise.micro_batch([a, b], 2, factor=0.5)
        # (1, 1, 0, 0) and (0, 0, 2, 2), with the mean (1/2, 1/2, 1, 1).
        assert noise.step() == pytest.approx(BatchNoise().add([2.0, 8.0], [2, 2], 2.5))


@pytest.mark.parametrize("clear", [True, False])
def test_gradients_left_from_the_batch_before_are_refused(clear):
    model, x, y = make()
    model.sometimes = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer, noise = torch.optim.SGD(model.parameters(), lr=0.1), BatchNoise()

    def batch(used):
        for part, target in zip(x.split(3), y.split(3), strict=True):
            (nn.functional.mse_loss(model(part) * (model.sometimes if used else 1.0), target) / 3).backward()
            noise.micro_batch(model.parameters(), 3, factor=1 / 3)
        found = noise.step()
        optimizer.step()
        return found

    for used in (True, False, True, False):
        batch(used)
        optimizer.zero_grad(set_to_none=clear)
    fresh = [torch.cat([g.reshape(-1) for g in gradients_now(model, *part)]) for part in pieces(x, y)]
    expected = BatchNoise().add([float(g @ g) for g in fresh], [3] * 3, float((sum(fresh) / 3).square().sum()))
    assert batch(False) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="zero_grad"):
        batch(False)
    optimizer.zero_grad(set_to_none=clear)
    assert batch(True) is not None


def test_gradients_in_buckets_that_are_overwritten_are_not_left_over():
    """As with `gradient_as_bucket_view=True` and one parameter."""
    p, bucket, noise = nn.Parameter(torch.zeros(2)), torch.zeros(2), BatchNoise()
    view = bucket.view(2)
    for _ in range(2):
        for first in (True, False):
            bucket.copy_(torch.full((2,), 0.5)) if first else bucket.add_(1.0)
            p.grad = view
            noise.micro_batch([p], 2, factor=0.5)
        assert noise.step() == pytest.approx(BatchNoise().add([2.0, 8.0], [2, 2], 4.5))


def test_gradients_dropped_within_a_batch_are_refused():
    model, x, y = make()
    noise = BatchNoise()
    nn.functional.mse_loss(model(x), y).backward()
    noise.micro_batch(model.parameters(), 4, factor=0.5)
    model.zero_grad()
    with pytest.raises(ValueError, match="has lost its gradient"):
        noise.micro_batch(model.parameters(), 4, factor=0.5)


def test_a_batch_in_one_piece_tells_nothing():
    model, x, y = make()
    noise = BatchNoise()
    nn.functional.mse_loss(model(x), y).backward()
    noise.micro_batch(model.parameters(), 9, factor=1.0)
    assert noise.step() is None
    assert noise.steps == 0


def test_it_resumes():
    one, other = BatchNoise(decay=0.9), BatchNoise(decay=0.9)
    for whole in (1.0, 2.0, 1.5):
        one.add([4.0, 5.0], [2, 2], whole)
    other.load_state_dict(one.state_dict())
    for noise in (one, other):
        noise.add([6.0, 5.0], [2, 2], 3.0)
    assert one.noise_scale() == other.noise_scale()
    with pytest.raises(ValueError, match="keys"):
        other.load_state_dict({"weight": 1.0})


def test_refusals():
    model, x, y = make()
    noise = BatchNoise()
    for options, message in (({"decay": 1.1}, "decay"), ({"confidence": 95}, "confidence")):
        with pytest.raises(ValueError, match=message):
            BatchNoise(**options)
    with pytest.raises(ValueError, match="two parts"):
        noise.add([1.0], [4], 1.0)
    with pytest.raises(ValueError, match="have examples"):
        noise.add([1.0, 1.0], [4, 0], 1.0)
    with pytest.raises(ValueError, match="not finite"):
        noise.add([1.0, math.inf], [4, 4], 1.0)
    with pytest.raises(ValueError, match="two steps"):
        noise.noise_scale()
    with pytest.raises(ValueError, match="positive"):
        noise.micro_batch(model.parameters(), 0, factor=1.0)
    nn.functional.mse_loss(model(x), y).backward()
    noise.micro_batch(model.parameters(), 4, factor=0.5)
    with pytest.raises(ValueError, match="by their examples"):
        noise.micro_batch(model.parameters(), 5, factor=0.5)
    with pytest.raises(ValueError, match="same parameters"):
        noise.micro_batch([model[0].weight], 4, factor=0.5)


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y = make()
    cuts = [4, 5]
    nn.functional.mse_loss(model(x.split(cuts)[rank]), y.split(cuts)[rank]).backward()
    own = [p.grad for p in model.parameters()]
    before = [g.clone() for g in own if g is not None]
    noise = BatchNoise()
    made = noise.rank(own, cuts[rank])
    whole = [None, *gradients(model, x, y)]
    known = noise.rank(own, cuts[rank], averaged=whole)
    after = [g for g in own if g is not None]
    assert all(torch.equal(g, b) for g, b in zip(after, before, strict=True))
    torch.save([made, known], f"{folder}/{rank}.pt")
    some_without_gradients(rank)
    refused_on_all_ranks(rank)
    dist.destroy_process_group()


def some_without_gradients(rank):
    """None stands for zeros of whatever size and type the other rank has."""
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        first, second = torch.full((2, 3), 1.0, dtype=kind), torch.full((4,), 3.0, dtype=kind)
        for own in (
            [[first, None, None], [None, None, second]],
            [[first, None, None], [first, None, second]],
            [[None, None, None], [first, None, second]],
        ):
            rows = [
                torch.cat(
                    [
                        torch.zeros(n) if g is None else g.float().reshape(-1)
                        for g, n in zip(one, (6, 1, 4), strict=True)
                    ]
                )
                for one in own
            ]
            whole = rows[0] / 4 + rows[1] * 0.75
            expected = BatchNoise().add([float(r @ r) for r in rows], [2, 6], float(whole @ whole))
            assert BatchNoise().rank(own[rank], [2, 6][rank]) == pytest.approx(expected, rel=1e-6)
            found = BatchNoise().rank(own[rank], [2, 6][rank], averaged=[None, whole])
            assert found == pytest.approx(expected, rel=1e-6)


def refused_on_all_ranks(rank):
    g, h = torch.ones(3), torch.ones(4)
    for own, sizes, averaged, match in (
        ([[g, h], [g]], [2, 2], [None, None], r"\[2, 1\] entries"),
        ([[g, h], [h, g]], [2, 2], [None, None], "number 0 has entries 3 on one and 4"),
        ([[g], [g.double()]], [2, 2], [None, None], "bytes per entry 4 on one and 8"),
        ([[g], [g]], [2, 0], [None, None], "must have examples"),
        ([[g], [g]], [2, 2], [[g], None], "`averaged` is None on some"),
        ([[g * math.nan], [g]], [2, 2], [None, None], "not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            BatchNoise().rank(own[rank], sizes[rank], averaged=averaged[rank])
    assert BatchNoise().rank([g], 2) == pytest.approx((0.0, 3.0))


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in")
def test_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True, cwd="/"
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert tuple(found) == pytest.approx(expected_step([4, 5]), rel=1e-9)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
