"""The loss as a function of the weights: model + loss + data, evaluated without leaving a trace."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import Batches, chosen, digest
from .callables import accepts, call, code_of, pair
from .checks import NESTED, Look, NestedDifferentiation, checked_loss, custom_functions
from .counting import reduction_of, target_count
from .evaluation import Evaluation
from .guard import is_compiled
from .selection import selected_parameters, unwrapped
from .sharded import sharding_group


class Objective(Evaluation):
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
        split = pair if split is None else split
        predict = call if predict is None else predict

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
        objective._takes_arguments = accepts(closure, len(named))
        if not objective._takes_arguments and not all(tensor.is_leaf for tensor in named.values()):
            raise ValueError("`closure` takes no arguments, so `tensors` must be leaves; write closure(*tensors)")
        objective._loss = closure
        objective._predict = objective._criterion = None
        objective._batches = None
        return objective

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
    def custom_functions(self) -> tuple[str, ...]:
        """The user's own autograd functions on the way to the loss, whose second derivatives engines verify; with
        `torch.autograd.grad` among them where the loss differentiates inside itself."""
        if self._custom_functions is None:
            found: set[str] = set()
            with self.evaluation() as theta:
                for chunk in self.chunks():
                    with NestedDifferentiation() as nested:
                        loss = self.chunk_loss(chunk, theta)
                    found.update(custom_functions(loss, ()), nested.found)
            self._custom_functions = tuple(sorted(found))
        return self._custom_functions

    @property
    def differentiates_inside(self) -> bool:
        """Whether the loss takes derivatives inside itself."""
        return NESTED in self.custom_functions

    @property
    def criterion(self) -> Callable[[Any, Any], Tensor] | None:
        """The criterion of the supervised form, or None."""
        return self._criterion

    def loss(self) -> float:
        """L(θ) at the current weights."""
        self._first_look()
        with self.evaluation() as theta:
            total = torch.zeros((), dtype=torch.float64)
            for chunk in self.chunks():
                # With gradients on: a loss may differentiate inside itself, as physics-informed ones do.
                value = checked_loss(self._evaluate(chunk.batch, theta), chunk.number, differentiable=False).detach()
                total += chunk.weight * value.double().cpu()
        return float(self.all_reduce(total.to(self.device)))

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

    def subset(self, share: float) -> Objective | None:
        """The same loss on about this share of the examples, evenly spaced, so always the same ones.

        Whole batches where there are enough of them, else examples of each batch. It shares the model, holds its
        examples in memory and is not checked again.

        Args:
            share: Above 0 and below 1.

        Returns:
            None for a closure, for fewer examples than 2 / share, or where the loss does not take part of a batch.
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"`share` is {share}; it must lie between 0 and 1")
        look = self._first_look()
        if self._batches is None or look.num_examples * share < 2:
            return None
        for flattened in (False, True):
            kept = self._evenly_spaced(share, flattened=flattened)
            terms = tuple(self._terms(batch, number) for number, (batch, _) in enumerate(kept))
            total = float(self.all_reduce(torch.tensor(sum(terms), dtype=torch.float64, device=self.device)))
            part = copy.copy(self)
            part._batches = Batches.in_hand([batch for batch, _ in kept], self.device)
            part._look = Look(tuple(size for _, size in kept), terms, total)
            part.notes, part._fixed_token = [], None
            try:
                with part.evaluation() as theta:
                    checked_loss(part._evaluate(kept[0][0], theta), 0)
            except (ValueError, RuntimeError, IndexError):
                continue
            return part if total > 0 else None
        return None

    def _evenly_spaced(self, share: float, *, flattened: bool) -> list[tuple[Any, int]]:
        """Batches with their sizes that hold about `share` of the examples."""
        assert self._batches is not None
        sizes = self._first_look().sizes
        count = round(share * len(sizes))
        if count >= 2:
            numbers = {int((i + 0.5) * len(sizes) / count) for i in range(count)}
            return [(batch, sizes[number]) for number, batch in enumerate(self._batches) if number in numbers]
        count = round(share * sum(sizes))
        picks = torch.arange(count).add(0.5).mul(sum(sizes) / count).long()
        kept, first = [], 0
        for size, batch in zip(sizes, self._batches, strict=False):
            rows = picks[(picks >= first) & (picks < first + size)] - first
            if len(rows):
                kept.append((chosen(batch, rows, size, flattened=flattened), len(rows)))
            first += size
        return kept

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
        for function in (
            self._loss,
            self._predict,
            self._criterion,
            self._split,
            self._count if self._count_given else None,
        ):
            sha.update(code_of(function))
        for batch in self._batches or ():
            digest(batch, sha)
        return sha.hexdigest()

    def __repr__(self) -> str:
        kind = "closure" if self.model is None else type(self.model).__name__
        return (
            f"Objective({kind}, n={self.num_parameters}, dtype={self.dtype}, device={self.device}, mode={self._mode!r})"
        )
