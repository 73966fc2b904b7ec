"""Child processes that end in time, with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL = 4000


@dataclass(frozen=True)
class Finished:
    """How a process ended.

    Attributes:
        code: Its exit status; None if it was stopped at its limit.
        output: What it printed to both streams.
        seconds: Wall-clock time.
    """

    code: int | None
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        """The end of the output."""
        return self.output[-TAIL:]


def run(command: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, limit: float) -> Finished:
    """Run a command for at most `limit` seconds; at the limit its whole process group is stopped."""
    began = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in command],
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(limit, 1.0))
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            code = None
    return Finished(code, output, time.perf_counter() - began)
