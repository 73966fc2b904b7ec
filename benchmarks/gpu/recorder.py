"""A pytest plugin: one JSON line per event in $GPU_SUITE_RECORD, so that no crash or limit loses a result."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

MOST = 2000


def _write(**event: Any) -> None:
    with open(os.environ["GPU_SUITE_RECORD"], "a") as file:
        file.write(json.dumps(event) + "\n")


def _text(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr or "")[-MOST:]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The outcome of a call; of setup and teardown only what is not a pass."""
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.when != "call" and report.outcome == "failed" else report.outcome
        _write(test=report.nodeid, outcome=outcome, seconds=report.duration, text=_text(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome="error", seconds=0.0, text=_text(report))
