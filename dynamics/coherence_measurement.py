"""Coherence of the examples' Hessians along training, on a fixed part of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from ..hessian.batch_moments import SAMPLINGS, BatchMoments
from ..hessian.coherence import FACTORS, OUTPUTS, coherence
from ..landscape.objective import Objective
from ..landscape.selection import near_names
from .point import Point
from .row import Row


@dataclass(frozen=True)
class Coherence:
    """Coherence σ, what it is made of, and the learning rates that it allows SGD; see `sharpscope.coherence`.

    Rows, each after the measurement's name: σ under the name itself, with the seconds spent and arrays "matrix" [n, n],
    "example_lambda1" [n] and "gradient_norms" [n]; "_lambda1_S"; "_max_lambda1", of one example; "_lambda1", of their
    mean; "_gradient_norm", the largest of an example, which is zero where the theory holds; and for a batch size
    "_lr_exact", "_lr_condition_d", "_lr_theorem1" and "_lr_gradient_descent", thresholds of the learning rate of plain
    SGD. With `num_examples` below the data's they are those of a data set of that size, not of the whole.

    Args:
        every: Period in steps.
        num_examples: Evenly spaced over the data, the same ones at every point; two or more.
        batch_size: Of the thresholds, at most `num_examples`; None leaves them out.
        sampling: How those batches are drawn: "without_replacement", exactly `batch_size` examples in each, as a
            shuffled pass over the data gives them; or "bernoulli", each example in a batch by chance, independently of
            the others, `batch_size` of them on average.
        factor, outputs, num_columns, seed: As for `sharpscope.coherence`.

    Raises:
        ValueError: an argument is out of its range; `outputs` is "sketch" for true Hessians.
    """

    every: int | None = None
    num_examples: int = 64
    _: KW_ONLY
    batch_size: int | None = None
    sampling: str = "without_replacement"
    factor: str = "ggn"
    outputs: str = "all"
    num_columns: int = 8
    seed: int = 0
    name: str = "coherence"

    def __post_init__(self) -> None:
        for name, choices in (("factor", FACTORS), ("outputs", OUTPUTS), ("sampling", SAMPLINGS)):
            value = getattr(self, name)
            if value not in choices:
                near = near_names(str(value), choices)
                raise ValueError(f"`{name}` is {value!r}; choose among {choices} (near: {near})")
        for name, least in (("num_examples", 2), ("num_columns", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}; give a whole number, {least} or more")
        if self.factor == "hessian_psd" and self.outputs == "sketch":
            raise ValueError("`outputs` is 'sketch', which true Hessians do not have; use factor='ggn'")
        if self.batch_size is not None:
            try:
                BatchMoments.of(self.num_examples, self.batch_size, self.sampling)
            except ValueError as error:
                raise ValueError(
                    f"{error}; with `num_examples` = {self.num_examples} thresholds are those of so many: raise it for "
                    "larger batches"
                ) from None

    def measure(self, point: Point) -> Iterator[Row]:
        found = coherence(
            self._probe(point.objective),
            factor=self.factor,
            outputs=self.outputs,
            num_columns=self.num_columns,
            seed=self.seed,
        )
        arrays = {
            "matrix": found.S,
            "example_lambda1": found.example_lambda1,
            "gradient_norms": found.gradient_norms,
        }
        yield Row(self.name, found.sigma, seconds=found.seconds, arrays=arrays)
        yield Row(f"{self.name}_lambda1_S", found.lambda1_S)
        yield Row(f"{self.name}_max_lambda1", found.max_lambda1)
        yield Row(f"{self.name}_lambda1", found.lambda1)
        yield Row(f"{self.name}_gradient_norm", float(found.gradient_norms.max()))
        if self.batch_size is not None:
            thresholds = found.thresholds(self.batch_size, self.sampling)
            for kind in ("exact", "condition_d", "theorem1", "gradient_descent"):
                yield Row(f"{self.name}_lr_{kind}", getattr(thresholds, kind))

    def _probe(self, objective: Objective) -> Objective:
        available = objective.num_examples
        if self.num_examples >= available:
            return objective
        part = objective.subset(self.num_examples / available)
        if part is None:
            raise ValueError(
                f"`num_examples` is {self.num_examples} of {available}, and the objective has no such part; take two "
                "or more, of a loss that can be computed on a part of its batch"
            )
        return part
