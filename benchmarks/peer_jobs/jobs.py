"""The jobs: what every tool that offers it is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case
from .measure import Outcome, Rules, Run, Stopwatch, contest
from .networks import mlp
from .reference import SPARE, Exact, eigenvalue_error, eigenvalue_reference, relative_error
from .tools import Tool

# An exact product in float32 is closer than this; ReLU networks come to 1e-4, where masks flip in float32.
PRODUCT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        offer: The function that a tool needs. tolerance: Errors up to this are met.
        run: `run(case, tools, rules, folder)` gives each tool's outcome.
        batched: The examples come as several batches. part: Only the first of this many equal parts of them is used.
    """

    key: str
    title: str
    offer: str
    tolerance: float
    run: Callable[[Case, Sequence[Tool], Rules, Path], dict[str, Outcome]]
    batched: bool = False
    part: int = 1


def _product(offer: str, case: Case, tools: Sequence[Tool], rules: Rules, folder: Path) -> dict[str, Outcome]:
    """One product with the same vector, everything made ready before: what each of many products costs."""
    v = torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(1))
    exact = getattr(Exact(case), offer)(v)

    def prepare(tool: Tool) -> Run:
        product = tool.offer(offer)(case.copy(), v)
        product()
        return lambda number, stopwatch: product()

    contestants = {tool.name: partial(prepare, tool) for tool in tools if tool.offer(offer)}
    return contest(
        contestants,
        case.gradient,
        lambda result: (relative_error(result, exact), 1),
        PRODUCT_TOLERANCE,
        rules,
        repeat=True,
    )


def _top(k: int, tol: float, case: Case, tools: Sequence[Tool], rules: Rules, folder: Path) -> dict[str, Outcome]:
    """The k eigenvalues of largest modulus, from nothing, with a new random start in each round."""
    exact = eigenvalue_reference(case, max(k, 10), folder)
    # Longer than what is asked for, so that a value that was passed over is recognised.
    exact = exact[: k + SPARE]
    toy, v = _toy(), torch.randn(case.num_parameters)

    def prepare(tool: Tool) -> Run:
        find = tool.offer("top")
        find(toy.copy(), 1, 0.1, 0, Stopwatch())
        if tool.offer("hvp"):
            tool.offer("hvp")(case.copy(), v)()

        def run(number: int, stopwatch: Stopwatch) -> tuple[Tensor, int | None]:
            own = case.copy()
            stopwatch.restart()
            return find(own, k, tol, 100 + number, stopwatch)

        return run

    def judge(result: tuple[Any, int | None]) -> tuple[float, int | None]:
        values, products = result
        values = torch.as_tensor(values)
        return eigenvalue_error(values, exact) if len(values) == k else float("inf"), products

    contestants = {tool.name: partial(prepare, tool) for tool in tools if tool.offer("top")}
    return contest(contestants, case.gradient, judge, tol, rules)


def _toy() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Case("toy", mlp((8, 8, 4)), nn.CrossEntropyLoss(), [(torch.randn(16, 8), torch.arange(16) % 4)])


def top_job(k: int, tol: float) -> Job:
    digits = f"{tol:.0e}".replace("e-0", "e-")
    title = f"Top {k} eigenvalue{'s' if k > 1 else ''} to {digits}"
    return Job(f"top{k}-{digits}", title, "top", tol, partial(_top, k, tol))


def product_job(key: str, title: str, offer: str, **options: Any) -> Job:
    return Job(key, title, offer, PRODUCT_TOLERANCE, partial(_product, offer), **options)


IN_BATCHES = "One Hessian-vector product, the same examples in several batches"
OF_BLOCKS = "One product with the diagonal block of every parameter tensor, on a quarter of the examples"
JOBS = {
    job.key: job
    for job in (
        product_job("hvp", "One Hessian-vector product, one batch", "hvp"),
        product_job("hvp-batches", IN_BATCHES, "hvp", batched=True),
        product_job("ggn", "One Gauss-Newton product, one batch", "ggn"),
        product_job("blocks", OF_BLOCKS, "blocks", part=4),
        top_job(1, 1e-3),
        top_job(1, 1e-6),
        top_job(10, 1e-3),
    )
}
