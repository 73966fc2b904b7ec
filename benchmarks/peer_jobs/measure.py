"""Measuring tools in turns: random order in each round, processor time in units of one gradient, errors judged."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

# One contestant's run: round number and stopwatch in, result out.
Run = Callable[[int, "Stopwatch"], Any]
# The processor clock may stand still for less.
TICK = 1e-6
# Products are repeated until a measurement takes about this many seconds.
SHORTEST = 0.03


class TooLong(Exception):
    """A run was ended by its limit."""


class Stopwatch:
    """Processor and wall seconds since `restart()`. A run restarts it where what went before is not to be counted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return max(time.process_time() - self._cpu, TICK), max(time.perf_counter() - self._wall, TICK)


@dataclass
class Sample:
    """One measured run. `gradients` is its time over that of one gradient in the same round."""

    gradients: float
    cpu: float
    wall: float
    error: float
    products: int | None = None


@dataclass
class Outcome:
    """What a tool did in all rounds of one job on one model. `ended`: its failure is that it took too long."""

    samples: list[Sample] = field(default_factory=list)
    failure: str | None = None
    ended: bool = False
    tolerance: float = math.inf

    @property
    def met(self) -> int:
        """Rounds in which the true error was within the tolerance. An error that is not a number is not."""
        return sum(sample.error <= self.tolerance for sample in self.samples)

    def met_always(self) -> bool:
        return self.failure is None and 0 < len(self.samples) == self.met

    def met_mostly(self) -> bool:
        return self.failure is None and 2 * self.met > len(self.samples)

    def quantile(self, q: float) -> float:
        values = torch.tensor([sample.gradients for sample in self.samples], dtype=torch.float64)
        return float(values.quantile(q))


@dataclass(frozen=True)
class Rules:
    """How long to measure: at most `rounds`, none begun after `seconds` of processor time; `limit` gradients a run."""

    rounds: int
    seconds: float
    limit: float = math.inf


def contest(
    contestants: Mapping[str, Callable[[], Run]],
    gradient: Callable[[], Any],
    judge: Callable[[Any], tuple[float, int | None]],
    tolerance: float,
    rules: Rules,
    *,
    repeat: bool = False,
) -> dict[str, Outcome]:
    """Run all contestants in turns.

    Args:
        contestants: By name, functions that make everything ready, warm up and return the run. None of it is counted.
        gradient: One gradient on the same data; measured once in each round, in turn with the others.
        judge: Error and number of products of a result.
        tolerance: Errors up to this are met.
        repeat: A run is a short product: repeat it until it can be measured.
    """
    outcomes = {name: Outcome(tolerance=tolerance) for name in contestants}
    gradient()
    unit, times = _timed(gradient)
    times = max(1, math.ceil(SHORTEST / unit))
    runs: dict[str, Run] = {}
    for name, prepare in contestants.items():
        with _caught(outcomes[name]):
            runs[name] = prepare()
    # What is there now is not looked at again by the collections between the runs.
    gc.collect()
    gc.freeze()
    draw, began = random.Random(0), time.process_time()
    for number in range(rules.rounds):
        if number and time.process_time() - began > rules.seconds:
            break
        turns = [name for name in [*runs, ""] if not name or outcomes[name].failure is None]
        draw.shuffle(turns)
        measured: dict[str, tuple[float, float, Any]] = {}
        units = (math.nan, math.nan)
        for name in turns:
            gc.collect()
            if not name:
                stopwatch = Stopwatch()
                for _ in range(times):
                    gradient()
                cpu, wall = stopwatch.read()
                units = (cpu / times, wall / times)
                continue
            repeats = times if repeat else 1
            with _caught(outcomes[name]), _limited(rules.limit, repeats * unit):
                measured[name] = _measured(runs[name], number, repeats)
        for name, (cpu, wall, result) in measured.items():
            error, products = judge(result)
            relative = cpu / units[0] if torch.get_num_threads() == 1 else wall / units[1]
            outcomes[name].samples.append(Sample(relative, cpu, wall, error, products))
    gc.unfreeze()
    return outcomes


def _measured(run: Run, number: int, times: int) -> tuple[float, float, Any]:
    stopwatch, result = Stopwatch(), None
    for _ in range(times):
        result = run(number, stopwatch)
    cpu, wall = stopwatch.read()
    return cpu / times, wall / times, result


def _timed(function: Callable[[], Any]) -> tuple[float, float]:
    stopwatch = Stopwatch()
    function()
    return stopwatch.read()


@contextmanager
def _caught(outcome: Outcome) -> Iterator[None]:
    """A tool that fails leaves its error and is not called again."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except TooLong as error:
        outcome.failure, outcome.ended = str(error), True
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()
        outcome.failure = text[0][:200]


@contextmanager
def _limited(gradients: float, unit: float) -> Iterator[None]:
    """End what takes more processor time than this many gradients, where the system has such a timer."""
    if not math.isfinite(gradients) or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {gradients:.0f}")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, gradients * unit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed: mapping large temporaries again can cost more than the arithmetic on them."""
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    trim_threshold, mmap_threshold = -1, -3
    most = 32 << 20  # glibc takes no more for the second
    return bool(library.mallopt(trim_threshold, 2**31 - 1)) and bool(library.mallopt(mmap_threshold, most))
