"""How an objective is evaluated: its tensors put in the model's place, its data read in weighted chunks.

`Objective` is this plus its constructors and the numbers it gives. Engines work with what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import Batches, examples, fresh_containers, leading_size, map_tensors
from .callables import captured_modules, pair
from .checks import checked_loss, first_look, rounding_of_losses
from .guard import MODES, plain_evaluation, substituted
from .layout import Layout
from .memory import available_bytes, saved_bytes
from .selection import near_names
from .sharded import gathered
from .state import cast, content, full_tensor


@dataclass(frozen=True)
class Chunk:
    """Examples evaluated together. `weight` is their share of the objective: Σ weight · mean loss = objective."""

    batch: Any
    weight: float
    number: int  # of the batch in the data
    first: int  # of its examples within the batch
    size: int
    batch_size: int


class Evaluation:
    """The evaluation side of an objective; made by its constructors, never alone."""

    model: nn.Module | None
    _loss: Callable[..., Any]
    _predict: Callable[[nn.Module, Any], Any] | None
    _criterion: Callable[[Any, Any], Tensor] | None
    _batches: Batches | None
    _tensors: dict[str, Tensor]  # of a closure
    _eager: bool

    def _configure(self, names, chunk_size, dtype, mode, count, reduction, check, memory_budget, group) -> None:
        if chunk_size is not None and chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size > 0):
            raise ValueError(f"`chunk_size` is {chunk_size!r}; give a positive number of examples, 'auto' or None")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` is {dtype!r}; give a real floating type such as torch.float64, or None")
        if mode not in MODES:
            raise ValueError(f"`mode` is {mode!r}; choose one of {MODES} (near: {near_names(str(mode), MODES)})")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"`reduction` is {reduction!r}; choose 'mean' or 'sum'")
        if memory_budget is not None and memory_budget <= 0:
            raise ValueError(f"`memory_budget` is {memory_budget}; give a positive number of bytes, or None")
        self._names: tuple[str, ...] = names
        self._chunk_size = chunk_size
        self._dtype = dtype
        self._mode = mode
        self._count, self._count_given = count, count is not None
        self._reduction = reduction
        self._check = check
        self._memory_budget = memory_budget
        self.group = group
        self._split = pair
        self._takes_arguments = True
        self._look: Any = None
        self._custom_functions: tuple[str, ...] | None = None
        self._fixed_token: tuple | None = None
        self._clone_leaves = False
        self._others: list[nn.Module] | None = None
        self._resolved_chunk: int | None = chunk_size if isinstance(chunk_size, int) else None
        self.notes: list[str] = []
        parameters = self.parameters
        self.layout = Layout.of(parameters)
        kinds = {p.dtype for p in parameters.values()} if dtype is None else {dtype}
        # Vectors are at least float32: a Krylov basis in bfloat16 means nothing.
        self.dtype = torch.float32
        for kind in kinds:
            self.dtype = torch.promote_types(self.dtype, kind)
        self.device = next(iter(parameters.values())).device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The analysed tensors by name, as they are now."""
        if self.model is None:
            return dict(self._tensors)
        named = dict(self.model.named_parameters())
        missing = [name for name in self._names if name not in named]
        if missing:
            raise ValueError(
                f"the model lost its parameters {missing[:5]} since this Objective was made; make a new one"
            )
        return {name: named[name] for name in self._names}

    @property
    def coarsest_eps(self) -> float:
        """Machine epsilon of the coarsest floating type that the parameters are evaluated in."""
        kinds = {p.dtype for p in self.parameters.values()} if self._dtype is None else {self._dtype}
        return max(torch.finfo(kind).eps for kind in kinds)

    @property
    def total_weight(self) -> float:
        """Σ of the examples' weights: 1 for a mean, their number for a sum."""
        look = self._first_look()
        if self._reduction == "mean":
            return 1.0
        return float(self.all_reduce(torch.tensor(float(look.num_examples), device=self.device)))

    @property
    def captures_tensors(self) -> bool:
        """Whether the closure uses the live tensors themselves, so that nothing can be put in their place."""
        return not self._takes_arguments

    @property
    def memory_budget(self) -> int:
        """Bytes that graphs may keep between products."""
        return self._memory_budget if self._memory_budget is not None else available_bytes(self.device) // 2

    @contextmanager
    def evaluation(self, theta: Sequence[Tensor] | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The model as a function: yields the tensors that stand for its parameters while the context is open.

        Without `theta` they are fresh leaves that share the parameters' memory, so that nothing accumulates into
        `.grad` and no hook of the user's parameters fires.
        """
        with ExitStack() as stack:
            others = self._other_modules()
            stack.enter_context(plain_evaluation(self.model, self._mode, eager=self._eager, others=others))
            for other in others:
                copies = {id(buffer): cast(buffer, self._dtype).clone() for buffer in other.buffers()}
                stack.enter_context(substituted(other, copies))
            leaves = theta is None or self.captures_tensors
            theta = stack.enter_context(self._leaves()) if leaves else tuple(theta or ())
            if self.model is not None:
                stack.enter_context(gathered(self.model))
                stack.enter_context(substituted(self.model, self._replacements(theta)))
            yield theta

    @contextmanager
    def replaced(self, theta: Sequence[Tensor]) -> Iterator[None]:
        """Inside `evaluation`: other tensors in the parameters' place, for functional transforms.

        Buffers are copied once more: a transform allows in-place changes only of tensors made inside it.
        """
        if self.model is None:
            yield
            return
        named = dict(self.model.named_parameters())
        replacements = {id(named[name]): new for name, new in zip(self._names, theta, strict=True)}
        replacements.update((id(buffer), buffer.clone()) for buffer in self.model.buffers())
        with substituted(self.model, replacements):
            yield

    @contextmanager
    def _leaves(self) -> Iterator[tuple[Tensor, ...]]:
        tensors = tuple(self.parameters.values())
        if self._takes_arguments:
            leaves = (cast(full_tensor(p), self._dtype) for p in tensors)
            yield tuple((leaf.clone() if self._clone_leaves else leaf).requires_grad_() for leaf in leaves)
            return
        found = [tensor.requires_grad for tensor in tensors]
        for tensor in tensors:
            tensor.requires_grad_()
        try:
            yield tensors
        finally:
            for tensor, flag in zip(tensors, found, strict=True):
                tensor.requires_grad_(flag)

    def _other_modules(self) -> list[nn.Module]:
        """Modules that the loss uses besides the model: a criterion, a teacher, those that a closure captures."""
        if self._others is None:
            own = set() if self.model is None else set(self.model.modules())
            found = captured_modules(self._loss, self._predict, self._criterion, self._split)
            self._others = [module for module in found if module not in own]
        return self._others

    def _replacements(self, theta: Sequence[Tensor]) -> dict[int, Tensor]:
        assert self.model is not None
        own = dict(zip(self._names, theta, strict=True))
        replacements = {
            id(p): own[name] if name in own else cast(full_tensor(p), self._dtype)
            for name, p in self.model.named_parameters()
        }
        for buffer in self.model.buffers():
            replacements[id(buffer)] = cast(buffer, self._dtype).clone()
        return replacements

    def chunks(self) -> Iterator[Chunk]:
        """The data in pieces, with weights that sum to 1 over all ranks (for reduction="sum": each weighs 1)."""
        look = self._first_look()
        if self._batches is None:
            yield Chunk(None, 1.0, 0, 0, 1, 1)
            return
        for number, batch in enumerate(self._batches):
            size = look.sizes[number] if number < len(look.sizes) else leading_size(batch, number)
            step = self._resolved_chunk or size
            for first in range(0, size, step):
                last = min(first + step, size)
                part = batch if last - first == size else examples(batch, first, last, size)
                weight = 1.0 if self._reduction == "sum" else self._terms(part, number) / look.total
                if weight > 0:
                    yield Chunk(part, weight, number, first, last - first, size)

    def chunk_loss(self, chunk: Chunk, theta: Sequence[Tensor]) -> Tensor:
        """Mean loss of a chunk as a graph over `theta`; call inside `evaluation`."""
        return checked_loss(self._evaluate(chunk.batch, theta), chunk.number, chunk.batch)

    def raw_loss(self, chunk: Chunk, theta: Sequence[Tensor]) -> Tensor:
        """Like `chunk_loss` but without a look at the value, which functional transforms do not allow."""
        return self._evaluate(chunk.batch, theta).reshape(())

    def _evaluate(self, batch: Any, theta: Sequence[Tensor]) -> Tensor:
        if self._batches is None:
            return self._loss(*theta) if self._takes_arguments else self._loss()
        return self._loss(self.model, fresh_containers(batch))

    def prediction(self, chunk: Chunk) -> tuple[Tensor, Any]:
        """Prediction tensor and targets of a chunk (supervised form); call inside `evaluation`."""
        if self._predict is None or self.model is None:
            raise ValueError(
                "this operator needs predictions apart from the loss; make the objective with Objective.supervised"
            )
        inputs, targets = self._split(fresh_containers(chunk.batch))
        prediction = self._predict(self.model, inputs)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"the model's prediction is a {type(prediction).__name__}; give `predict` so that it returns "
                "one tensor, for example predict=lambda model, inputs: model(**inputs).logits"
            )
        return prediction, targets

    def example_losses(self, chunk: Chunk, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss of each example [b] and its weight [b] in the objective; call inside `evaluation`."""
        if self._batches is None:
            raise ValueError("a closure has no examples; make the objective with Objective or Objective.supervised")
        total = self._first_look().total
        pieces = [examples(chunk.batch, i, i + 1, chunk.size) for i in range(chunk.size)]
        weights = [1.0 if self._reduction == "sum" else self._terms(piece, chunk.number) / total for piece in pieces]
        if abs(sum(weights) - (chunk.size if self._reduction == "sum" else chunk.weight)) > 1e-6 * sum(weights):
            raise ValueError(
                f"`count` of a batch is not the sum over its examples (batch {chunk.number}); per-example quantities "
                "need a count that can be cut: count=lambda batch: number of terms in the tensors it is given"
            )
        losses = []
        if self._predict is not None:
            whole = self.prediction(chunk)
            for i, weight in enumerate(weights):
                if weight > 0:
                    one, target = map_tensors(whole, lambda t, i=i: _rows_of_example(t, i, chunk.size))
                    losses.append(checked_loss(self._criterion(one, target), chunk.number))  # type: ignore[misc]
        else:
            for piece, weight in zip(pieces, weights, strict=True):
                if weight > 0:
                    losses.append(checked_loss(self._evaluate(piece, theta), chunk.number))
        values = torch.stack(losses)
        kept = torch.tensor([w for w in weights if w > 0], dtype=values.dtype, device=values.device)
        self._check_examples(chunk, theta, float((kept * values.detach()).sum()), float(values.detach().abs().max()))
        return values, kept

    def _check_examples(self, chunk: Chunk, theta: Sequence[Tensor], total: float, largest: float) -> None:
        """The examples' losses must add up to the chunk's, or they are not what it is a mean of."""
        whole = chunk.weight * float(self.chunk_loss(chunk, theta).detach())
        share = chunk.size if self._reduction == "sum" else chunk.weight
        if abs(whole - total) > share * rounding_of_losses(self.coarsest_eps, largest):
            raise ValueError(
                f"the losses of the single examples of batch {chunk.number} add up to {total:.6g}, its own loss to "
                f"{whole:.6g}: the loss mixes examples or is not their mean, so per-example gradients do not exist"
            )

    def split(self, v: Tensor, theta: Sequence[Tensor]) -> list[Tensor]:
        """A flat vector over `theta` in the shapes, types and places of `theta`."""
        pieces = v.split([t.numel() for t in theta])
        return [
            piece.reshape(t.shape).to(device=t.device, dtype=t.dtype) for piece, t in zip(pieces, theta, strict=True)
        ]

    def join(self, tensors: Sequence[Tensor | None], theta: Sequence[Tensor] | None = None) -> Tensor:
        """Tensors in layout order as one flat vector in the objective's type; None counts as zeros."""
        shapes = self.layout.shapes if theta is None else [t.shape for t in theta]
        flat = []
        for tensor, shape in zip(tensors, shapes, strict=True):
            if tensor is None:
                flat.append(torch.zeros(shape.numel(), dtype=self.dtype, device=self.device))
            else:
                flat.append(tensor.reshape(-1).to(device=self.device, dtype=self.dtype))
        return torch.cat(flat)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share the data, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside, weights, buffers and data are taken to stay as they are, and are not looked at again."""
        outer = self._fixed_token
        self._fixed_token = self.state_token()
        try:
            yield
        finally:
            self._fixed_token = outer

    def state_token(self) -> tuple:
        """Changes whenever weights or buffers do, also through `.data`, which leaves no version behind."""
        if self._fixed_token is not None:
            return self._fixed_token
        tensors = (
            list(self._tensors.values()) if self.model is None else [*self.model.parameters(), *self.model.buffers()]
        )
        if self._batches is not None:
            tensors += self._batches.in_memory()
        token: list[Any] = [content(tensor) for tensor in tensors]
        if self._batches is None:
            # A closure may use anything; its value tells most changes.
            with self.evaluation() as theta:
                token.append(float(self._evaluate(None, theta).detach()))
        if self.model is not None and self._mode == "keep":
            token.append(tuple(module.training for module in self.model.modules()))
        return tuple(token)

    def knows_count(self, batch: Any) -> bool:
        """Whether the terms behind a batch's mean are given by the user or follow from a known criterion."""
        return self._count_given or (self._count is not None and self._count(batch) is not None)

    def _terms(self, batch: Any, number: int) -> float:
        counted = self._count(batch) if self._count is not None else None
        if counted is None:
            return float(leading_size(batch, number))
        if not math.isfinite(float(counted)) or float(counted) < 0:
            raise ValueError(f"`count` gave {counted} for batch {number}; it must be a non-negative number")
        return float(counted)

    def _first_look(self) -> Any:
        """Counts the data and, once, checks what could make every later number silently wrong."""
        if self._look is None:
            self._look = first_look(self)
            if self._chunk_size == "auto":
                self._resolved_chunk = self._chunk_for_budget()
        return self._look

    def _chunk_for_budget(self) -> int:
        """Examples whose double-backward graph fits the budget, judged from a few examples of the first batch."""
        if self._batches is None:
            return 1
        batch = next(iter(self._batches))
        size = self._look.sizes[0]
        few = min(4, size)
        with self.evaluation() as theta:
            sample = examples(batch, 0, few, size)

            def graph() -> object:
                loss = checked_loss(self._evaluate(sample, theta), 0)
                return torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)

            per_example = max(1, saved_bytes(graph) // few)
        # The backward of the graph allocates about as much again.
        return max(1, min(size, self.memory_budget // (2 * per_example)))


def _rows_of_example(tensor: Tensor, i: int, size: int) -> Tensor:
    """Rows of example `i` of `size`; predictions flattened to [size · length, ...] have several."""
    if tensor.ndim == 0 or tensor.shape[0] % size:
        return tensor
    rows = tensor.shape[0] // size
    return tensor[i * rows : (i + 1) * rows]
