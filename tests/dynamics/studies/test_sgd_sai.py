"""The study of SGD-SaI: its cheap parts."""

import pytest
from sharpscope.dynamics.studies.sgd_sai import correlation, grid_accuracies, identities, over_training, sizes


def test_it_is_torchs_sgd_and_the_package():
    found = identities(50)
    assert found["SGD"] <= 1e-12
    if found["package"] is not None:
        assert found["package"] <= 1e-12


def test_g_is_the_square_root_of_the_size_at_the_start():
    found = sizes([0])
    assert len(found) == 13
    assert all(0.95 <= x <= 1.2 for line in found.values() for x in line)


def test_g_over_training_is_explained_by_size():
    found = over_training(3e-3, 3)
    roots = [size**0.5 for size in found["size"]]
    assert correlation(found["before"], found["after"]) >= 0.95
    assert correlation(roots, found["after"]) >= 0.95


def test_the_grid_has_a_row_for_each_learning_rate():
    grid = grid_accuracies("SGD", [0], 3)
    assert [len(line) for line in grid] == [4, 4, 4, 4]
    assert all(0 <= x <= 100 for line in grid for x in line)
    assert grid_accuracies("SGDSaI", [0], 3) != grid


def test_correlation_is_that_of_logarithms():
    assert correlation([1.0, 2.0, 4.0], [1.0, 4.0, 16.0]) == pytest.approx(1.0)
