"""The tools that are compared: one file each. See `benchmarks/README.md` for how to add one."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

# What a tool may offer: an absent function shows as "-".
OFFERS = ("hvp", "ggn", "blocks", "top")


@dataclass
class Tool:
    """A module of this folder, or anything with its names: NAME, DISTRIBUTION, and any of `OFFERS`.

    `ours` marks sharpscope's rows: ratios are sharpscope's plain row over the best of the others.
    """

    name: str
    version: str
    ours: bool
    module: Any

    def offer(self, job: str) -> Any:
        return getattr(self.module, job, None)


def as_tool(module: Any) -> Tool:
    distribution = getattr(module, "DISTRIBUTION", "")
    return Tool(module.NAME, version(distribution) if distribution else "", getattr(module, "OURS", False), module)


def find_tools() -> tuple[list[Tool], dict[str, str]]:
    """The tools that can be imported, sharpscope first, and why the others cannot."""
    tools, missing = [], {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        try:
            tools.append(as_tool(importlib.import_module(f"{__name__}.{info.name}")))
        except (ImportError, PackageNotFoundError) as error:
            missing[info.name] = f"{type(error).__name__}: {error}"
    return sorted(tools, key=lambda tool: (not tool.ours, len(tool.name) if tool.ours else 0)), missing


def toy_tool(name: str, *, ours: bool = False, **offers: Any) -> Tool:
    """A tool made of functions, for tests."""
    return Tool(name, "", ours, SimpleNamespace(NAME=name, **offers))
