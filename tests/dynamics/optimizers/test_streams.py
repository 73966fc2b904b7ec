"""Random streams of steps: known answers, reproducible, unrelated to each other."""

import itertools

import torch
from sharpscope.dynamics.optimizers.streams import MASK, _mixed, generator, tensor_numbers


def draws(*key, n=4):
    return torch.randn(n, generator=generator(*key, "cpu"), dtype=torch.float64)


def test_the_mixing_is_that_of_splitmix64():
    # The published first outputs of SplitMix64 from the states 0 and 1234567.
    golden = 0x9E3779B97F4A7C15
    assert _mixed(golden) == 0xE220A8397B1DCDAF
    assert [_mixed((1234567 + i * golden) & MASK) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]


def test_a_stream_depends_on_its_three_integers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = draws(3, 1, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(draws(3, 1, 7), first)
    for other in itertools.permutations((1, 3, 7)):
        assert torch.equal(draws(*other), first) == (other == (3, 1, 7))
    assert not torch.equal(draws(3, -1, 7), first)
    assert torch.equal(draws(3 + 2**64, 1, 7), first)
    assert generator(0, 0, 0, "cpu").initial_seed() != 0  # the mixing alone leaves 0 where it is


def test_neighbouring_streams_are_unrelated():
    grid = [draws(seed, tensor, step, n=2) for seed in range(10) for tensor in range(10) for step in range(30)]
    numbers = torch.stack(grid).reshape(10, 10, 30, 2)
    assert len(set(numbers.reshape(-1).tolist())) == numbers.numel()
    for axis in range(3):
        first, second = (
            numbers.narrow(axis, 0, numbers.shape[axis] - 1),
            numbers.narrow(axis, 1, numbers.shape[axis] - 1),
        )
        products = (first * second).reshape(-1)
        assert abs(float(products.mean())) < 4 / len(products) ** 0.5
    assert abs(float(numbers.mean())) < 4 / numbers.numel() ** 0.5


def test_parameters_are_numbered_through_all_groups():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [b]}, {"params": [a]}], lr=0.1)
    assert tensor_numbers(optimizer) == {b: 0, a: 1}
    optimizer.add_param_group({"params": [c]})
    assert tensor_numbers(optimizer) == {b: 0, a: 1, c: 2}
