"""Rows as lines of the database's tables."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .row import Row
from .schema import decode, encode

_CELL = 'quantity, block, "index", value, error, converged, products, seconds, arrays'
_PLACES = ", ".join("?" * 10)
_WRITE = f"""
    INSERT INTO measured (step, {_CELL}) VALUES ({_PLACES})
    ON CONFLICT (step, quantity, block, "index") DO UPDATE SET
        value = excluded.value, error = excluded.error, converged = excluded.converged,
        products = excluded.products, seconds = excluded.seconds, arrays = excluded.arrays"""
RECALL = f"SELECT {_CELL} FROM cached WHERE key = ? ORDER BY rowid"


def cell_of(row: Row, file: str | None) -> tuple:
    """The row in the order of `_CELL`; `file` holds its arrays."""
    value, error = encode(row.value), encode(row.error)
    return row.quantity, row.block, row.index, value, error, row.converged, row.products, encode(row.seconds), file


def row_of(cell: Sequence[Any], arrays: Mapping[str, Tensor]) -> Row:
    quantity, block, index, value, error, converged, products, seconds, _ = cell
    value, error = decode(value), decode(error)
    return Row(quantity, value, error, block, index, bool(converged), products, decode(seconds), arrays or None)


def write_cells(connection: sqlite3.Connection, step: int, cells: Sequence[tuple]) -> None:
    connection.executemany(_WRITE, [(step, *cell) for cell in cells])


def delete_others(connection: sqlite3.Connection, step: int, cells: Sequence[tuple]) -> None:
    """Deletes the rows at `step` that have the quantity of one of these cells but not its block and index."""
    kept = {cell[:3] for cell in cells}
    quantities = {quantity for quantity, _, _ in kept}
    found = connection.execute('SELECT quantity, block, "index" FROM measured WHERE step = ?', (step,)).fetchall()
    others = [(step, *place) for place in found if place[0] in quantities and place not in kept]
    connection.executemany('DELETE FROM measured WHERE step = ? AND quantity = ? AND block = ? AND "index" = ?', others)


def remember_cells(connection: sqlite3.Connection, key: str, cells: Sequence[tuple]) -> None:
    """Keeps the cells under `key`, in place of earlier ones."""
    connection.execute("DELETE FROM cached WHERE key = ?", (key,))
    connection.execute("INSERT OR IGNORE INTO cache VALUES (?)", (key,))
    connection.executemany(f"INSERT OR REPLACE INTO cached VALUES ({_PLACES})", [(key, *cell) for cell in cells])
