import pytest
import torch
from sharpscope.dynamics.doctor import doctor
from sharpscope.landscape.objective import Objective
from torch import nn

CHECKS = [
    "loss", "gradient", "side effects", "symmetry", "engine double-backward", "engine forward-over-reverse",
    "engine finite-difference", "dense block", "unused parameters", "tied parameters", "frozen parameters",
]  # fmt: skip


def regression(model, num=20, inputs=4, outputs=3, **options):
    torch.manual_seed(0)
    data = (torch.randn(num, inputs), torch.randn(num, outputs))
    return Objective.supervised(model, nn.MSELoss(), data, **options)


def mlp(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *extra, nn.Linear(8, 3))


def test_a_sound_model_passes_everything(problem):
    model, data = problem
    diagnosis = doctor(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    assert diagnosis.healthy
    assert [check.name for check in diagnosis.checks][: len(CHECKS)] == CHECKS
    assert {check.outcome for check in diagnosis.checks} <= {"ok", "note"}
    assert diagnosis["dense block"].outcome == "ok"


def test_a_closure_can_be_tested_too():
    x = torch.randn(6, dtype=torch.float64)
    diagnosis = doctor(Objective.from_closure(lambda x: (x**4).sum() / 4, x))
    assert diagnosis.healthy
    # The Hessian is diag(3 x²).
    assert f"{float(3 * x.square().max()):.4g}" in diagnosis["dense block"].found


@pytest.mark.parametrize("mode", ["train", "keep"])
def test_active_dropout_is_the_first_thing_said(mode):
    diagnosis = doctor(regression(mlp(nn.Dropout(0.5)).train(), mode=mode))
    assert not diagnosis.healthy
    assert diagnosis["loss"].outcome == "fail"
    assert "dropout is active" in diagnosis["loss"].found
    assert diagnosis["dense block"].outcome == "skipped"


def test_nan_is_named():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    found = doctor(regression(model))["loss"]
    assert found.outcome == "fail"
    assert "nan" in found.found


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x  # lacks the factor 2


class DetachedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad.detach() * x.detach()


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def test_a_wrong_gradient_is_caught_by_differences_of_losses():
    diagnosis = doctor(regression(mlp(Through(WrongBackward))))
    assert diagnosis["gradient"].outcome == "fail"
    assert not diagnosis.healthy


def test_a_backward_that_cannot_be_differentiated_is_not_believed():
    diagnosis = doctor(regression(mlp(Through(DetachedBackward))))
    assert diagnosis["gradient"].outcome == "ok"
    # Double backward is silently wrong here; whatever uses it must not be called sound.
    assert "chosen" not in diagnosis["engine double-backward"].found


def test_a_model_that_changes_its_own_weights_is_caught():
    class Drifting(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.data.add_(1e-6)
            return super().forward(x)

    torch.manual_seed(2)
    diagnosis = doctor(regression(mlp(Drifting(8, 8))))
    assert not diagnosis.healthy
    failed = [check for check in diagnosis.checks if check.outcome == "fail"]
    assert any("not deterministic" in check.found or "2.weight" in check.found for check in failed)


def test_unused_tied_and_frozen_parameters_are_noted():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.out = nn.Linear(4, 3)
            self.out.bias.requires_grad_(False)

        def forward(self, x):
            return self.out(self.second(self.first(x).tanh()).tanh())

    torch.manual_seed(3)
    diagnosis = doctor(regression(Odd()))
    assert diagnosis.healthy
    assert "spare.weight, spare.bias" in diagnosis["unused parameters"].found
    assert "first.weight = second.weight" in diagnosis["tied parameters"].found
    assert "out.bias" in diagnosis["frozen parameters"].found
    assert {diagnosis[name].outcome for name in CHECKS[-3:]} == {"note"}


def test_kinks_make_differences_useless_and_that_is_a_note():
    torch.manual_seed(4)
    diagnosis = doctor(regression(nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)), num=200))
    assert diagnosis.healthy
    assert diagnosis["engine finite-difference"].outcome in ("ok", "note")


def test_the_model_is_left_as_found():
    model = mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    doctor(regression(model))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
