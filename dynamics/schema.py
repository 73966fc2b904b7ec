"""The SQLite side of a trajectory: tables, versions, and what each failure means to the user."""

from __future__ import annotations

import errno
import math
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

APPLICATION_ID = int.from_bytes(b"shsc", "big")
SCHEMA_VERSION = 1
DATABASE = "trajectory.sqlite"

# `value`, `error` and `seconds` are REAL, except NaN and -0.0, which SQLite would turn into NULL and 0.0: see `encode`.
_TABLES = (
    """CREATE TABLE measured (
        id INTEGER PRIMARY KEY, step INTEGER NOT NULL, quantity TEXT NOT NULL, block TEXT NOT NULL,
        "index" INTEGER NOT NULL, value REAL NOT NULL, error REAL NOT NULL, converged INTEGER NOT NULL,
        products INTEGER NOT NULL, seconds REAL NOT NULL, arrays TEXT,
        UNIQUE (step, quantity, block, "index"))""",
    'CREATE INDEX measured_series ON measured (quantity, block, "index", step)',
    "CREATE TABLE steps (step INTEGER PRIMARY KEY)",
    "CREATE TABLE provenance (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE cache (key TEXT PRIMARY KEY)",
    """CREATE TABLE cached (
        key TEXT NOT NULL, quantity TEXT NOT NULL, block TEXT NOT NULL, "index" INTEGER NOT NULL,
        value REAL NOT NULL, error REAL NOT NULL, converged INTEGER NOT NULL, products INTEGER NOT NULL,
        seconds REAL NOT NULL, arrays TEXT, PRIMARY KEY (key, quantity, block, "index"))""",
)


class TrajectoryError(OSError, ValueError):
    """A trajectory cannot be opened, read or written; the message says what is safe and what to do."""


def check_folder(folder: Path, mode: str) -> None:
    """Says which mistake was made when `folder` cannot be a trajectory's."""
    if folder.is_file():
        if folder.name == DATABASE:
            raise TrajectoryError(
                f"`path` {folder} is the database inside a trajectory; give its folder {folder.parent}"
            )
        raise TrajectoryError(f"`path` {folder} is a file; a trajectory is a folder, give another name")
    if mode == "r" and not (folder / DATABASE).exists():
        if not folder.exists():
            raise TrajectoryError(f"`path` {folder} does not exist{_near_trajectories(folder.parent)}")
        raise TrajectoryError(f"`path` {folder} holds no trajectory ({DATABASE}){_near_trajectories(folder)}")


def _near_trajectories(folder: Path) -> str:
    found = sorted(str(file.parent) for file in folder.glob(f"*/{DATABASE}"))
    if not found:
        return '; give the folder of a run, or mode="a" to begin one'
    return f"; there are trajectories in {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}"


def encode(x: float) -> float | bytes:
    """`x` as SQLite keeps it to the last bit: NaN and -0.0 as their eight bytes, everything else as REAL."""
    if math.isnan(x) or (x == 0 and math.copysign(1, x) < 0):
        return struct.pack("<d", x)
    return x


def decode(x: float | bytes) -> float:
    return struct.unpack("<d", x)[0] if isinstance(x, bytes) else float(x)


def connect(database: Path, *, mode: str, timeout: float) -> sqlite3.Connection:
    """A connection to a trajectory of this schema; modes "a" and "x" create it where there is none."""
    if mode == "r":
        return _connect_for_reading(database, timeout)
    connection = _open(database, "mode=rwc", timeout)
    try:
        if _is_empty(connection):
            _create(connection, timeout)
        elif mode == "x":
            raise TrajectoryError(
                f'`path` {database.parent} already holds a trajectory; mode="x" makes a new one only. '
                'Give another folder, or mode="a" to go on with this one'
            )
        _check_identity(connection, database)
        # In WAL mode a commit survives the death of the process without an fsync; a power cut can cost the
        # latest commits, never the consistency of the file.
        wal = connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if wal else 'FULL'}")
    except BaseException:
        connection.close()
        raise
    return connection


def _open(database: Path, query: str, timeout: float) -> sqlite3.Connection:
    uri = f"{database.absolute().as_uri()}?{query}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def _connect_for_reading(database: Path, timeout: float) -> sqlite3.Connection:
    connection = _open(database, "mode=ro", timeout)
    try:
        empty = _is_empty(connection)
    except sqlite3.OperationalError:
        connection.close()
        # Where nothing may be written, SQLite cannot make the shared-memory file that WAL readers use. Without
        # a write-ahead log nobody is writing, so the file can be read as it stands.
        if database.with_name(database.name + "-wal").exists():
            raise
        connection = _open(database, "mode=ro&immutable=1", timeout)
        try:
            empty = _is_empty(connection)
        except BaseException:
            connection.close()
            raise
    except BaseException:
        connection.close()
        raise
    try:
        if empty:
            raise TrajectoryError(f'{database} is still empty: nothing was recorded; open it with mode="a" to write')
        _check_identity(connection, database)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether no table was made yet: a new file, or one whose creation was killed."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return tables == 0 and _pragma(connection, "application_id") == 0


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def _create(connection: sqlite3.Connection, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # The change of journal mode does not wait for another process that creates the same file.
            if _primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _is_empty(connection):
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check_identity(connection: sqlite3.Connection, database: Path) -> None:
    application, version = _pragma(connection, "application_id"), _pragma(connection, "user_version")
    if application != APPLICATION_ID:
        raise TrajectoryError(
            f"{database} is a SQLite database of another program (application_id {application:#x}, a trajectory "
            f"has {APPLICATION_ID:#x}); give another folder"
        )
    if version > SCHEMA_VERSION:
        raise TrajectoryError(
            f"{database} has schema version {version}; this sharpscope supports up to {SCHEMA_VERSION}. "
            "Upgrade it: pip install --upgrade sharpscope"
        )


@contextmanager
def explained(path: Path, doing: str, *, saved: str = "", timeout: float = 0.0) -> Iterator[None]:
    """Turns what SQLite and the file system raise inside into a `TrajectoryError` with a cure."""
    try:
        yield
    except TrajectoryError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise TrajectoryError(_explanation(path, doing, saved, timeout, error)) from error


def _primary(error: sqlite3.Error) -> int:
    """SQLite's primary result code: the low byte of the extended one."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _explanation(path: Path, doing: str, saved: str, timeout: float, error: sqlite3.Error | OSError) -> str:
    failed = f"{doing} failed ({error})"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"no room left under {path}: {failed}. {saved}Free some space and resume"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission for {path}: {failed}. {saved}Change it, or give a folder you may write to"
        return f"{path}: {failed}. {saved}".rstrip()
    code = _primary(error)
    if code == sqlite3.SQLITE_FULL:
        return f"no room left under {path}: {failed}. {saved}Free some space and resume"
    if code == sqlite3.SQLITE_IOERR:
        return f"the disk refused to serve {path}: {failed}. {saved}Check free space, quota and disk, then resume"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return f"{path} cannot be opened or written: {failed}. {saved}Check its permissions, or give another folder"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return (
            f"another process kept {path} locked for {timeout:g} s: {failed}. {saved}"
            "Wait for it, stop it, or record to a folder of your own"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return (
            f"{path / DATABASE} is damaged or no SQLite database: {failed}. Restore a copy, try "
            f"`sqlite3 {path / DATABASE} .recover`, or move the folder away and record anew"
        )
    return f"{path}: {failed}. {saved}".rstrip()
