"""The connection of a trajectory: one transaction at a time, and errors that say what was saved."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .schema import DATABASE, TrajectoryError, connect, explained


class Database:
    """The database in `folder`, shared by the threads of this process."""

    def __init__(self, folder: Path, *, mode: str, timeout: float) -> None:
        self.mode = mode
        self._folder = folder
        self._timeout = timeout
        self._connection: sqlite3.Connection | None = connect(folder / DATABASE, mode=mode, timeout=timeout)
        # A connection has one transaction, so that of another thread must be over first.
        self._lock = threading.RLock()

    @property
    def closed(self) -> bool:
        return self._connection is None

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def require_writable(self) -> None:
        self._open_connection()
        if self.mode == "r":
            raise TrajectoryError(
                f'the trajectory in {self._folder} was opened with mode="r"; open it with mode="a" to write'
            )

    def query(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple]:
        with self._lock, explained(self._folder, "reading", timeout=self._timeout):
            return self._open_connection().execute(sql, arguments).fetchall()

    @contextmanager
    def transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        """All that is executed inside is kept, or, after any exception, nothing."""
        self.require_writable()
        with self._lock:
            connection = self._open_connection()
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                with explained(self._folder, doing, saved=self.saved(), timeout=self._timeout):
                    raise error

    def saved(self) -> str:
        """What survives a failed write, as a sentence."""
        try:
            ((last,),) = self.query("SELECT max(step) FROM steps")
        except TrajectoryError:
            return ""
        return "No step was saved yet. " if last is None else f"Everything up to step {last} is saved. "

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise TrajectoryError(f"the trajectory in {self._folder} was closed; open it again with Trajectory.open")
        return self._connection
