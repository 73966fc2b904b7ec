"""Traps in what a tool leaves behind: gradients, random streams, buffers, modes, hooks, flags, switches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .adapter import Adapter, NotOffered
from .models import classification, cut, labelled, mlp
from .outcome import WrongAnswer, trap
from .problem import Problem

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model and its surroundings that an analysis has no business to change.

    Tensors stand as (identity, values), so that both a new tensor and new values show.
    """

    weights: dict[str, Any]
    gradients: dict[str, Any]
    buffers: dict[str, Any]
    modes: dict[str, bool]
    hooks: dict[str, Any]
    flags: dict[str, bool]
    attributes: dict[str, Any]
    random_streams: dict[str, Any]
    switches: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        modules = dict(model.named_modules())
        named = dict(model.named_parameters())
        return cls(
            weights={name: _frozen(p) for name, p in named.items()},
            gradients={name: _frozen(p.grad) for name, p in named.items()},
            buffers={name: _frozen(b) for name, b in model.named_buffers()},
            modes={name: module.training for name, module in modules.items()},
            hooks={
                **{f"{name}.{h}": tuple(getattr(module, h)) for name, module in modules.items() for h in HOOKS},
                **{name: tuple(p._backward_hooks or ()) for name, p in named.items()},
            },
            flags={name: p.requires_grad for name, p in named.items()},
            attributes={name: sorted(module.__dict__) for name, module in modules.items()},
            random_streams={
                "torch": torch.get_rng_state().tolist(),
                "NumPy": repr(np.random.get_state()),
                "Python": random.getstate(),
            },
            switches={
                "grad mode": torch.is_grad_enabled(),
                "inference mode": torch.is_inference_mode_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
                "default dtype": torch.get_default_dtype(),
                "flash attention": torch.backends.cuda.flash_sdp_enabled(),
                "math attention": torch.backends.cuda.math_sdp_enabled(),
                "attention fast path": torch.backends.mha.get_fastpath_enabled(),
                "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
                "threads": torch.get_num_threads(),
            },
        )

    def changes(self, later: Snapshot) -> list[str]:
        """What differs, as "aspect: names"."""
        found = []
        for field in fields(self):
            old, new = getattr(self, field.name), getattr(later, field.name)
            names = [name or "model" for name in {**old, **new} if old.get(name) != new.get(name)]
            if names:
                found.append(f"{field.name.replace('_', ' ')}: {', '.join(names[:4])}{' ...' if names[4:] else ''}")
        return found


def _frozen(tensor: Tensor | None) -> tuple[int, bytes] | None:
    if tensor is None:
        return None
    return id(tensor), tensor.detach().contiguous().cpu().numpy().tobytes()


def _exercise(tool: Adapter, problem: Problem) -> None:
    """A plain use of the tool: an operator, a product, and what it offers of eigenvalues and trace."""
    operator = tool.hessian(problem)
    tool.product(operator, torch.ones(problem.num_parameters))
    for measure in (lambda: tool.top_eigenvalues(operator, 1, tol=1e-2), lambda: tool.trace(operator, 3)):
        try:
            measure()
        except NotOffered:
            continue


def _unchanged(tool: Adapter, problem: Problem, *aspects: str) -> str:
    """Uses the tool and compares these aspects (default: all) before and after."""
    before = Snapshot.of(problem.model)
    _exercise(tool, problem)
    changes = before.changes(Snapshot.of(problem.model))
    relevant = [change for change in changes if not aspects or change.split(":")[0] in aspects]
    if relevant:
        raise WrongAnswer("changed " + "; ".join(relevant))
    return "as found"


@trap("gradients left alone", "side effects")
def gradients_left_alone(tool: Adapter) -> str:
    """`.grad` holds accumulated gradients for some parameters and None for others; both stay, same tensors."""
    problem = classification(batches=cut(labelled()))
    problem.loss(problem.model, problem.whole).backward()
    first = next(iter(problem.model.parameters()))
    first.grad = None
    return _unchanged(tool, problem, "gradients")


@trap("random streams left alone", "side effects")
def random_streams_left_alone(tool: Adapter) -> str:
    """torch, NumPy and Python draw the same numbers after an analysis as without it."""
    return _unchanged(tool, classification(batches=cut(labelled())), "random streams")


@trap("random streams left alone, loader", "side effects")
def random_streams_left_alone_loader(tool: Adapter) -> str:
    """A DataLoader draws a seed from torch's stream at every pass: an analysis has to give it back."""
    loader = DataLoader(TensorDataset(*labelled()), batch_size=35, shuffle=True)
    return _unchanged(tool, classification(batches=loader), "random streams")


@trap("buffers left alone", "side effects")
def buffers_left_alone(tool: Adapter) -> str:
    """BatchNorm in train mode updates its running statistics at every forward pass: not those of an analysis."""
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return _unchanged(tool, classification(model, mode="train"), "buffers")


@trap("modes left alone", "side effects")
def modes_left_alone(tool: Adapter) -> str:
    """A model in train mode with one part in eval mode stays so."""
    body = mlp()
    part = nn.Sequential(nn.Dropout(0.0), body[2])
    model = nn.Sequential(body[0], body[1], part)
    problem = classification(model)
    model.train()
    part.eval()
    return _unchanged(tool, problem, "modes")


@trap("hooks and flags left alone", "side effects")
def hooks_and_flags_left_alone(tool: Adapter) -> str:
    """Hooks on modules and parameters, requires_grad flags, attributes, weights and global switches stay as found."""
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    model[2].register_forward_pre_hook(lambda *_: None)
    next(model[2].parameters()).register_hook(lambda g: None)
    next(model[0].parameters()).requires_grad_(False)
    problem = classification(model)
    return _unchanged(tool, problem, "hooks", "flags", "attributes", "weights", "switches")


class Interrupted(Exception):
    """What the failing model raises."""


class _Failing(nn.Module):
    """Raises at the given pass through its middle, counting forward passes and the backward passes through them."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        torch.manual_seed(15)
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.dropout, self.last = nn.Dropout(0.0), nn.Linear(5, 3)
        self.countdown = [fail_at]

    def _count(self, _: Tensor | None = None) -> None:
        self.countdown[0] -= 1
        if self.countdown[0] == 0:
            raise Interrupted("the model failed in the middle of a pass")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        self._count()
        # Tensors inside functional transforms take no hooks.
        if hidden.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(hidden):  # type: ignore[attr-defined]
            hidden.register_hook(self._count)
        return self.last(self.dropout(torch.tanh(hidden)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _interrupted(tool: Adapter, fail_at: int) -> tuple[bool, list[str]]:
    """Whether the model failed at that pass of one product, and what differs afterwards."""
    model = _Failing(fail_at)
    problem = classification(model, batches=cut(labelled(), (40, 30)))
    model.train()
    model.norm.eval()
    before = Snapshot.of(model)
    failed = False
    try:
        tool.product(tool.hessian(problem), torch.ones(problem.num_parameters))
    except Exception as error:
        failed = True
        if not any(isinstance(e, Interrupted) for e in _chain(error)):
            raise
    if not failed and model.countdown[0] <= 0:
        raise WrongAnswer(f"the error of pass {fail_at} was swallowed")
    return failed, before.changes(Snapshot.of(model))


@trap("failure inside a product", "side effects")
def failure_inside_a_product(tool: Adapter) -> str:
    """The model raises at its first, second, third ... pass, forward or backward: each time the error comes out and
    everything is as found, but for what the tool changes in a run without failure too."""
    _, usual = _interrupted(tool, 10**9)
    fail_at, tried = 1, 0
    while fail_at < 10_000:
        failed, changes = _interrupted(tool, fail_at)
        if not failed:
            return f"as found after a failure at {tried} of the first {fail_at} passes"
        fresh = [change for change in changes if change.split(":")[0] not in {c.split(":")[0] for c in usual}]
        if fresh:
            raise WrongAnswer(f"after a failure at pass {fail_at} changed {'; '.join(fresh)}")
        # Every pass at first, where most of what is set up and restored lies; then sparser.
        fail_at, tried = fail_at + max(1, fail_at // 40), tried + 1
    raise WrongAnswer("a single product takes more than 10,000 passes")
