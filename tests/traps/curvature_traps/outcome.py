"""A trap, the verdict on a tool that met it, and how the verdict is reached."""

from __future__ import annotations

import linecache
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from .adapter import Adapter, NotOffered


class Verdict(StrEnum):
    PASS = "pass"
    WRONG = "wrong"  # a wrong number, or something left changed, without a word
    REFUSED = "refused"  # its own error, or no answer by its own word, where a right answer is possible
    CRASH = "crash"  # an error that is not the tool's own
    NOT_OFFERED = "not offered"


class WrongAnswer(Exception):
    """The tool answered, and the answer or what it left behind is not right."""


class NoAnswer(Exception):
    """The tool says itself that what it returns is no answer, where it could have had one."""


@dataclass(frozen=True)
class Outcome:
    """`detail` is the measured value against the truth, or the message of the error."""

    trap: str
    verdict: Verdict
    detail: str
    seconds: float


@dataclass(frozen=True)
class Trap:
    """One known failure.

    Args:
        run: Springs the trap: returns what was measured, or raises WrongAnswer.
        refusal: Only where no right answer exists: what a refusal has to say (a regular expression), which then passes.
        slow: Needs more than a few seconds.
    """

    name: str
    family: str
    run: Callable[[Adapter], str]
    refusal: str | None = None
    slow: bool = False

    @property
    def summary(self) -> str:
        """What is asked and what would be right, in a sentence."""
        return " ".join((self.run.__doc__ or "").split())

    def spring(self, tool: Adapter) -> Outcome:
        """The tool's verdict on this trap; never raises for the tool's errors."""
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdict, detail = Verdict.PASS, self.run(tool)
        except NotOffered as error:
            verdict, detail = Verdict.NOT_OFFERED, str(error)
        except WrongAnswer as error:
            verdict, detail = Verdict.WRONG, str(error)
        except NoAnswer as error:
            verdict, detail = Verdict.REFUSED, str(error)
        except Exception as error:
            verdict, detail = self._judge(tool, error)
        return Outcome(self.name, verdict, detail, time.perf_counter() - start)

    def _judge(self, tool: Adapter, error: Exception) -> tuple[Verdict, str]:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not raised_by(tool.packages, error):
            return Verdict.CRASH, message
        if self.refusal is not None and re.search(self.refusal, str(error), re.IGNORECASE | re.DOTALL):
            return Verdict.PASS, f"refuses: {message}"
        return Verdict.REFUSED, message


def raised_by(packages: Sequence[str], error: BaseException) -> bool:
    """Whether the error comes from a `raise` statement in one of these packages: a refusal, not an accident."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return module.split(".")[0] in packages and line.startswith("raise")


def trap(
    name: str, family: str, *, refusal: str | None = None, slow: bool = False
) -> Callable[[Callable[[Adapter], str]], Trap]:
    """Makes a trap of a function whose docstring says what is asked."""
    return lambda run: Trap(name, family, run, refusal, slow)
