"""Schedules of step number t = 1, 2, ...: learning rates and averaging parameters as the theory of Adam states them.

Each is a small frozen object with a plain text form, `str(schedule)`, which `schedule_of` reads back. The text is what
optimizers keep in their options, so that state dictionaries hold plain values only.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from .option_checks import check_number

Values = NDArray[np.float64]


class Schedule(ABC):
    """A function of the step number.

    Subclasses are frozen dataclasses of numbers with a `letter`: the text form is "letter=first, name=other".
    """

    letter: ClassVar[str]

    @abstractmethod
    def values(self, t: Values) -> Values:
        """At all steps t, each >= 1."""

    def __call__(self, t: int) -> float:
        if t < 1:
            raise ValueError(f"`t` is {t}; steps count from 1")
        return float(self.values(np.asarray(float(t))))

    def __str__(self) -> str:
        first, *others = fields(self)  # type: ignore[arg-type]
        parts = [f"{self.letter}={getattr(self, first.name)!r}"]
        parts += [f"{f.name}={getattr(self, f.name)!r}" for f in others if getattr(self, f.name) != f.default]
        return ",".join(parts)


@dataclass(frozen=True)
class PowerSchedule(Schedule):
    """t^-s: the decay of the learning rate in the theory. s = 1/2 is the usual one, 0 a constant. Text: "s=0.5"."""

    s: float
    letter: ClassVar[str] = "s"

    def __post_init__(self) -> None:
        check_number("s", self.s, least=0)

    def values(self, t: Values) -> Values:
        return np.asarray(t**-self.s)


@dataclass(frozen=True)
class PolynomialTheta(Schedule):
    """θ_t = 1 − c / max(t, start)^r. Text: "theta_r=1.0,c=0.5,start=10".

    With start = 1, r = 1, c = 1 the second moment is the plain mean of all squared gradients, as in AdaGrad.

    Args:
        r: Exponent, at least 0.
        c: In (0, 1] times start^r, so that 0 <= θ_t < 1.
        start: Before it θ is constant. The theory wants θ_1 > β²: start >= (c / (1 − β²))^(1/r).

    Source: Zou, Shen, Jie, Zhang, Liu, A Sufficient Condition for Convergences of Adam and RMSProp, CVPR 2019, the
    corollary on polynomial schedules.
    """

    r: float
    c: float = 1.0
    start: float = 1.0
    letter: ClassVar[str] = "theta_r"

    def __post_init__(self) -> None:
        check_number("r", self.r, least=0)
        check_number("start", self.start, least=1)
        check_number("c", self.c, above=0, most=self.start**self.r)

    def values(self, t: Values) -> Values:
        return 1 - self.c / np.maximum(t, self.start) ** self.r


@dataclass(frozen=True)
class PaperTheta(Schedule):
    """θ_t = 1 − (base + (1 − base) r) / t^r: the family of the published experiments. Text: "r=0.25".

    r = 0 is the constant 1 − base and r = 1 is 1 − 1/t. At small t these violate θ_1 > β² of the theory, for example
    with θ_1 = 0.4995 for r = 1/2.

    Args:
        r: In [0, 1].
        base: 0.001 with networks, 0.01 in the counterexample.

    Source: the experiments of the paper above.
    """

    r: float
    base: float = 0.001
    letter: ClassVar[str] = "r"

    def __post_init__(self) -> None:
        check_number("r", self.r, least=0, most=1)
        check_number("base", self.base, above=0, most=1)

    def values(self, t: Values) -> Values:
        return 1 - (self.base + (1 - self.base) * self.r) / t**self.r


@dataclass(frozen=True)
class CorrectedTheta(Schedule):
    """θ_t = β₂ (1 − β₂^(t−1)) / (1 − β₂ᵗ): v_t is then Adam's corrected second moment. Text: "corrected=0.999"."""

    beta2: float
    letter: ClassVar[str] = "corrected"

    def __post_init__(self) -> None:
        check_number("beta2", self.beta2, above=0, below=1)

    def values(self, t: Values) -> Values:
        log = math.log(self.beta2)  # 1 − β^t without cancellation
        return self.beta2 * np.expm1(log * (t - 1)) / np.expm1(log * t)


@dataclass(frozen=True)
class MomentumCorrection(Schedule):
    """1 / (1 − β₁ᵗ): Adam's correction of the first moment, as a factor on the learning rate. Text: "momentum=0.9"."""

    beta1: float
    letter: ClassVar[str] = "momentum"

    def __post_init__(self) -> None:
        check_number("beta1", self.beta1, above=0, below=1)

    def values(self, t: Values) -> Values:
        return -1 / np.expm1(math.log(self.beta1) * t)


KINDS: dict[str, type[Schedule]] = {
    kind.letter: kind for kind in (PowerSchedule, PaperTheta, PolynomialTheta, CorrectedTheta, MomentumCorrection)
}


def practical(T: int, c: float = 1.0, *, a: float = 1.0, batch_size: int = 1) -> dict[str, float]:
    """Options of `GenericAdam` for a run of known length: α = a √(s/T) and θ = 1 − c/T, of rate 1/√(sT).

    The factor √s supposes a second moment that does not depend on s. Where minibatch noise dominates it falls as 1/s,
    which already makes the steps grow as √s: leave `batch_size` at 1 then. The study "generic-adam" measures both.

    Args:
        T: Number of steps.
        c: In (0, T].
        a: Scale of the learning rate.
        batch_size: s; the speedup is linear while s is small against √T.

    Source: Chen, Shen, Zou, Liu, Towards Practical Adam, JMLR 2022, the corollaries on constant parameters and on
    mini-batches.
    """
    check_number("T", T, least=1)
    check_number("c", c, above=0, most=T)
    check_number("a", a, above=0)
    check_number("batch_size", batch_size, least=1)
    return {"lr": a * math.sqrt(batch_size / T), "theta": 1 - c / T}


def plain(name: str, given: Any) -> Any:
    """What an optimizer keeps in its options: a number as it is, a schedule of this file as its text.

    Any other function of the step number is kept itself; whether it can be pickled is then up to it.

    Raises:
        TypeError, ValueError: `given` is none of these.
    """
    if isinstance(given, Schedule):
        return str(given)
    if isinstance(given, str):
        return str(_parsed(given, name))
    if callable(given):
        return given
    check_number(name, given, least=0)
    return given


def schedule_of(given: Any) -> Callable[[int], float]:
    """The function of the step number behind a number, a text such as "r=0.25", or a function."""
    if isinstance(given, str):
        return _parsed(given)
    if callable(given):
        return cast(Callable[[int], float], given)
    return lambda t: float(given)


@functools.lru_cache(maxsize=256)
def _parsed(text: str, name: str = "schedule") -> Schedule:
    pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
    rule = f"write one of {', '.join(f'{letter}=NUMBER' for letter in KINDS)}, other numbers after a comma"
    if any(len(pair) != 2 for pair in pairs) or pairs[0][0] not in KINDS:
        raise ValueError(f"`{name}` is {text!r}, which names no schedule; {rule}")
    kind = KINDS[pairs[0][0]]
    first, *others = (f.name for f in fields(kind))  # type: ignore[arg-type]
    pairs[0][0] = first
    options = {}
    for key, number in pairs:
        if key not in (first, *others):
            raise ValueError(
                f"`{name}` is {text!r}; {kind.__name__} has no {key!r}, it takes {', '.join((first, *others))}"
            )
        try:
            options[key] = float(number)
        except ValueError as error:
            raise ValueError(f"`{name}` is {text!r}, in which {number!r} is no number; {rule}") from error
    return kind(**options)
