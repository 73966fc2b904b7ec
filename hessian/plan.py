"""What an algorithm will take, before it runs: products, seconds and memory."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..landscape.peak_memory import peak_bytes
from .lanczos import plain_tensors
from .operator import LinearOperator

# Runs that are timed.
TIMED = 2

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Plan:
    """What one call is expected to take.

    Attributes:
        algorithm: Name of the function.
        products: Operator products expected; the whole budget where nothing tells how many it takes.
        most_products: The budget, where the number depends on what is found; else None.
        seconds: Time expected, from products timed while planning.
        bytes: Peak memory of tensors expected, above what was in use before planning.
        available: Memory that was free then, in bytes.
        spent: Products made to plan.
        cure: What would fit; said where this does not.
    """

    algorithm: str
    products: int
    most_products: int | None
    seconds: float
    bytes: int
    available: int
    spent: int
    cure: str

    @property
    def fits(self) -> bool:
        """The memory is there."""
        return self.bytes <= self.available

    def __str__(self) -> str:
        if self.most_products == self.products:
            count = f"at most {self.products} products"
        else:
            count = f"{self.products} products" + (
                "" if self.most_products is None else f" (at most {self.most_products})"
            )
        memory = f"{self.bytes / 2**30:.2f} GiB of {self.available / 2**30:.2f} GiB free"
        state = "" if self.fits else f"; does NOT fit: {self.cure}"
        return f"{self.algorithm}: {count}, {self.seconds:.3g} s, peak memory {memory}{state}"


class Planned(Protocol[P, R_co]):
    """A function that can say beforehand what a call will take."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def plan(self, *args: P.args, **kwargs: P.kwargs) -> Plan:
        """The plan of the call with these arguments. A few products are made and timed."""
        ...


def planned(planner: Callable[[Mapping[str, Any]], Plan]) -> Callable[[Callable[P, R_co]], Planned[P, R_co]]:
    """Gives a function `.plan(...)`, which takes the same arguments.

    Args:
        planner: Makes the plan from the arguments by name, defaults filled in.
    """

    def decorate(function: Callable[P, R_co]) -> Planned[P, R_co]:
        signature = inspect.signature(function)

        @functools.wraps(planner, assigned=("__doc__",))
        def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return planner(bound.arguments)

        plan.__signature__ = signature.replace(return_annotation="Plan")  # type: ignore[attr-defined]
        function.plan = plan  # type: ignore[attr-defined]
        return cast("Planned[P, R_co]", function)

    return decorate


@dataclass(frozen=True)
class ProductCost:
    """What products with an operator take.

    Attributes:
        seconds: Of one, once the operator keeps what it keeps.
        kept_bytes: What it keeps between products, made by the first one.
        first_bytes: The most that the first product holds.
        more_bytes: The most that a later one holds beside what is kept.
        spent: Products made to find out.
    """

    seconds: float
    kept_bytes: int
    first_bytes: int
    more_bytes: int
    spent: int

    def peak(self, beside: int) -> int:
        """Peak memory of a run of products that holds `beside` bytes at its end."""
        return max(self.first_bytes, self.kept_bytes + self.more_bytes + beside)


def product_cost(op: LinearOperator) -> ProductCost:
    """Makes, measures and times a few products with `op`."""
    v = torch.full((op.shape[0],), op.shape[0] ** -0.5, dtype=op.dtype, device=op.device)
    with plain_tensors(), op.fixed():
        first = peak_bytes(lambda: op.matvec(v), op.device)
        more = peak_bytes(lambda: op.matvec(v), op.device)
        seconds = timed(lambda: op.matvec(v))
    return ProductCost(seconds, first.kept, first.peak, more.peak, 2 + TIMED)


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds of one run, the least of a few."""
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        result = run()
        if result.device.type == "cuda":
            torch.cuda.synchronize(result.device)
        times.append(time.perf_counter() - began)
    return min(times)
