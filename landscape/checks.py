"""The first look at an objective: counts, and everything that would make later numbers silently wrong."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .batches import CACHED_BYTES, leading_size, map_tensors, tensors_of
from .means import check_mean
from .state import checksums, content, num_bytes, sparse_parts

if TYPE_CHECKING:
    from .evaluation import Evaluation

log = logging.getLogger("sharpscope")
_said: set[str] = set()

BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
# Functions of torch whose double backward is wrong: weight_norm's, on a CPU, in torch 2.13.
MISTRUSTED = ("WeightNormInterface",)
# Batches whose mean is verified in the first look.
VERIFIED_BATCHES = 8
DROPOUTS = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class Look:
    """What the first pass over the data found."""

    sizes: tuple[int, ...]  # examples per batch, on this rank
    terms: tuple[float, ...]  # count behind each batch's mean
    total: float  # of the terms, over all ranks

    @property
    def num_examples(self) -> int:
        return sum(self.sizes)


def checked_loss(loss: Any, number: int, batch: Any = None, *, differentiable: bool = True) -> Tensor:
    """`loss` itself when it is a finite real scalar that can be differentiated.

    Raises:
        TypeError: not a tensor. ValueError: not a scalar, complex, not differentiable, NaN or infinite (with the
        number of the batch).
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"`loss` returned a {type(loss).__name__} for batch {number}; return a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"`loss` returned a tensor of shape {list(loss.shape)} for batch {number}; "
            "return one number, the mean over the batch's examples"
        )
    if not loss.is_floating_point():
        raise ValueError(f"`loss` returned {loss.dtype} for batch {number}; return a real floating scalar")
    if not bool(torch.isfinite(loss.detach()).all()):
        bad = sum(int((~torch.isfinite(t)).sum()) for t in tensors_of(batch) if t.is_floating_point())
        where = f"; the batch itself holds {bad} non-finite numbers" if bad else ""
        raise ValueError(
            f"the loss of batch {number} is {float(loss.detach())}{where}; "
            "curvature is defined only where the loss is finite: remove the batch or lower the learning rate"
        )
    if differentiable and not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} does not require grad: it does not depend on the selected parameters, or was "
            "computed under no_grad or detached inside `loss`"
        )
    return loss.reshape(())


# What stands among the custom functions for a loss that differentiates inside itself.
NESTED = "torch.autograd.grad"


def custom_functions(loss: Tensor, parameters: Iterable[Tensor]) -> tuple[str, ...]:
    """Names of the functions in the graph of a loss whose second derivatives cannot be taken on trust.

    These are the user's own `torch.autograd.Function`s (through a `once_differentiable` backward,
    `torch.autograd.grad` drops terms without a word) and those of torch in `MISTRUSTED`.

    Raises:
        ValueError: the graph uses `parameters` themselves, for which copies stand in the model.
    """
    live = {id(p) for p in parameters}
    found: set[str] = set()
    seen: set[object] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
        elif name.startswith(MISTRUSTED):
            found.add(name)
        elif id(getattr(node, "variable", None)) in live:
            raise ValueError(
                "`loss` uses parameters of the model that it holds itself instead of those of the model it is given, "
                "so derivatives would miss them; use model.parameters() of its first argument"
            )
        waiting.extend(parent for parent, _ in node.next_functions)
    return tuple(sorted(found))


def say_once(message: str) -> None:
    """Logs a message the first time it comes up in this process."""
    if message not in _said:
        _said.add(message)
        log.warning(message)


class NestedDifferentiation(TorchFunctionMode):
    """Notices derivatives that a loss takes inside itself, as physics-informed losses and gradient penalties do.

    Its Hessian then has third derivatives of the layers, which are not to be taken on trust either: torch 2.13 has a
    wrong one for `layer_norm`.

    Attributes:
        found: The name to list among the `custom_functions`, or nothing.
    """

    found: tuple[str, ...] = ()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.found = (NESTED,)
        return func(*args, **(kwargs or {}))


class _AttentionWatch(TorchFunctionMode):
    """Notices calls of scaled_dot_product_attention."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen = True
        return func(*args, **(kwargs or {}))


def first_look(objective: Evaluation) -> Look:
    """Counts the data and, unless checks are off, verifies determinism, finiteness and the meaning of the mean."""
    if objective._batches is None:
        look = Look((1,), (1.0,), 1.0)
        if objective._check:
            _check_repeatable(objective, None, 0)
        return look
    watch = _AttentionWatch()
    sizes, terms, losses, digests, kept, first_few = [], [], [], [], [], []
    first: tuple[int, Tensor] | None = None
    kept_bytes = 0
    custom: set[str] = set()
    # Until it is known that an evaluation changes neither batch nor weights in place, it gets copies of both.
    objective._clone_leaves = True
    live = [] if objective.model is None else list(objective.model.parameters())
    with objective.evaluation() as theta, watch:
        versions = [t._version for t in theta]
        for number, batch in enumerate(objective._batches.read()):
            sizes.append(_size(objective, batch, number))
            terms.append(objective._terms(batch, number))
            if objective._check:
                loss = _first_loss(objective, batch, number, theta, live, custom) if terms[-1] > 0 else None
                losses.append(0.0 if loss is None else float(loss.detach()))
                if loss is not None and first is None:
                    first = (number, _gradient(objective, checked_loss(loss, number), theta))
                digests.append(_contents(batch))
            if terms[-1] > 0 and len(first_few) < VERIFIED_BATCHES:
                first_few.append((number, batch))
            kept_bytes += sum(num_bytes(t) for t in tensors_of(batch))
            if kept_bytes <= CACHED_BYTES:
                kept.append(batch)
        objective._clone_leaves = not objective._check or versions != [t._version for t in theta]
    if not sizes:
        raise ValueError("`data` is empty: it yielded no batch; give at least one")
    total = torch.tensor(sum(terms), dtype=torch.float64, device=objective.device)
    total = float(objective.all_reduce(total))
    if total <= 0:
        raise ValueError(f"`data` counts {total:g} terms in all; at least one label must not be ignored")
    look = Look(tuple(sizes), tuple(terms), total)
    _note(objective, watch.seen)
    if objective._check:
        objective._custom_functions = tuple(sorted(custom))
        if not _check_data_repeat(objective, look, losses, digests, first) and first_few:
            _check_repeatable(objective, first_few[0][1], first_few[0][0])
        check_mean(objective, look.sizes, first_few)
    if len(kept) == len(sizes):
        objective._batches.keep(kept)
    return look


def _first_loss(
    objective: Evaluation,
    batch: Any,
    number: int,
    theta: Sequence[Tensor],
    live: Sequence[Tensor],
    custom: set[str],
) -> Tensor:
    """The loss of a copy of a batch; notices in-place changes, and functions that have to be verified."""
    copied = map_tensors(batch, torch.clone)
    tensors = tensors_of(copied)
    before = [content(t) for t in tensors]
    with NestedDifferentiation() as nested:
        loss = checked_loss(objective._evaluate(copied, theta), number, batch, differentiable=False)
    if before != [content(t) for t in tensors]:
        raise ValueError(
            f"`loss` changes the tensors of batch {number} in place, so no two evaluations see the same data; "
            "work on a clone inside `loss`"
        )
    if loss.requires_grad:
        custom.update(custom_functions(loss, live), nested.found)
    return loss


def _gradient(objective: Evaluation, loss: Tensor, theta: Sequence[Tensor]) -> Tensor:
    return objective.join(torch.autograd.grad(loss, theta, allow_unused=True))


def _contents(batch: Any) -> tuple:
    """What the tensors of a batch hold, wherever they lie."""
    found = []
    for tensor in tensors_of(batch):
        parts = (tensor,) if tensor.layout == torch.strided else sparse_parts(tensor)
        found.append((tensor.dtype, tuple(tensor.shape), *(checksums(part) for part in parts)))
    return tuple(found)


def _size(objective: Evaluation, batch: Any, number: int) -> int:
    try:
        size = leading_size(batch, number)
    except ValueError:
        if not objective._count_given:
            raise
        return 1
    if size == 0:
        raise ValueError(f"batch {number} holds no example (a tensor of length 0); drop it")
    return size


def _note(objective: Evaluation, attention: bool) -> None:
    modules = [] if objective.model is None else list(objective.model.modules())
    if attention:
        note = "scaled_dot_product_attention runs on its math kernel here: the fused ones have no second derivative"
        objective.notes.append(note)
        say_once(note)
    if objective._mode == "eval" and any(isinstance(m, BATCH_STATISTICS) and m.training for m in modules):
        note = (
            "the model has BatchNorm in training mode; curvature is taken in eval mode (running statistics): "
            "pass mode='train' for the statistics of each batch"
        )
        objective.notes.append(note)
        say_once(note)


def _check_data_repeat(
    objective: Evaluation,
    look: Look,
    losses: Sequence[float],
    digests: Sequence[tuple],
    first: tuple[int, Tensor] | None,
) -> bool:
    """The objective must be one number: a second pass over the data has to give it again.

    Args:
        first: A batch's number and its gradient in the first pass.

    Returns:
        Whether that gradient was compared too; it can be only where the batches repeat themselves.
    """
    assert objective._batches is not None
    again, digests_again, terms_again = [], [], []
    gradient = None
    with objective.evaluation() as theta:
        # Another random state: a loader that shuffles would repeat itself under the restored one.
        torch.default_generator.manual_seed(torch.initial_seed() + 1)
        np.random.seed(torch.initial_seed() % 2**32)
        random.seed(torch.initial_seed())
        for number, batch in enumerate(objective._batches.read()):
            digests_again.append(_contents(batch))
            terms_again.append(objective._terms(batch, number))
            value = objective._evaluate(batch, theta) if terms_again[-1] > 0 else 0.0
            again.append(float(value.detach()) if isinstance(value, Tensor) else value)
            if first is not None and number == first[0] and isinstance(value, Tensor) and value.requires_grad:
                gradient = _gradient(objective, value.reshape(()), theta)
    same_data = digests_again == list(digests)
    total = _weighted(objective, losses, look.terms)
    total_again = _weighted(objective, again, terms_again)
    if _close(objective, total, total_again) and (same_data or len(again) == len(losses)):
        if not same_data or first is None or gradient is None:
            return False
        if _differ(first[1], gradient):
            _explain_randomness(objective, total, total_again)
        return True
    if not same_data:
        number = next((i for i, (a, b) in enumerate(zip(digests, digests_again, strict=False)) if a != b), len(digests))
        raise ValueError(
            f"`data` gave other batches in a second pass (from batch {number} on): the loader shuffles, drops or "
            f"augments, and the loss went from {total:.6g} to {total_again:.6g}; "
            "use shuffle=False, drop_last=False and fixed transforms, or freeze one draw with list(loader)"
        )
    _explain_randomness(objective, total, total_again)
    return False


def _weighted(objective: Evaluation, losses: Sequence[float], terms: Sequence[float]) -> float:
    if objective._reduction == "sum":
        return sum(losses)
    return sum(loss * term for loss, term in zip(losses, terms, strict=True)) / max(sum(terms), 1e-300)


def rounding_of_losses(eps: float, largest: float) -> float:
    """How far sums of the same losses, computed in two ways, may lie apart when the largest is `largest`.

    A loss near its least value, such as a square r², has an error of about eps r: relative to the loss it grows
    without bound as r goes to 0.
    """
    return 1e3 * eps * largest + 30 * eps * max(largest**0.5, eps)


def _close(objective: Evaluation, a: float, b: float, factor: float = 64.0) -> bool:
    return abs(a - b) <= factor * objective.coarsest_eps * max(abs(a), abs(b))


def _check_repeatable(objective: Evaluation, batch: Any, number: int) -> None:
    """Two gradients of one batch: randomness may leave the loss alone, for example under a zero output layer."""
    with objective.evaluation() as theta:
        values, gradients = [], []
        for _ in range(2):
            loss = checked_loss(objective._evaluate(batch, theta), number, batch)
            gradients.append(_gradient(objective, loss, theta))
            values.append(float(loss.detach()))
    if not _close(objective, *values) or _differ(*gradients):
        _explain_randomness(objective, *values)


def _differ(first: Tensor, second: Tensor) -> bool:
    """Whether two gradients differ by more than rounding, and that of nondeterministic kernels, can explain."""
    return float((first - second).norm()) > 1e-3 * max(float(first.norm()), float(second.norm()))


def _explain_randomness(objective: Evaluation, first: float, second: float) -> None:
    modules = {} if objective.model is None else dict(objective.model.named_modules())
    in_training = objective._mode == "train"
    active = [
        name or type(module).__name__
        for name, module in modules.items()
        if isinstance(module, DROPOUTS)
        and module.p > 0
        and (in_training or (objective._mode == "keep" and module.training))
    ]
    two = f"two passes over the same data disagree (loss {first:.6g}, then {second:.6g}, or their gradients do)"
    if active:
        raise ValueError(
            f"dropout is active in {active[:3]}{' ...' if len(active) > 3 else ''}: {two}; "
            "pass mode='eval', or set the dropout probability to 0"
        )
    raise ValueError(
        f"the loss is not deterministic: {two}; the model or `loss` draws random numbers in mode={objective._mode!r} "
        "(noise, sampling, stochastic depth, F.dropout without training=False) or uses nondeterministic kernels: "
        "seed them inside `loss`, or switch them off"
    )
