"""The threshold is where a scalar quadratic starts to diverge."""

import math

import pytest
import torch
from sharpscope.dynamics.optimizers.combined import CombinedOptimizer
from sharpscope.dynamics.optimizers.thresholds import sharpness_threshold_of, stability_threshold_of

SGD = torch.optim.SGD

RULES = {
    "gradient descent": {"lr": 0.1},
    "heavy ball": {"lr": 0.05, "momentum": 0.9},
    "heavy ball with dampening": {"lr": 0.05, "momentum": 0.9, "dampening": 0.9},
    "heavy ball, negative dampening": {"lr": 0.05, "momentum": 0.5, "dampening": -0.3},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "weight decay": {"lr": 0.1, "weight_decay": 3.0},
    "heavy ball with weight decay": {"lr": 0.05, "momentum": 0.8, "weight_decay": 5.0},
    "nesterov with weight decay": {"lr": 0.05, "momentum": 0.7, "nesterov": True, "weight_decay": 5.0},
    "ignored dampening": {"lr": 0.1, "dampening": 0.5},
    "tensor lr": {"lr": torch.tensor(0.1), "momentum": 0.9, "foreach": False},
}


def growth(curvature: float, options: dict) -> float:
    """|x| after 4000 steps on curvature·x²/2 from x = 1, as the mean growth of log|x| over the second half."""
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([x], **options)
    largest = []
    for start in (0, 2000):
        peak = 0.0
        for _ in range(start, start + 2000):
            x.grad = curvature * x.detach()
            optimizer.step()
            peak = max(peak, abs(float(x.detach())))
            if peak > 1e100:
                return math.inf
        largest.append(peak)
    return math.log(max(largest[1], 1e-300) / max(largest[0], 1e-300))


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
def test_divergence_sets_in_at_the_threshold(options):
    x = torch.ones(1, requires_grad=True)
    threshold = stability_threshold_of(SGD([x], **options))
    assert threshold is not None
    assert growth(0.99 * threshold, options) < 0
    assert growth(1.01 * threshold, options) > 0


def test_schedule_is_read_at_each_step():
    x = torch.ones(1, requires_grad=True)
    optimizer = SGD([x], lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    seen = []
    for _ in range(3):
        seen.append(stability_threshold_of(optimizer))
        optimizer.step()
        scheduler.step()
    assert seen == [5.0, 10.0, 20.0]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "maximize": True},
        {"lr": 0.0},
        {"lr": 0.1, "momentum": 1.0},
        {"lr": 0.1, "momentum": 0.9, "dampening": 1.0},
    ],
)
def test_no_threshold_exists(options):
    assert stability_threshold_of(SGD([torch.ones(1, requires_grad=True)], **options)) is None


def test_groups_must_agree():
    first, second = (torch.ones(1, requires_grad=True) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second]}]
    assert stability_threshold_of(SGD(groups, lr=0.5)) == 4.0
    groups = [{"params": [first]}, {"params": [second], "lr": 0.1}]
    assert stability_threshold_of(SGD(groups, lr=0.5)) is None


def test_other_rules_answer_for_themselves_or_not_at_all():
    x = torch.ones(1, requires_grad=True)

    class Halved(SGD):
        def step(self, closure=None):
            raise NotImplementedError

    class Told(Halved):
        def stability_threshold(self):
            return 7.0

    assert stability_threshold_of(Halved([x], lr=0.1)) is None
    assert stability_threshold_of(Told([x], lr=0.1)) == 7.0
    assert sharpness_threshold_of(Told([x], lr=0.1)) == 7.0


def test_adaptive_rules_have_theirs_in_their_own_geometry():
    x = torch.ones(1, requires_grad=True)
    adamw = torch.optim.AdamW([x], lr=0.1, weight_decay=0.0)
    assert stability_threshold_of(adamw) == pytest.approx(380.0)
    assert sharpness_threshold_of(adamw) is None
    decayed = torch.optim.AdamW([x], lr=0.1, weight_decay=5.0)
    assert stability_threshold_of(decayed) == pytest.approx(380.0 * 0.75)
    assert stability_threshold_of(torch.optim.RMSprop([x], lr=0.1, momentum=0.5)) == pytest.approx(30.0)
    assert stability_threshold_of(torch.optim.Rprop([x])) is None
    assert stability_threshold_of(torch.optim.LBFGS([x])) is None


def test_combined_rules_must_agree():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    pair = CombinedOptimizer([SGD([x], lr=0.1), torch.optim.RMSprop([y], lr=0.1)])
    assert stability_threshold_of(pair) == 20.0
    assert sharpness_threshold_of(pair) is None
    pair.optimizers[1].param_groups[0]["lr"] = 0.2
    assert stability_threshold_of(pair) is None
