"""The table that a run leaves behind: step, quantity, block, index, value, error, with arrays and provenance."""

from __future__ import annotations

import difflib
import json
import operator
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from .array_files import read_arrays, write_arrays
from .cells import RECALL, cell_of, delete_others, remember_cells, row_of, write_cells
from .database import Database
from .provenance import origin, to_json
from .row import Row
from .schema import TrajectoryError, check_folder, decode, explained
from .tables import pandas_table, write_csv, write_parquet

if TYPE_CHECKING:
    import os

    import pandas as pd


class Series(NamedTuple):
    """One quantity along the run: steps [k] int64, values [k] and errors [k] float64, ascending in step."""

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray


class Trajectory:
    """Numbers along a training run with their errors, kept in a folder that survives `kill -9`.

    On disk `path/trajectory.sqlite` (WAL mode) and `path/arrays/*.safetensors`. Every `record` is one
    transaction: after it returns, the rows outlive the process; before, none of them is there. Any number of
    processes may read while one writes; several writers take turns.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with Trajectory.open(folder, provenance={"seed": 0}) as trajectory:
    ...     trajectory.record(0, [Row("sharpness", 1.25, error=1e-4), Row("loss", 2.5)])
    ...     trajectory.record(10, [Row("sharpness", 1.5, error=1e-4)])
    >>> Trajectory.open(folder, mode="r").series("sharpness").values.tolist()
    [1.25, 1.5]
    """

    def __init__(self, path: Path, database: Database) -> None:
        """Use `Trajectory.open`."""
        self.path = path
        self._database = database

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        mode: str = "a",
        provenance: Mapping[str, Any] | None = None,
        timeout: float = 30.0,
    ) -> Trajectory:
        """Opens or creates the trajectory in the folder `path`.

        Args:
            path: A folder; it may hold other files too.
            mode: "a" goes on or creates, "x" creates and fails where there is one, "r" only reads.
            provenance: Notes to keep beside versions, start time and command line, e.g. seeds, model and data
                fingerprints; anything JSON can keep.
            timeout: Seconds to wait for another process that is writing.

        Raises:
            TrajectoryError: The folder cannot be used; the message says why and what to do.
        """
        if mode not in ("a", "r", "x"):
            raise ValueError(f'`mode` is {mode!r}; choose "a" (append or create), "x" (create) or "r" (read)')
        if provenance is not None and mode == "r":
            raise ValueError('`provenance` cannot be written with mode="r"; leave it out, or use mode="a"')
        notes = to_json(provenance or {})
        folder = Path(path).expanduser()
        check_folder(folder, mode)
        with explained(folder, "opening the trajectory", timeout=timeout):
            if mode != "r":
                folder.mkdir(parents=True, exist_ok=True)
            trajectory = cls(folder, Database(folder, mode=mode, timeout=timeout))
        if mode != "r":
            try:
                trajectory._open_entry(notes)
            except BaseException:
                trajectory.close()
                raise
        return trajectory

    def _open_entry(self, notes: dict[str, str]) -> None:
        """Notes this process's origin: as the run's own, or under "reopened" when the run goes on."""
        with self._database.transaction("noting the provenance") as connection:
            known = dict(connection.execute("SELECT key, value FROM provenance"))
            entry = origin()
            if "started" in known:
                reopened = [*json.loads(known.get("reopened", "[]")), entry]
                entry = {"reopened": reopened}
            _write_notes(connection, to_json(entry) | notes)

    # Writing

    def record(
        self,
        step: int,
        rows: Iterable[Row] = (),
        *,
        complete: bool = True,
        replace: bool = False,
        key: str | None = None,
    ) -> None:
        """Keeps `rows` at `step`, all of them or, after an error, none.

        A row with the same step, quantity, block and index replaces the earlier one.

        Args:
            step: Training step, >= 0.
            rows: What was measured; may be empty.
            complete: Marks the step as done, so that a resumed run need not measure it again. Give False when
                more measurements of this step will follow.
            replace: Drops other rows of the same quantities at this step, which an earlier run may have left.
            key: Remembers the rows under this text as well, for `recall`.
        """
        step = _checked_step(step)
        rows = list(rows)
        for row in rows:
            if not isinstance(row, Row):
                raise TypeError(f"`rows` holds {row!r}; give sharpscope Row objects")
        self._database.require_writable()
        doing = f"recording step {step}"
        cells = []
        for row in rows:
            file = None
            if row.arrays:
                label = f"{step}-{row.quantity}-{row.block}-{row.index}"
                with explained(self.path, doing, saved=self._database.saved()):
                    file = write_arrays(self.path / "arrays", label, row.arrays)
            cells.append(cell_of(row, file))
        with self._database.transaction(doing) as connection:
            if replace:
                delete_others(connection, step, cells)
            write_cells(connection, step, cells)
            if complete:
                connection.execute("INSERT OR IGNORE INTO steps VALUES (?)", (step,))
            if key is not None:
                remember_cells(connection, key, cells)

    def annotate(self, **notes: Any) -> None:
        """Adds or replaces entries of `provenance`."""
        texts = to_json(notes)
        with self._database.transaction("noting the provenance") as connection:
            _write_notes(connection, texts)

    def discard_after(self, step: int) -> None:
        """Forgets everything later than `step`: a run resumed there must not inherit rows of its lost future."""
        step = int(operator.index(step))
        with self._database.transaction(f"discarding what follows step {step}") as connection:
            connection.execute("DELETE FROM measured WHERE step > ?", (step,))
            connection.execute("DELETE FROM steps WHERE step > ?", (step,))

    # Reading

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, start time, command line and the user's notes."""
        return {
            key: json.loads(text)
            for key, text in self._database.query("SELECT key, value FROM provenance ORDER BY key")
        }

    def steps(self) -> list[int]:
        """Every step with rows or marked as complete, ascending."""
        return [
            step
            for (step,) in self._database.query("SELECT step FROM measured UNION SELECT step FROM steps ORDER BY step")
        ]

    def last_step(self) -> int | None:
        """The last complete step; None before the first."""
        return self._database.query("SELECT max(step) FROM steps")[0][0]

    def is_complete(self, step: int) -> bool:
        return bool(self._database.query("SELECT 1 FROM steps WHERE step = ?", (_checked_step(step),)))

    def quantities(self) -> list[str]:
        """Names in the order of their first appearance."""
        return [q for (q,) in self._database.query("SELECT quantity FROM measured GROUP BY quantity ORDER BY min(id)")]

    def blocks(self, quantity: str) -> list[str]:
        """Blocks of a quantity in the order of their first appearance; "" is the whole model."""
        found = self._database.query(
            "SELECT block FROM measured WHERE quantity = ? GROUP BY block ORDER BY min(id)", (quantity,)
        )
        if not found:
            raise ValueError(_unknown("quantity", quantity, self.quantities(), self.path))
        return [block for (block,) in found]

    def indices(self, quantity: str, block: str = "") -> list[int]:
        """Indices of a quantity in a block, ascending."""
        found = self._database.query(
            'SELECT DISTINCT "index" FROM measured WHERE quantity = ? AND block = ? ORDER BY "index"', (quantity, block)
        )
        if not found:
            raise ValueError(_unknown(f"block of {quantity!r}", block, self.blocks(quantity), self.path))
        return [index for (index,) in found]

    def series(self, quantity: str, block: str = "", index: int = 0) -> Series:
        """One quantity along the run."""
        found = self._database.query(
            'SELECT step, value, error FROM measured WHERE quantity = ? AND block = ? AND "index" = ? ORDER BY step',
            (quantity, block, operator.index(index)),
        )
        if not found:
            known = self.indices(quantity, block)
            raise ValueError(f"`index` is {index}; {quantity!r} in block {block!r} has the indices {known}")
        steps, values, errors = zip(*found, strict=True)
        return Series(
            np.array(steps, dtype=np.int64),
            np.array([decode(x) for x in values], dtype=np.float64),
            np.array([decode(x) for x in errors], dtype=np.float64),
        )

    def array_steps(self, quantity: str, block: str = "", index: int = 0) -> list[int]:
        """The steps at which `arrays` has something."""
        return [
            step
            for (step,) in self._database.query(
                'SELECT step FROM measured WHERE quantity = ? AND block = ? AND "index" = ? AND arrays IS NOT NULL '
                "ORDER BY step",
                (quantity, block, operator.index(index)),
            )
        ]

    def arrays(self, step: int, quantity: str, block: str = "", index: int = 0) -> dict[str, Tensor]:
        """The tensors recorded with a row, by name; empty when the row has none."""
        found = self._database.query(
            'SELECT arrays FROM measured WHERE step = ? AND quantity = ? AND block = ? AND "index" = ?',
            (_checked_step(step), quantity, block, operator.index(index)),
        )
        if not found:
            steps = self.series(quantity, block, index).steps
            near = steps[np.argsort(np.abs(steps - step), kind="stable")[:5]]
            raise ValueError(f"`step` is {step}, where {quantity!r} was not measured; near it: {sorted(near.tolist())}")
        return self._read_arrays(found[0][0])

    def recall(self, key: str) -> list[Row] | None:
        """The rows recorded under `key`; None when there are none, or when an array among them was lost."""
        if not self._database.query("SELECT 1 FROM cache WHERE key = ?", (key,)):
            return None
        found = self._database.query(RECALL, (key,))
        try:
            return [row_of(cell, self._read_arrays(cell[-1])) for cell in found]
        except TrajectoryError:
            return None

    # Tables

    def to_pandas(self, *, costs: bool = True) -> pd.DataFrame:
        """The whole table, ordered by step, quantity, block and index.

        Columns step, quantity, block, index, value, error, converged, products, seconds. Two runs are equal when
        their tables are equal without the `costs` (products and seconds).
        """
        table = pandas_table(self._database)
        return table if costs else table.drop(columns=["products", "seconds"])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_pandas()`; the decimal numbers read back to the same float64."""
        write_csv(self.to_pandas(), Path(path))

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_pandas()`; needs pyarrow."""
        write_parquet(self.to_pandas(), Path(path))

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        self._database.close()

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self._database.closed else ""
        return f"Trajectory({str(self.path)!r}, mode={self._database.mode!r}{closed})"

    def _read_arrays(self, file: str | None) -> dict[str, Tensor]:
        if file is None:
            return {}
        with explained(self.path, f"reading the arrays in {file}"):
            return read_arrays(self.path / "arrays" / file)


def _write_notes(connection: sqlite3.Connection, texts: Mapping[str, str]) -> None:
    connection.executemany("INSERT OR REPLACE INTO provenance VALUES (?, ?)", texts.items())


def _checked_step(step: int) -> int:
    try:
        plain = operator.index(step)
    except TypeError:
        raise TypeError(f"`step` is {step!r}; give a whole number") from None
    if plain < 0:
        raise ValueError(f"`step` is {plain}; steps count from 0")
    return plain


def _unknown(kind: str, name: str, known: list[str], path: Path) -> str:
    if not known:
        return f"{kind} {name!r} is unknown: the trajectory in {path} has no rows yet"
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:8]
    return f"{kind} {name!r} is not in the trajectory {path}; near it: {', '.join(map(repr, near))}"
