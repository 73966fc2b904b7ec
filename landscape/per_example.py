"""One pass over the examples: mean, second moments and norms of their gradients, and what tells how they agree."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import BATCH_STATISTICS, rounding_of_losses
from .evaluation import Chunk
from .objective import Objective
from .per_example_budget import Allotment, allotment
from .per_example_factors import NotSeparable, Recorder
from .per_example_rows import GradientRows
from .per_example_singles import Singles
from .per_example_statistics import KeptExamples, PerExampleStatistics
from .per_example_sums import ChunkSums, ExampleSums
from .per_example_weights import example_weights
from .selection import near_names

log = logging.getLogger("sharpscope")

METHODS = ("auto", "factors", "vmap", "loop")
COLLECTIONS = ("all", "sums")

# Roundings by which weights are moved to see what rounding does to a gradient.
UNITS_MOVED = 32
# Kinds of batches that were verified, as the first look is, once: what an axis means follows from the sizes, the
# functions of torch that are called and their axes. Which parameters are used where is seen anew in every pass.
_verified: WeakKeyDictionary[Objective, set[tuple[str, int, int]]] = WeakKeyDictionary()


class MixedExamples(ValueError):
    """The loss of a batch is not the weighted mean of its examples' own losses."""


def per_example_statistics(
    objective: Objective,
    *,
    collect: str = "all",
    memory_budget: int | None = None,
    chunk_size: int | None = None,
    method: str = "auto",
    seed: int = 0,
) -> PerExampleStatistics:
    r"""What the gradients g_i of the examples' losses tell, in one pass over the data.

    The result has their mean, second moments and norms, and from these and from the gradients that the pass kept
    `.snr(...)`, `.noise_scale()`, `.alignment()` and `.tail_index()`, without another look at the model.

    g_i is the gradient of the mean loss of example i and w_i its weight, with Σ_i w_i g_i = ∇L as in
    `Fisher(kind="empirical")`: 1/N for a mean over examples, its share of the terms that are not ignored where a
    criterion or `count` tells, 1 for reduction="sum". An example is an entry of the batch axis: for a sequence model a
    whole sequence, also where predictions are flattened to [b · length, ...]. One without any term has no gradient and
    is left out.

    method="factors" takes one ordinary forward and backward pass and builds the gradients, parameter by parameter and
    few examples at a time, from what went into each operation and what came back: linear, convolution, embedding,
    layer, group, RMS and evaluation-mode batch norm, products with matrices, scales, shifts, whatever module or
    function calls them, tied weights included. In dense layers no gradient of an example is formed at all. "vmap"
    vectorises the gradient over examples, "loop" takes one example after the other. "auto" starts with the first and
    uses the others for parameters and models that it does not cover; `method` of the result says what was used. Of
    each kind of batch (sizes, functions called and their axes) one example's gradient is verified, once for an
    objective, by a backward pass of its own.

    Fastest from `Objective.supervised` with a criterion that is known (cross-entropy, squared error and the like): with
    others every example's loss has to be computed as well, to see that the batch's is their mean.

    Args:
        collect: "all" also keeps what inner products g_i · g_j need: p + q numbers per example for a dense layer with
            one row per example, where that is less than p · q, else the gradient itself. What does not fit is sketched
            (`sketched` of the result), which leaves inner products with an error that is stated. "sums" keeps none of
            it and is faster; then there is no alignment, no tail index, and no interval of the noise scale.
        memory_budget: Bytes that the pass may take, with the graphs, the sums and what is kept: examples are then
            evaluated in chunks that fit, at the price of forward passes of a few to see what they take. (The
            objective's own first look, once, is outside it and takes whole batches.) None takes chunks as the
            objective does and keeps at most 1 GiB.
        chunk_size: Examples whose gradients exist at one time; None takes as many as fit a small buffer. (Examples
            that are evaluated together: `Objective(chunk_size=...)`.)
        method: "auto", "factors", "vmap" or "loop".
        seed: Of the sketch and of the entries sampled for tail indices.

    Raises:
        ValueError: an option that does not exist, no examples (a closure), the loss mixes examples or is not their
            weighted mean; with method="factors" also when the method does not cover the model.
        InsufficientMemory: the pass cannot keep within `memory_budget`; the message says what it needs at least.

    Source: Goodfellow, Efficient Per-Example Gradient Computations, 2015; Dangel, Kunstner and Hennig, BackPACK, 2020.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; choose among {METHODS} (near: {near_names(str(method), METHODS)})")
    if collect not in COLLECTIONS:
        near = near_names(str(collect), COLLECTIONS)
        raise ValueError(f"`collect` is {collect!r}; choose among {COLLECTIONS} (near: {near})")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` is {chunk_size!r}; give a positive number of examples, an integer, or None")
    if objective._batches is None:
        raise ValueError("a closure has no examples; make the objective with Objective or Objective.supervised")
    allotted = allotment(objective, memory_budget, keep=collect == "all")
    for name in METHODS[1:] if method == "auto" else (method,):
        try:
            return _Pass(objective, allotted, chunk_size, name, seed).run()
        except (MixedExamples, MemoryError, torch.OutOfMemoryError):
            raise
        except NotSeparable as error:
            if method != "auto":
                raise ValueError(f"method={method!r} does not cover this model: {error}; use method='auto'") from error
            log.info("per-example gradients: factors do not cover this model (%s)", error)
        except Exception as error:
            if method != "auto" or name == "loop":
                raise
            log.info("per-example gradients: method %r failed (%s: %s)", name, type(error).__name__, error)
    raise AssertionError("unreachable: the last method returns or raises")


class _Pass:
    """One pass over the data by one method."""

    def __init__(
        self, objective: Objective, allotted: Allotment, chunk_size: int | None, method: str, seed: int
    ) -> None:
        self.verified = _verified.setdefault(objective, set())
        if allotted.examples is not None:
            objective = copy.copy(objective)
            objective._resolved_chunk = allotted.examples
        self.objective, self.allotted, self.chunk_size, self.method = objective, allotted, chunk_size, method
        self.seed, self.used = seed, {method}

    def run(self) -> PerExampleStatistics:
        objective, allotted, rows = self.objective, self.allotted, None
        with objective.evaluation() as theta:
            self._refuse_batch_statistics()
            if allotted.kept_bytes is not None:
                rows = GradientRows(theta, objective.dtype, objective.num_examples, allotted.kept_bytes, self.seed)
            sums = ExampleSums(theta, objective.dtype, self.chunk_size, rows, allotted.entries)
            for chunk in objective.chunks():
                self._add(chunk, theta, sums)
            sums.close()
            mean, second = self._joined(sums.mean), self._joined(sums.second)
        mean, second = objective.all_reduce(mean), objective.all_reduce(second)
        own = torch.cat(sums.norms), torch.cat(sums.weights)
        norms, weights = (self._of_all_ranks(numbers) for numbers in own)
        along = None if rows is None else self._of_all_ranks(rows.times(mean) / float(weights.sum()))
        return PerExampleStatistics(
            mean=mean,
            second_moment=second,
            norms=norms.to(objective.device, objective.dtype),
            weights=weights,
            layout=objective.layout,
            method="+".join(name for name in METHODS if name in self.used),
            along=along,
            kept=None if rows is None else KeptExamples(rows, *own),
        )

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        whole = pieces[0]._base
        return self.objective.join(pieces) if whole is None else whole

    def _add(self, chunk: Chunk, theta: Sequence[Tensor], all_sums: ExampleSums) -> None:
        weights, certain = example_weights(self.objective, chunk)
        sums, singles = ChunkSums(all_sums, weights, chunk.weight), Singles(self.objective, chunk, theta)
        every, signature, losses = range(len(theta)), 0, None
        if self.method == "factors":
            recorder = Recorder(theta, sums)
            with recorder:
                loss = self.objective.chunk_loss(chunk, theta)
            rest = sorted(recorder.others(loss))
            if rest and not recorder.mostly_dense(rest):
                raise NotSeparable(f"parameters such as {self.objective.layout.names[rest[0]]!r} are used otherwise")
            if recorder.reorders:
                raise NotSeparable("rows may change places by their values, through an index or a sort")
            signature = hash(tuple(recorder.uses))
            recorder.backward(loss)
            if rest:
                self.used.add("vmap")
                losses = singles.add(sums, rest, self.chunk_size, vectorised=True)
            elif not certain:
                losses = singles.losses(sums.kept)
        else:
            losses = singles.add(sums, every, self.chunk_size, vectorised=self.method == "vmap")
            loss = self.objective.chunk_loss(chunk, theta)
        if losses is not None:
            self._check_losses(chunk, weights[sums.kept], losses, chunk.weight * float(loss.detach()))
        kind = (self.method, sums.size, signature)
        if self.method != "loop" and kind not in self.verified and self._verify(sums, singles):
            self.verified.add(kind)
        sums.close()

    def _check_losses(self, chunk: Chunk, weights: Tensor, losses: Tensor, whole: float) -> None:
        total, largest = float(weights @ losses), float(losses.abs().max())
        share = float(weights.sum())
        if not abs(whole - total) <= share * rounding_of_losses(self.objective.coarsest_eps, largest):
            raise MixedExamples(
                f"the losses of the single examples of batch {chunk.number} add up to {total:.6g}, its own loss to "
                f"{whole:.6g}: the loss mixes examples or is not their mean, so per-example gradients do not exist"
            )

    def _verify(self, sums: ChunkSums, singles: Singles) -> bool:
        """One example's gradient, parameter by parameter, against a backward pass of its own.

        Near an exact fit gradients are made of the rounding of predictions, and so differ from method to method by as
        much as they are. How far rounding goes is then seen by moving the weights by some units of it.

        Returns:
            False where they agree within that rounding only, so that another point has to be looked at too.

        Raises:
            NotSeparable: they differ by more than rounding: rows were taken for those of other examples.
        """
        numbers = torch.nonzero(sums.kept).reshape(-1)
        i = int(numbers[2 * len(numbers) // 3])
        own = singles.gradient(i)
        norms = torch.stack([_norm(g) for g in own])
        eps = self.objective.coarsest_eps
        allowed = math.sqrt(eps) * norms + min(1e3 * eps, 0.1) * norms.norm()
        apart = (sums.norms_of(i) - norms).abs()
        if bool((apart <= allowed).all()):
            return True
        nearby = singles.gradient_nearby(i, min(UNITS_MOVED * eps, math.sqrt(eps)))
        by_rounding = torch.stack([_norm(a - b) for a, b in zip(nearby, own, strict=True)])
        if not bool((apart <= allowed + by_rounding).all()):
            raise NotSeparable("the gradient of an example differs from what a backward pass of its own gives")
        return False

    def _refuse_batch_statistics(self) -> None:
        assert self.objective.model is not None
        for name, module in self.objective.model.named_modules():
            if isinstance(module, BATCH_STATISTICS) and (module.training or module.running_mean is None):
                raise MixedExamples(
                    f"{name or 'the model'} takes its statistics from each batch and so mixes examples, which "
                    "then have no gradients of their own; use mode='eval' and running statistics"
                )

    def _of_all_ranks(self, numbers: Tensor) -> Tensor:
        group = self.objective.group
        if group is None:
            return numbers
        found: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, numbers, group=group)
        return torch.cat(found)


def _norm(gradient: Tensor) -> Tensor:
    """‖g‖ in float64, by rows: a float32 norm of very many entries loses digits."""
    rows = gradient.reshape(len(gradient), -1) if gradient.ndim else gradient.reshape(1, 1)
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1).double()).cpu()
