"""The loss as a function of the weights: model + loss + data, evaluated without leaving a trace."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import Batches, digest, examples, leading_size, map_tensors
from .checks import checked_loss, first_look
from .counting import reduction_of, target_count
from .guard import MODES, is_compiled, plain_evaluation, substituted
from .layout import Layout
from .memory import available_bytes, saved_bytes
from .selection import near_names, selected_parameters, unwrapped
from .sharded import gathered, is_sharded, sharding_group


@dataclass(frozen=True)
class Chunk:
    """Examples evaluated together. `weight` is their share of the objective: Σ weight · mean loss = objective."""

    batch: Any
    weight: float
    number: int  # of the batch in the data
    first: int  # of its examples within the batch
    size: int
    batch_size: int


class Objective:
    r"""The scalar L(θ) = Σ_b (c_b / c) ℓ_b(θ) over batches b, with c_b the true count behind the mean loss ℓ_b.

    The weights are those the model has at the time of each evaluation. An evaluation leaves everything as found:
    `.grad`, buffers, training flags, random streams, module attributes. It works under `no_grad` and `inference_mode`.

    Args:
        model: Any module; DistributedDataParallel, torch.compile and FSDP2 wrappers are seen through.
        loss: `loss(model, batch)` -> scalar, the mean over the batch's examples.
        data: One batch (tensor, mapping, tuple), a list of batches, a DataLoader or a dataset.
        params: Names, globs, parameters or a predicate; None takes all that require grad.
        chunk_size: Examples evaluated together; None takes whole batches, "auto" as many as `memory_budget` holds.
        dtype: Evaluate in this floating type (for example torch.float64) whatever the model's own.
        mode: "eval" (default) or "train" sets every module's flag during an evaluation, "keep" leaves the flags.
        count: `count(batch)` -> number of terms behind the batch's mean; None counts examples.
        reduction: "mean", or "sum" when `loss` is a sum, so that L is the plain sum over batches.
        check: Verify once that the loss is deterministic, finite and a mean over what is counted.
        memory_budget: Bytes for graphs kept between products; None takes half of what is free.
        group: Process group over which the data is split; L is then the mean over all ranks' data.

    Raises:
        ValueError, TypeError: on construction for parameters and options, at the first evaluation for data and loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Any,
        *,
        params: Any = None,
        chunk_size: int | str | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "eval",
        count: Callable[[Any], float] | None = None,
        reduction: str = "mean",
        check: bool = True,
        memory_budget: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` is a {type(model).__name__}; pass an nn.Module, or use Objective.from_closure")
        if not callable(loss):
            raise TypeError(f"`loss` is a {type(loss).__name__}; pass a function loss(model, batch) -> scalar")
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        self.model: nn.Module | None = unwrapped(model)
        if group is None:
            group = sharding_group(self.model)
        self._eager = is_compiled(model, loss)
        names = tuple(selected_parameters(self.model, params))
        self._configure(names, chunk_size, dtype, mode, count, reduction, check, memory_budget, group)
        self._loss = loss
        self._predict: Callable[[nn.Module, Any], Any] | None = None
        self._criterion: Callable[[Any, Any], Tensor] | None = None
        self._batches: Batches | None = Batches(data, self.device, dtype)

    @classmethod
    def supervised(
        cls,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        split: Callable[[Any], tuple[Any, Any]] | None = None,
        predict: Callable[[nn.Module, Any], Any] | None = None,
        **options: Any,
    ) -> Objective:
        """L(θ) = mean of criterion(model(inputs), targets): the form that GGN and Fisher need.

        Args:
            criterion: `criterion(prediction, target)` -> scalar. Its `reduction`, `ignore_index` and class weights
                decide how batches are weighted.
            split: `split(batch)` -> (inputs, targets); batches that are pairs need none.
            predict: `predict(model, inputs)` -> prediction; default `model(inputs)`.
            options: As for `Objective`.
        """
        if not callable(criterion):
            raise TypeError(f"`criterion` is a {type(criterion).__name__}; pass a loss such as nn.CrossEntropyLoss()")
        if isinstance(data, list) and len(data) == 2 and all(isinstance(item, Tensor) for item in data):
            data = tuple(data)  # what a DataLoader yields for one batch
        split = _pair if split is None else split
        predict = _call if predict is None else predict

        def loss(module: nn.Module, batch: Any) -> Tensor:
            inputs, targets = split(batch)
            return criterion(predict(module, inputs), targets)

        options.setdefault("reduction", reduction_of(criterion))
        counted = options.get("count") is not None
        if not counted:
            options["count"] = lambda batch: target_count(criterion, split(batch)[1])
        objective = cls(model, loss, data, **options)
        objective._count_given = counted
        objective._split, objective._predict, objective._criterion = split, predict, criterion
        objective._eager = objective._eager or is_compiled(None, criterion)
        return objective

    @classmethod
    def from_closure(
        cls,
        closure: Callable[..., Tensor],
        tensors: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        *,
        check: bool = True,
        memory_budget: int | None = None,
    ) -> Objective:
        """Any scalar over any tensors: pixels, prompts, logits.

        Args:
            closure: `closure(*tensors)` -> scalar; or without arguments, using the tensors themselves, which then
                must be leaves (only double backward can analyse that form).
            tensors: One tensor, several, or several by name.
        """
        if isinstance(tensors, Tensor):
            tensors = [tensors]
        named = dict(tensors) if isinstance(tensors, Mapping) else {str(i): t for i, t in enumerate(tensors)}
        if not named:
            raise ValueError("`tensors` is empty; give at least one tensor")
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"`tensors[{name!r}]` is {kind}; give real floating tensors")
        objective = cls.__new__(cls)
        objective.model = None
        objective._tensors = named
        objective._eager = is_compiled(None, closure)
        objective._configure(tuple(named), None, None, "keep", None, "mean", check, memory_budget, None)
        objective._takes_arguments = _accepts(closure, len(named))
        if not objective._takes_arguments and not all(tensor.is_leaf for tensor in named.values()):
            raise ValueError("`closure` takes no arguments, so `tensors` must be leaves; write closure(*tensors)")
        objective._loss = closure
        objective._predict = objective._criterion = None
        objective._batches = None
        return objective

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
        self._split = _pair
        self._takes_arguments = True
        self._look: Any = None
        self._resolved_chunk: int | None = chunk_size if isinstance(chunk_size, int) else None
        self._live: tuple[Tensor, ...] | None = None
        self.notes: list[str] = []
        parameters = self.parameters
        self.layout = Layout.of(parameters)
        kinds = {p.dtype for p in parameters.values()} if dtype is None else {dtype}
        # Vectors are at least float32: a Krylov basis in bfloat16 means nothing.
        self.dtype = torch.float32
        for kind in kinds:
            self.dtype = torch.promote_types(self.dtype, kind)
        self.coarsest_eps = max(torch.finfo(kind).eps for kind in kinds)
        self.device = next(iter(parameters.values())).device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The analysed tensors by name, as they are now."""
        if self.model is None:
            return dict(self._tensors)
        named = dict(self.model.named_parameters())
        missing = [name for name in self._names if name not in named]
        if missing:
            raise ValueError(f"the model lost its parameters {missing[:5]} since this Objective was made; make a new one")
        return {name: named[name] for name in self._names}

    @property
    def num_parameters(self) -> int:
        return self.layout.num_parameters

    @property
    def num_examples(self) -> int:
        """Examples in this rank's data (1 for a closure)."""
        return self._first_look().num_examples

    @property
    def num_batches(self) -> int:
        """Batches in this rank's data (1 for a closure)."""
        return len(self._first_look().sizes)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters on which the loss does not depend: their rows of the Hessian are zero. One gradient pass."""
        used: set[str] = set()
        with self.evaluation() as theta:
            for chunk in self.chunks():
                gradients = torch.autograd.grad(self.chunk_loss(chunk, theta), theta, allow_unused=True)
                used.update(name for name, g in zip(self._names, gradients, strict=True) if g is not None)
        return tuple(name for name in self._names if name not in used)

    @property
    def criterion(self) -> Callable[[Any, Any], Tensor] | None:
        """The criterion of the supervised form, or None."""
        return self._criterion

    @property
    def captures_tensors(self) -> bool:
        """Whether the closure uses the live tensors themselves, so that nothing can be put in their place."""
        return not self._takes_arguments

    @property
    def memory_budget(self) -> int:
        """Bytes that graphs may keep between products."""
        return self._memory_budget if self._memory_budget is not None else available_bytes(self.device) // 2

    def loss(self) -> float:
        """L(θ) at the current weights."""
        self._first_look()
        return self._loss_now()

    def gradient(self) -> Tensor:
        """∇L(θ), flat [n]."""
        self._first_look()
        with self.evaluation() as theta:
            total = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
            for chunk in self.chunks():
                total += chunk.weight * self.join(
                    torch.autograd.grad(self.chunk_loss(chunk, theta), theta, allow_unused=True)
                )
        return self.all_reduce(total)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """A flat v [n] as tensors by parameter name."""
        return self.layout.unflatten(v)

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Tensors by parameter name as a flat vector [n]."""
        return self.layout.flatten(tensors)

    def fingerprint(self) -> str:
        """SHA-256 of everything but the weights: data, loss code, mode, selection, precision."""
        sha = hashlib.sha256()
        for item in (self._names, self.layout.shapes, self._mode, self._reduction, self.dtype):
            sha.update(repr(item).encode())
        for function in (self._loss, self._predict, self._criterion, self._count if self._count_given else None):
            sha.update(_code_of(function))
        for batch in self._batches or ():
            digest(batch, sha)
        return sha.hexdigest()

    # What engines use -------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation(self, theta: Sequence[Tensor] | None = None) -> Iterator[tuple[Tensor, ...]]:
        """The model as a function: yields the tensors that stand for its parameters while the context is open.

        Without `theta` they are fresh leaves that share the parameters' memory, so that nothing accumulates into
        `.grad` and no hook of the user's parameters fires.
        """
        with ExitStack() as stack:
            stack.enter_context(plain_evaluation(self.model, self._mode, eager=self._eager))
            theta = stack.enter_context(self._leaves()) if theta is None else tuple(theta)
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
            yield tuple(_cast(full_tensor(p), self._dtype).requires_grad_() for p in tensors)
            return
        found = [tensor.requires_grad for tensor in tensors]
        for tensor in tensors:
            tensor.requires_grad_()
        try:
            yield tensors
        finally:
            for tensor, flag in zip(tensors, found, strict=True):
                tensor.requires_grad_(flag)

    def _replacements(self, theta: Sequence[Tensor]) -> dict[int, Tensor]:
        assert self.model is not None
        own = dict(zip(self._names, theta, strict=True))
        replacements = {
            id(p): own[name] if name in own else _cast(full_tensor(p), self._dtype)
            for name, p in self.model.named_parameters()
        }
        for buffer in self.model.buffers():
            replacements[id(buffer)] = _cast(buffer, self._dtype).clone()
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
        return self._loss(self.model, batch)

    def prediction(self, chunk: Chunk) -> tuple[Tensor, Any]:
        """Prediction tensor and targets of a chunk (supervised form); call inside `evaluation`."""
        if self._predict is None or self.model is None:
            raise ValueError(
                "this operator needs predictions apart from the loss; make the objective with Objective.supervised"
            )
        inputs, targets = self._split(chunk.batch)
        prediction = self._predict(self.model, inputs)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"the model's prediction is a {type(prediction).__name__}; give `predict` so that it returns one tensor, "
                "for example predict=lambda model, inputs: model(**inputs).logits"
            )
        return prediction, targets

    def example_losses(self, chunk: Chunk, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss of each example [b] and its weight [b] in the objective; call inside `evaluation`."""
        if self._batches is None:
            raise ValueError("a closure has no examples; make the objective with Objective or Objective.supervised")
        total = self._first_look().total
        pieces = [examples(chunk.batch, i, i + 1, chunk.size) for i in range(chunk.size)]
        weights = [1.0 if self._reduction == "sum" else self._terms(piece, chunk.number) / total for piece in pieces]
        losses = []
        if self._predict is not None:
            prediction, targets = self.prediction(chunk)
            whole = (prediction, targets)
            for i, weight in enumerate(weights):
                if weight > 0:
                    one, target = examples(whole, i, i + 1, chunk.size)
                    losses.append(checked_loss(self._criterion(one, target), chunk.number))  # type: ignore[misc]
        else:
            for piece, weight in zip(pieces, weights, strict=True):
                if weight > 0:
                    losses.append(checked_loss(self._evaluate(piece, theta), chunk.number))
        kept = [weight for weight in weights if weight > 0]
        return torch.stack(losses), torch.tensor(kept, dtype=losses[0].dtype, device=losses[0].device)

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

    def state_token(self) -> tuple:
        """Changes whenever weights or buffers do, also through `.data`, which leaves no version behind."""
        tensors = (
            list(self._tensors.values())
            if self.model is None
            else [*self.model.parameters(), *self.model.buffers()]
        )
        token: list[Any] = [_content(tensor) for tensor in tensors]
        if self.model is not None and self._mode == "keep":
            token.append(tuple(module.training for module in self.model.modules()))
        return tuple(token)

    # What only this class uses ----------------------------------------------------------------------------------

    def _terms(self, batch: Any, number: int) -> float:
        counted = self._count(batch) if self._count is not None else None
        if counted is None:
            return float(leading_size(batch, number))
        if not math.isfinite(float(counted)) or float(counted) < 0:
            raise ValueError(f"`count` gave {counted} for batch {number}; it must be a non-negative number")
        return float(counted)

    def _loss_now(self) -> float:
        with self.evaluation() as theta, torch.no_grad():
            total = torch.zeros((), dtype=torch.float64)
            for chunk in self.chunks():
                value = checked_loss(self._evaluate(chunk.batch, theta), chunk.number, differentiable=False)
                total += chunk.weight * value.double().cpu()
        return float(self.all_reduce(total.to(self.device)))

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

    def __repr__(self) -> str:
        kind = "closure" if self.model is None else type(self.model).__name__
        return f"Objective({kind}, n={self.num_parameters}, dtype={self.dtype}, device={self.device}, mode={self._mode!r})"


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself without its history; a sharded one gathered from its ranks."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _content(tensor: Tensor) -> tuple:
    local = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    plain = local.detach()
    if plain.numel() == 0:
        return (0, 0)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(plain.element_size(), torch.uint8)
    bits = plain.contiguous().reshape(-1).view(words)
    version = 0 if plain.is_inference() else plain._version
    return (plain.data_ptr(), version, int(bits.sum(dtype=torch.int64)))


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
    raise TypeError(
        f"a batch is a {type(batch).__name__}{length}, not a pair (inputs, targets); "
        "give split=lambda batch: (inputs, targets)"
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def _accepts(closure: Callable[..., Any], num: int) -> bool:
    try:
        signature = inspect.signature(closure)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(num))
    except TypeError:
        try:
            signature.bind()
        except TypeError:
            raise ValueError(
                f"`closure` takes neither {num} arguments (one per tensor) nor none; write closure(*tensors)"
            ) from None
        return False
    return True


def _code_of(function: Any) -> bytes:
    """Name and byte code of a function, or class and settings of a module: a loss changed means another objective."""
    if function is None:
        return b"none"
    code = getattr(function, "__code__", None)
    if code is not None:
        constants = repr([c for c in code.co_consts if not inspect.iscode(c)])
        return f"{function.__module__}.{function.__qualname__}{constants}".encode() + code.co_code
    return repr(function).encode() if isinstance(function, nn.Module) else type(function).__qualname__.encode()


__all__ = ["Chunk", "Objective", "map_tensors"]
