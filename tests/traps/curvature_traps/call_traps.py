"""Traps in how a tool is called: gradient modes, and weights that change under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from . import oracle
from .adapter import Adapter
from .checks import matrix_of, right_hessian, same_matrix
from .models import classification, cut, labelled, mlp
from .outcome import WrongAnswer, trap
from .problem import Problem


def _called_under(tool: Adapter, context: AbstractContextManager[object]) -> str:
    problem = classification(batches=cut(labelled()))
    truth = oracle.hessian(problem)
    with context:
        matrix = matrix_of(tool, tool.hessian(problem), problem)
    return same_matrix(matrix.clone(), truth)


@trap("called under no_grad", "calls")
def called_under_no_grad(tool: Adapter) -> str:
    """An evaluation loop under torch.no_grad calls the tool."""
    return _called_under(tool, torch.no_grad())


@trap("called under inference_mode", "calls")
def called_under_inference_mode(tool: Adapter) -> str:
    """An evaluation loop under torch.inference_mode calls the tool."""
    return _called_under(tool, torch.inference_mode())


@trap("data made under inference_mode", "calls")
def data_made_under_inference_mode(tool: Adapter) -> str:
    """Inputs that are inference tensors, as a feature extractor leaves them."""
    x, y = labelled()
    with torch.inference_mode():
        batches = cut((x * 1.0, y * 1))
    return right_hessian(tool, classification(batches=batches))


def _after_a_change(tool: Adapter, change: Callable[[Problem], object]) -> str:
    """One operator, used before and after the weights change: it must follow, or say that it is out of date."""
    problem = classification()
    operator = tool.hessian(problem)
    same_matrix(matrix_of(tool, operator, problem), oracle.hessian(problem), "before the change: ")
    change(problem)
    return same_matrix(matrix_of(tool, operator, problem), oracle.hessian(problem))


@trap("weights changed by an optimizer", "calls")
def weights_changed_by_an_optimizer(tool: Adapter) -> str:
    """An optimizer step between two products of one operator: no product of a stale graph."""

    def step(problem: Problem) -> None:
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5)
        optimizer.zero_grad()
        problem.loss(problem.model, problem.whole).backward()
        optimizer.step()

    return _after_a_change(tool, step)


@trap("weights changed through .data", "calls")
def weights_changed_through_data(tool: Adapter) -> str:
    """p.data.mul_ between two products: it leaves no trace in autograd's version counters."""

    def scale(problem: Problem) -> None:
        for p in problem.model.parameters():
            p.data.mul_(1.3)

    return _after_a_change(tool, scale)


@trap("weights rebound through .data", "calls")
def weights_rebound_through_data(tool: Adapter) -> str:
    """p.data = other between two products, as model.to() and vector_to_parameters do."""

    def rebind(problem: Problem) -> None:
        for p in problem.model.parameters():
            p.data = p.data * 1.3

    return _after_a_change(tool, rebind)


@trap("gradient hooks", "calls")
def gradient_hooks(tool: Adapter) -> str:
    """The user's parameters carry hooks that clip gradients: they belong to training, not to the Hessian."""
    model = mlp()
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return right_hessian(tool, classification(model))


@trap("two operators at once", "calls")
def two_operators_at_once(tool: Adapter) -> str:
    """Operators of two losses of one model, used in turn: neither disturbs the other's gradients or graphs."""
    first = classification(batches=cut(labelled()))
    x, y = labelled()
    other = (x[:20] * 0.5, y[:20])
    second = Problem(first.model, nn.CrossEntropyLoss(label_smoothing=0.3), [other], other)
    operators = [tool.hessian(first), tool.hessian(second)]
    matrices = [matrix_of(tool, op, problem) for op, problem in zip(operators, (first, second), strict=True)]
    again = matrix_of(tool, operators[0], first)
    same_matrix(matrices[1], oracle.hessian(second), "second operator: ")
    same_matrix(again, oracle.hessian(first), "first operator, used again: ")
    return same_matrix(matrices[0], oracle.hessian(first))


def _trained(problem: Problem, num_steps: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Three live and three copied state dicts along a short training run."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.5)
    live, copied = [], []
    for _ in range(3):
        live.append(problem.model.state_dict())
        copied.append({name: t.clone() for name, t in problem.model.state_dict().items()})
        for _ in range(num_steps):
            optimizer.zero_grad()
            problem.loss(problem.model, problem.whole).backward()
            optimizer.step()
    return live, copied


def _true_tops(problem: Problem, states: Sequence[dict[str, Tensor]]) -> list[float]:
    found = {name: t.clone() for name, t in problem.model.state_dict().items()}
    tops = []
    for state in states:
        problem.model.load_state_dict(state)
        tops.append(float(torch.linalg.eigvalsh(oracle.hessian(problem))[-1]))
    problem.model.load_state_dict(found)
    return tops


def _compare_tops(tops: Sequence[float], truth: Sequence[float]) -> str:
    shown = ", ".join(f"{float(t):.4f}" for t in tops)
    detail = f"sharpness {shown}; truth {', '.join(f'{t:.4f}' for t in truth)}"
    close = len(tops) == len(truth) and all(abs(a - b) < 2e-3 * abs(b) for a, b in zip(tops, truth, strict=True))
    if not close:
        raise WrongAnswer(detail)
    return detail


@trap("replay over state dicts", "calls")
def replay_over_state_dicts(tool: Adapter) -> str:
    """The sharpness at three checkpoints; afterwards the model has the weights it had before."""
    problem = classification()
    _, states = _trained(problem, 20)
    before = {name: t.clone() for name, t in problem.model.state_dict().items()}
    detail = _compare_tops(tool.replay(problem, states), _true_tops(problem, states))
    changed = [name for name, t in problem.model.state_dict().items() if not torch.equal(t, before[name])]
    if changed:
        raise WrongAnswer(f"{detail}; the model's {changed} changed")
    return detail


@trap("aliased live state dicts", "calls", refusal="alias|same memory|share|same storage|live|clone|cop(y|ies)")
def aliased_live_state_dicts(tool: Adapter) -> str:
    """Checkpoints collected as model.state_dict() without a copy all show the last weights: the earlier ones are lost,
    so the tool has to say that they share the model's memory."""
    problem = classification()
    live, copied = _trained(problem, 20)
    tops = tool.replay(problem, live)
    return _compare_tops(tops, _true_tops(problem, copied))
