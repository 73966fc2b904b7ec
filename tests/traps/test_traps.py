"""sharpscope meets every trap of the suite."""

import pytest
from curvature_traps import TRAPS, Trap, Verdict
from sharpscope_adapter import adapter

PARAMETERS = [pytest.param(t, id=t.name.replace(" ", "-"), marks=[pytest.mark.slow] * t.slow) for t in TRAPS]


@pytest.mark.parametrize("trap", PARAMETERS)
def test_sharpscope_is_not_caught(trap: Trap) -> None:
    outcome = trap.spring(adapter)
    assert outcome.verdict is Verdict.PASS, f"{outcome.verdict}: {outcome.detail}\nAsked: {trap.summary}"
