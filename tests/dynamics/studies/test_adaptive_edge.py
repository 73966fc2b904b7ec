"""The study's parts on short runs; the whole of it takes minutes."""

import pytest
from sharpscope.dynamics.studies.adaptive_edge import RUNS, STUDY, ends, investigate, trained


def test_ends_of_a_run():
    assert ends([0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 1.1]) == (0.5, 1.0, 0.5, 2.0)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_run_starts_below_the_edge(name, seed):
    settings = {**RUNS[name], "steps": 8}
    run = trained(**settings, num_examples=500, seed=seed)
    assert run["step"] == list(range(9))
    assert run["ratio"][0] < 0.6
    assert run["loss"][-1] < run["loss"][0]
    assert run["converged"] == 9


def test_gradient_descent_reaches_the_edge():
    run = trained("SGD", {"lr": 0.3}, steps=1000, num_examples=100, seed=0)
    start, last, *_ = ends(run["ratio"])
    assert start < 0.6
    assert 0.8 <= last <= 1.3


def test_adam_reaches_the_edge():
    run = trained("Adam", {"lr": 1e-3, "betas": [0.9, 0.99]}, steps=500, num_examples=100, seed=0)
    _, last, smallest, _ = ends(run["ratio"])
    assert smallest < 0.6
    assert 0.8 <= last <= 1.3


class Kept:
    """A laboratory that returns what it is told."""

    quick = True

    def __init__(self, ratio):
        self.ratio = ratio

    def part(self, name, compute, **settings):
        return {"step": list(range(len(self.ratio))), "ratio": self.ratio, "loss": [0.0] * len(self.ratio)}


@pytest.mark.parametrize(
    ("ratio", "holds"),
    [
        ([0.5] * 8 + [1.0, 1.1], True),
        ([0.7] * 8 + [1.0, 1.1], False),
        ([0.5] * 8 + [0.7, 0.8], False),
        ([0.5] * 8 + [1.4, 1.3], False),
        ([0.5] * 8 + [1.0, float("nan")], False),
    ],
)
def test_a_claim_is_judged_by_both_ends(ratio, holds):
    claims, panels = investigate(Kept(ratio))
    assert [claim.holds for claim in claims] == [holds] * 5
    assert len(panels) == 5
    assert all(panel.levels == {"edge": 1.0} for panel in panels)
    assert STUDY.name == "adaptive-edge"
