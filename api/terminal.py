"""How the commands talk: tables, errors in one line, exit codes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])

# Mistakes of the caller and limits of the machine; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError, MemoryError)
INTERRUPTED = 130  # what a shell reports for Ctrl-C
COLORS = {
    "ok": "green",
    "fail": "bold red",
    "note": "yellow",
    "skipped": "dim",
    "holds": "green",
    "does not hold": "bold red",
    "reported": "dim",
}
WIDTH = 160  # of a table that goes into a file or a pipe
_debug = False


def set_debug(debug: bool) -> None:
    """Whether expected errors keep their traceback too."""
    global _debug
    _debug = debug


def say(text: str) -> None:
    """One line on standard output."""
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """One line on standard error."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on standard output; words that are outcomes are coloured."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(f"[{COLORS[cell]}]{cell}[/]" if cell in COLORS else escape(cell) for cell in row))
    _console().print(table)


def command(function: F) -> F:
    """Turns expected errors into one message and exit code 1, unless --debug asks for the traceback."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except KeyboardInterrupt:
            complain("interrupted; what was recorded is kept, and `train --resume` goes on from the last checkpoint")
            raise typer.Exit(INTERRUPTED) from None
        except EXPECTED as error:
            if _debug:
                raise
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            complain(f"{str(error) or type(error).__name__}{notes}")
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)
