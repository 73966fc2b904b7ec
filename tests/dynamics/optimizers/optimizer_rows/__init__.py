"""The table of optimizers: one module for each, with its `ROWS`."""

import importlib
import pkgutil

from .row import OptimizerRow

__all__ = ["OptimizerRow", "all_rows"]


def all_rows() -> list[OptimizerRow]:
    """Every row, in the order of the modules' names."""
    found = []
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        if info.name != "row":
            found += importlib.import_module(f"{__name__}.{info.name}").ROWS
    return found
