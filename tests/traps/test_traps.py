"""sharpscope meets every trap of the suite."""

import pytest
from curvature_traps import TRAPS, Trap, Verdict
from sharpscope_adapter import Sharpscope, adapter

PARAMETERS = [pytest.param(t, id=t.name.replace(" ", "-"), marks=[pytest.mark.slow] * t.slow) for t in TRAPS]
# torch.func cannot run activation checkpointing at all.
REFUSED = {("non-reentrant checkpointing", "forward-over-reverse")}


@pytest.mark.parametrize("trap", PARAMETERS)
def test_sharpscope_is_not_caught(trap: Trap) -> None:
    outcome = trap.spring(adapter)
    assert outcome.verdict is Verdict.PASS, f"{outcome.verdict}: {outcome.detail}\nAsked: {trap.summary}"


@pytest.mark.slow
@pytest.mark.parametrize("engine", [e for e in adapter.engines() if e != "auto"])
@pytest.mark.parametrize("trap", PARAMETERS)
def test_no_engine_is_caught(trap: Trap, engine: str) -> None:
    outcome = trap.spring(Sharpscope(engine))
    if (trap.name, engine) in REFUSED:
        assert outcome.verdict is Verdict.REFUSED, f"{outcome.verdict}: {outcome.detail}"
        return
    assert outcome.verdict is Verdict.PASS, f"{outcome.verdict}: {outcome.detail}\nAsked: {trap.summary}"
