"""A small transformer on the characters of real text: what the studies of optimizers train."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data_order import DataOrder
from ..optimizers.choice import make_optimizer
from ..optimizers.closures import needs_closure
from ..workloads.models import CharTransformer
from ..workloads.text import Windows, text_windows
from .result import Line

NUM_WINDOWS = 4096
WIDTH, NUM_HEADS, NUM_LAYERS = 48, 4, 2
# The reported train loss averages this share of the steps, the last ones.
LAST_SHARE = 0.1


class CharacterTraining:
    """The model at its initial weights, and batches whose order is a function of the seed and the step.

    The text is that of the workload "char-transformer": 4096 windows of 64 characters to train on, 256 held out. The
    model has 2 layers of width 48 with 4 heads and tied output weights.

    Args:
        seed: Of the weights and of the order.
        batch_size: Windows per step.
        tied: Whether the output weights are those of the embedding; otherwise they start as a copy.
    """

    def __init__(self, seed: int = 0, *, batch_size: int = 32, tied: bool = True) -> None:
        self.windows = _windows()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = CharTransformer(
                len(self.windows.vocabulary), width=WIDTH, num_heads=NUM_HEADS, num_layers=NUM_LAYERS
            )
        if not tied:
            self.model.head.weight = nn.Parameter(self.model.embedding.weight.detach().clone())
        self._order = DataOrder(self.windows.data.train.num, batch_size, seed)

    def loss(self, step: int) -> Tensor:
        """Cross-entropy of the batch of a step, in nats per character."""
        inputs, targets = self.windows.data.train.chosen(self._order.at(step))
        return F.cross_entropy(self.model(inputs), targets)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Cross-entropy of the held-out windows."""
        held_out = self.windows.data.held_out
        return float(F.cross_entropy(self.model(held_out.inputs), held_out.targets))

    def train(
        self,
        optimizer: Optimizer,
        steps: int,
        *,
        before_step: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Makes `steps` steps at a constant learning rate; returns the batch loss of each.

        It ends early, with a last loss of infinity, where a loss is not finite. `before_step(step)` is called with
        the gradients in place, except for an optimizer that evaluates the loss itself.
        """
        losses = []
        with single_thread():
            for step in range(steps):
                loss = self._step(optimizer, step, before_step)
                if not math.isfinite(loss):
                    return [*losses, math.inf]
                losses.append(loss)
        return losses

    def _step(
        self,
        optimizer: Optimizer,
        step: int,
        before_step: Callable[[int], None] | None,
    ) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            return loss

        if needs_closure(optimizer):
            return float(optimizer.step(closure).detach())  # type: ignore[arg-type, union-attr]
        loss = closure()
        if before_step is not None:
            before_step(step)
        optimizer.step()
        return float(loss.detach())


def trained(
    optimizer: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    steps: int = 400,
    batch_size: int = 32,
    tied: bool = True,
) -> dict[str, Any]:
    """Trains the character model; see `CharacterTraining`.

    Args:
        optimizer: A name that `make_optimizer` knows.
        options: Its keyword arguments.
        seed: Of the initial weights and the order of the data.

    Returns:
        "train": mean batch loss of the last tenth of the steps; "held_out": loss on held-out text at the end;
        "curve": about 50 pairs [step, mean batch loss since the one before]. Nats per character; infinite where
        training diverged.
    """
    run = CharacterTraining(seed, batch_size=batch_size, tied=tied)
    losses = run.train(make_optimizer(optimizer, run.model, options), steps)
    last = losses[-max(1, int(steps * LAST_SHARE)) :]
    with single_thread():
        held_out = run.held_out_loss() if len(losses) == steps and math.isfinite(losses[-1]) else math.inf
    every = max(1, steps // 50)
    curve = []
    for end in range(every, len(losses) + 1, every):
        piece = losses[end - every : end]
        curve.append([end, sum(piece) / len(piece)])
    return {
        "train": sum(last) / len(last),
        "held_out": held_out if math.isfinite(held_out) else math.inf,
        "curve": curve,
    }


def tuned(
    optimizer: str,
    options: Mapping[str, Any],
    lrs: Sequence[float],
    *,
    seeds: Sequence[int],
    steps: int = 400,
    batch_size: int = 32,
    tied: bool = True,
) -> dict[str, Any]:
    """The best of the learning rates on the first seed, by train loss, and what it gives for all seeds.

    Returns:
        "lr": the best; "losses": held-out loss per seed; "train": train loss per seed; "table": train loss of the
        first seed by learning rate (keys are strings, as JSON has them); "curve": of the first seed;
        "at_edge": whether the best is the smallest or the largest one tried.
    """

    def run(lr: float, seed: int) -> dict[str, Any]:
        return trained(optimizer, {**options, "lr": lr}, seed=seed, steps=steps, batch_size=batch_size, tied=tied)

    runs = {lr: run(lr, seeds[0]) for lr in lrs}
    best = min(runs, key=lambda lr: runs[lr]["train"])
    again = [runs[best], *(run(best, seed) for seed in seeds[1:])]
    return {
        "lr": best,
        "losses": [found["held_out"] for found in again],
        "train": [found["train"] for found in again],
        "table": {str(lr): found["train"] for lr, found in runs.items()},
        "curve": runs[best]["curve"],
        "at_edge": best in (min(lrs), max(lrs)),
    }


def summary(result: Mapping[str, Any]) -> str:
    """Mean and standard deviation over seeds of the held-out loss of `tuned`, with the learning rate."""
    losses = result["losses"]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 and all(map(math.isfinite, losses)) else ""
    edge = ", an end of those tried" if result["at_edge"] else ""
    seeds = "one seed" if len(losses) == 1 else f"{len(losses)} seeds"
    return f"{statistics.fmean(losses):.3f}{spread} (lr {result['lr']:g}{edge}; {seeds})"


def curve_line(label: str, result: Mapping[str, Any]) -> Line:
    """The curve of `trained` or `tuned`."""
    return Line(label, [step for step, _ in result["curve"]], [loss for _, loss in result["curve"]])


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch's kernels: sums then have one order, and several runs share a machine well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _windows() -> Windows:
    return text_windows(num_examples=NUM_WINDOWS)
