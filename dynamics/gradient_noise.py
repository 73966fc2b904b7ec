"""Measurements of gradient noise: what the gradients of single examples and of minibatches say beside their mean."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

from ..hessian.batch_sharpness import batch_sharpness
from ..landscape.per_example import per_example_statistics
from ..landscape.per_example_snr import DEFINITIONS, OF_MODULES, Definition
from ..landscape.per_example_statistics import PerExampleStatistics
from ..landscape.selection import near_names
from ..landscape.tail_index import TAIL_METHODS
from .point import Point
from .row import Row


@dataclass(frozen=True)
class GradientSNR:
    """Signal-to-noise ratio of single examples' gradients, mean² over variance; `PerExampleStatistics.snr`.

    For the gradient of B independent examples it is B times as large.

    Rows: one of the whole model, or one for each part, under its name as block.

    Args:
        every: Period in steps.
        by: "whole", "parameter", "layer", or a glob.
        definition: "ratio", "mean", "spatial" or, with by="parameter" only, "second_moment".
        memory_budget: Bytes for the pass over examples, which is shared by all measurements with the same budget.
    """

    every: int | None = None
    by: str = "whole"
    definition: Definition = "ratio"
    _: KW_ONLY
    memory_budget: int | None = None
    name: str = "gradient_snr"

    def __post_init__(self) -> None:
        if self.by == "element":
            raise ValueError("`by` is 'element'; a trajectory has no row for each weight: take 'parameter' or 'layer'")
        if not isinstance(self.by, str) or self.by in OF_MODULES:
            raise ValueError(f"`by` is {self.by!r}; a measurement takes 'whole', 'parameter', 'layer', or a glob")
        _check_choice("definition", self.definition, DEFINITIONS)
        if self.definition == "second_moment" and self.by != "parameter":
            raise ValueError(
                f"`by` is {self.by!r} but `definition` is 'second_moment', which runs over a tensor's axes; "
                "give by='parameter'"
            )
        _check_budget(self.memory_budget)

    def measure(self, point: Point) -> Iterator[Row]:
        start = time.perf_counter()
        found = _statistics(point, self.memory_budget).snr(by=self.by, definition=self.definition)
        seconds = time.perf_counter() - start
        parts = found if isinstance(found, dict) else {"": float(found)}
        for number, (block, value) in enumerate(parts.items()):
            yield Row(self.name, value, block=block, seconds=seconds if number == 0 else 0.0)


@dataclass(frozen=True)
class GradientNoiseScale:
    """Simple gradient noise scale tr Σ / |G|², in examples, with its standard error; `noise_scale`.

    Rows: also NAME_low and NAME_high, the ends of the 95 % interval.

    Args:
        every: Period in steps.
        memory_budget: As in `GradientSNR`.
    """

    every: int | None = None
    _: KW_ONLY
    memory_budget: int | None = None
    name: str = "noise_scale"

    def __post_init__(self) -> None:
        _check_budget(self.memory_budget)

    def measure(self, point: Point) -> Iterator[Row]:
        start = time.perf_counter()
        found = _statistics(point, self.memory_budget).noise_scale()
        yield Row(self.name, found.estimate, found.stderr, seconds=time.perf_counter() - start)
        yield Row(f"{self.name}_low", found.low)
        yield Row(f"{self.name}_high", found.high)


@dataclass(frozen=True)
class GradientAlignment:
    """How much the gradients of different examples point the same way; `alignment`.

    Rows: NAME_mean_cosine between two examples, NAME_diversity Σ‖g_i‖² / ‖Σ g_i‖², NAME_negative_share of pairs with a
    negative inner product, each with its standard error; NAME_confusion, max(0, −min g_i · g_j), with the error of
    the sketch where inner products are estimates.

    Args:
        every: Period in steps.
        memory_budget: As in `GradientSNR`.
    """

    every: int | None = None
    _: KW_ONLY
    memory_budget: int | None = None
    name: str = "gradient_alignment"

    def __post_init__(self) -> None:
        _check_budget(self.memory_budget)

    def measure(self, point: Point) -> Iterator[Row]:
        start = time.perf_counter()
        found = _statistics(point, self.memory_budget).alignment()
        seconds = time.perf_counter() - start
        yield Row(f"{self.name}_mean_cosine", found.mean_cosine, found.mean_cosine_stderr, seconds=seconds)
        yield Row(f"{self.name}_diversity", found.diversity, found.diversity_stderr)
        yield Row(f"{self.name}_negative_share", found.negative_share, found.negative_share_stderr)
        yield Row(f"{self.name}_confusion", found.confusion, found.confusion_error)


@dataclass(frozen=True)
class GradientTailIndex:
    """Tail index of the gradient noise of single examples, parameter by parameter; `tail_index`.

    About 2 for any noise of finite variance once there are examples enough; a value below is no proof of an infinite
    one.

    Rows: the median over parameters, and one for each parameter as block, whose error is half the width of its 95 %
    interval.

    Args:
        every: Period in steps.
        method: "logmoment" or "hill".
        memory_budget: As in `GradientSNR`.
    """

    every: int | None = None
    method: str = "logmoment"
    _: KW_ONLY
    memory_budget: int | None = None
    name: str = "tail_index"

    def __post_init__(self) -> None:
        _check_choice("method", self.method, TAIL_METHODS)
        _check_budget(self.memory_budget)

    def measure(self, point: Point) -> Iterator[Row]:
        start = time.perf_counter()
        found = _statistics(point, self.memory_budget).tail_index(method=self.method)
        yield Row(self.name, found.median, seconds=time.perf_counter() - start)
        for block, index in found.parameters.items():
            yield Row(self.name, index.estimate, (index.high - index.low) / 2, block=block)


@dataclass(frozen=True)
class BatchSharpness:
    """E[∇L_Bᵀ H_B ∇L_B] / E‖∇L_B‖² over random minibatches B, with its standard error; see `batch_sharpness`.

    Args:
        every: Period in steps.
        batch_size: Examples of a minibatch: that of the training.
        num_batches: Minibatches, the same at every point.
        seed: Of their choice.
    """

    every: int | None = None
    batch_size: int = 32
    num_batches: int = 32
    _: KW_ONLY
    seed: int = 0
    name: str = "batch_sharpness"

    def __post_init__(self) -> None:
        _check_count("batch_size", self.batch_size, "a number of examples, at least 1")
        _check_count("num_batches", self.num_batches, "a number of minibatches, at least 1")

    def measure(self, point: Point) -> Iterator[Row]:
        start = time.perf_counter()
        found = batch_sharpness(point.objective, self.batch_size, num_batches=self.num_batches, seed=self.seed)
        yield Row(
            self.name,
            found.estimate,
            found.stderr,
            converged=math.isfinite(found.estimate),
            products=found.products,
            seconds=time.perf_counter() - start,
        )


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        near = near_names(str(value), choices)
        raise ValueError(f"`{name}` is {value!r}; choose among {tuple(choices)} (near: {near})")


def _check_count(name: str, value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; give {what}")


def _check_budget(memory_budget: int | None) -> None:
    if memory_budget is not None:
        _check_count("memory_budget", memory_budget, "a positive number of bytes, or None")


def _statistics(point: Point, memory_budget: int | None) -> PerExampleStatistics:
    """One pass over the examples for all measurements of the point."""
    return point.shared(
        f"per_example {memory_budget}", lambda: per_example_statistics(point.objective, memory_budget=memory_budget)
    )
