"""Peak memory of tensors, counted on storages."""

import torch
from sharpscope.landscape.peak_memory import peak_bytes

CPU = torch.device("cpu")
MB = 1 << 20


def floats(megabytes):
    return torch.zeros(megabytes * MB // 4)


def test_what_dies_before_the_peak_is_not_in_it():
    def run():
        floats(8)
        floats(4)

    assert peak_bytes(run, CPU).peak == 8 * MB
    assert peak_bytes(run, CPU).kept == 0


def test_what_lives_together_adds_up():
    def run():
        a = floats(3)
        b = floats(5)
        return a[:1] + b[:1]

    assert 8 * MB <= peak_bytes(run, CPU).peak <= 8 * MB + 1024


def test_views_and_in_place_operations_take_nothing():
    x = floats(4)

    def run():
        return x.view(2, -1).t().add_(1.0)

    assert peak_bytes(run, CPU).peak == 0


def test_kept_is_what_outlives_the_run():
    keep = []
    measured = peak_bytes(lambda: keep.append(floats(2) + 1), CPU)
    assert measured.kept == 2 * MB
    assert measured.peak == 4 * MB


def test_graphs_of_autograd_are_counted():
    x = floats(1).requires_grad_()
    keep = []
    # exp saves its result.
    measured = peak_bytes(lambda: keep.append(x.exp().sum()), CPU)
    assert MB <= measured.kept <= MB + 1024
