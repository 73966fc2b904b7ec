"""The suite itself: its truth against closed forms and differences, its verdicts on tools with known faults."""

from __future__ import annotations

import pytest
import torch
from curvature_traps import TRAPS, Adapter, NotOffered, Problem, Trap, Verdict, oracle
from curvature_traps.models import Attention, Normalised, classification, cut, labelled, mlp, quadratic
from curvature_traps.outcome import raised_by
from torch import Tensor, nn

BY_NAME = {trap.name: trap for trap in TRAPS}


def gradient(problem: Problem) -> Tensor:
    """∇L [n] by one backward pass on the model itself, which must be in float64."""
    loss = problem.loss(problem.model, problem.whole)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, problem.parameters)])


def differenced_hessian(problem: Problem, step: float = 1e-5) -> Tensor:
    """Central differences of the gradient: an error near step² times the fourth derivative, and of rounding / step."""
    flat = nn.utils.parameters_to_vector(problem.parameters).detach()
    columns = []
    for i in range(len(flat)):
        sides = []
        for sign in (1.0, -1.0):
            moved = flat.clone()
            moved[i] += sign * step
            nn.utils.vector_to_parameters(moved, problem.parameters)
            sides.append(gradient(problem))
        columns.append((sides[0] - sides[1]) / (2 * step))
    nn.utils.vector_to_parameters(flat, problem.parameters)
    return torch.stack(columns, dim=1)


def test_truth_of_a_linear_model_is_its_closed_form() -> None:
    # L = mean of (w·x − y)² has ∇²L = 2 XᵀX / N.
    x, _ = labelled(dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    whole = (x, x[:, :1])
    problem = Problem(model, nn.MSELoss(), [whole], whole)
    expected = 2 * x.T @ x / len(x)
    torch.testing.assert_close(oracle.hessian(problem), expected)
    torch.testing.assert_close(oracle.gauss_newton(problem), expected)


def test_truth_of_a_quadratic_is_its_diagonal() -> None:
    d = torch.tensor([3.0, -1.0, 0.0])
    assert torch.equal(oracle.hessian(quadratic(d)), torch.diag(d).double())


@pytest.mark.parametrize(
    "model", [mlp(), Normalised(), Normalised(plain=True)], ids=["mlp", "fused norm", "plain norm"]
)
def test_truth_of_a_network_is_the_difference_of_its_gradients(model: nn.Module) -> None:
    data = labelled(10, torch.float64)
    problem = Problem(model.double(), nn.CrossEntropyLoss(), [data], data)
    torch.testing.assert_close(oracle.hessian(problem), differenced_hessian(problem), atol=1e-7, rtol=0)


def test_example_gradients_average_to_the_gradient() -> None:
    data = labelled(10, torch.float64)
    problem = Problem(Normalised().double(), nn.CrossEntropyLoss(), [data], data)
    torch.testing.assert_close(oracle.example_gradients(problem).mean(dim=0), gradient(problem))


def test_plain_attention_is_the_fused_one() -> None:
    torch.manual_seed(0)
    fused, plain = Attention(plain=False), Attention(plain=True)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 6, 4)
    torch.testing.assert_close(fused(x), plain(x))


class Dense(Adapter):
    """A tool that is right on every matrix: it is the truth itself."""

    name = "dense"
    packages = (__name__.split(".")[0],)

    def hessian(self, problem: Problem, engine: str | None = None) -> Tensor:
        return oracle.hessian(problem).to(problem.parameters[0].dtype)


class BatchMeans(Dense):
    """A tool that averages the batches' means."""

    def hessian(self, problem: Problem, engine: str | None = None) -> Tensor:
        matrices = [oracle.hessian(Problem(problem.model, problem.criterion, [b], b)) for b in problem.batches]
        return torch.stack(matrices).mean(dim=0).to(problem.parameters[0].dtype)


class Refusing(Dense):
    """A tool that refuses everything, saying `message`."""

    def __init__(self, message: str) -> None:
        self.message = message

    def hessian(self, problem: Problem, engine: str | None = None) -> Tensor:
        raise ValueError(self.message)


class Broken(Dense):
    """A tool that fails by accident inside torch."""

    def hessian(self, problem: Problem, engine: str | None = None) -> Tensor:
        return torch.zeros(2) @ torch.zeros(3)


class Leaving(Dense):
    """A tool that draws from the global stream and leaves gradients and eval mode behind."""

    def hessian(self, problem: Problem, engine: str | None = None) -> Tensor:
        problem.model.eval()
        problem.loss(problem.model, problem.whole).backward()
        torch.randn(1)
        return super().hessian(problem)


class Unguarded(Dense):
    """A tool that puts the modes back, but not after an error."""

    def hessian(self, problem: Problem, engine: str | None = None) -> Tensor:
        found = [(module, module.training) for module in problem.model.modules()]
        problem.model.eval()
        problem.loss(problem.model, problem.whole)
        for module, training in found:
            module.training = training
        return torch.eye(problem.num_parameters)


@pytest.mark.parametrize(
    ("name", "tool", "verdict"),
    [
        ("uneven batches", Dense(), Verdict.PASS),
        ("uneven batches", BatchMeans(), Verdict.WRONG),
        ("uneven batches", Adapter(), Verdict.NOT_OFFERED),
        ("uneven batches", Refusing("uneven batches"), Verdict.REFUSED),
        ("uneven batches", Broken(), Verdict.CRASH),
        ("NaN in the data", Refusing("the loss of batch 1 is nan"), Verdict.PASS),
        ("NaN in the data", Refusing("the loss of batch 12 is nan"), Verdict.REFUSED),
        ("NaN in the data", Refusing("not deterministic"), Verdict.REFUSED),
        ("default attention kernel", Dense(), Verdict.PASS),
        ("LayerNorm, every engine", Dense(), Verdict.PASS),
        ("weights changed through .data", Dense(), Verdict.WRONG),
        ("gradients left alone", Dense(), Verdict.PASS),
        ("gradients left alone", Leaving(), Verdict.WRONG),
        ("modes left alone", Leaving(), Verdict.WRONG),
        ("random streams left alone", Leaving(), Verdict.WRONG),
        ("failure inside a product", Leaving(), Verdict.PASS),
        ("failure inside a product", Unguarded(), Verdict.WRONG),
    ],
)
def test_verdict_on_a_tool_with_a_known_fault(name: str, tool: Adapter, verdict: Verdict) -> None:
    outcome = BY_NAME[name].spring(tool)
    assert outcome.verdict is verdict, outcome.detail


def test_missing_features_are_not_held_against_a_tool() -> None:
    assert {trap.spring(Adapter()).verdict for trap in TRAPS if not trap.slow} == {Verdict.NOT_OFFERED}


def test_only_a_raise_statement_of_the_tool_is_a_refusal() -> None:
    tool = Refusing("no")
    with pytest.raises(ValueError) as refusal:
        tool.hessian(classification())
    assert raised_by(tool.packages, refusal.value)
    assert not raised_by(("another",), refusal.value)
    with pytest.raises(RuntimeError) as accident:
        Broken().hessian(classification())
    assert not raised_by(tool.packages, accident.value)


def test_every_trap_has_a_name_of_its_own_and_says_what_it_asks() -> None:
    assert len(BY_NAME) == len(TRAPS)
    assert all(trap.summary for trap in TRAPS)


def test_a_trap_in_an_adapter_can_be_not_offered() -> None:
    def run(tool: Adapter) -> str:
        raise NotOffered("nothing here")

    outcome = Trap("t", "data", run).spring(Adapter())
    assert (outcome.verdict, outcome.detail) == (Verdict.NOT_OFFERED, "nothing here")


def test_cut_keeps_every_example_once() -> None:
    data = labelled()
    batches = cut(data, (32, 32, 6))
    assert [len(y) for _, y in batches] == [32, 32, 6]
    assert torch.equal(torch.cat([x for x, _ in batches]), data[0])
