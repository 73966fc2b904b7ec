import pytest
import torch
from sharpscope.dynamics.data_order import DataOrder


def test_each_epoch_is_a_permutation_of_its_own():
    order = DataOrder(10, 4, seed=0)
    steps = [order.at(step).tolist() for step in range(6)]
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for step in epoch for i in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_it_depends_on_seed_and_step_only():
    whole = [DataOrder(50, 8, seed=3).at(step) for step in range(20)]
    later = DataOrder(50, 8, seed=3)
    assert all(torch.equal(later.at(step), whole[step]) for step in (19, 3, 11))
    assert not torch.equal(DataOrder(50, 8, seed=4).at(0), whole[0])
    # Epoch 1 of seed 3 is not epoch 0 of seed 4, nor any of their neighbours.
    first = {tuple(DataOrder(50, 50 - 1, seed=seed).at(2 * epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(first) == 25


def test_a_full_batch_keeps_the_order_of_the_examples():
    assert DataOrder(7, None, seed=0).at(3) is None
    assert DataOrder(7, 7, seed=0).at(3) is None


@pytest.mark.parametrize("size", [0, -1, 8])
def test_a_batch_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=f"`batch_size` is {size}; there are 7 examples"):
        DataOrder(7, size, seed=0)
