"""A hash of all code that decides what a function of the library returns."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

LIBRARY = __name__.split(".", maxsplit=1)[0]
PACKAGES = ("numpy", "scipy", "scikit-learn")
_BEGAN = time.time()


def source_mark(function: Callable[..., Any]) -> str | None:
    """A hash of the source of `function`, of the modules of this library that its own module reaches by imports, of the
    kernels' sources beside them, and of the versions of Python and the packages that compute.

    Nothing kept under another mark can have been computed by the same code. A module that loads others by a name that
    it makes up counts as all modules beside it. None where a file has changed since this process began: what runs may
    then be the code of before.
    """
    found = hashlib.sha256(json.dumps(_versions()).encode())
    found.update(inspect.getsource(function).encode())
    for name in sorted(reached(function.__module__)):
        place = _place(name)
        if place is not None and place.stat().st_mtime > _BEGAN:
            return None
        found.update(name.encode() + _digest(name))
    return found.hexdigest()


@functools.cache
def _versions() -> list[str]:
    versions = [platform.python_version(), torch.__version__]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return versions


def reached(name: str) -> set[str]:
    """The modules of this library that a module imports, directly or not, and itself."""
    known: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in known and name.split(".", maxsplit=1)[0] == LIBRARY:
            known.add(name)
            waiting.extend(_imported(name))
    return known


@functools.cache
def _place(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the parent is a module: `name` is something in it
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


@functools.cache
def _digest(name: str) -> bytes:
    place = _place(name)
    assert place is not None
    found = hashlib.sha256(place.read_bytes())
    for kernel in sorted(place.parent.glob("*.c*")) if name.startswith(f"{LIBRARY}.kernels.") else ():
        found.update(kernel.read_bytes())
    return found.digest()


@functools.cache
def _imported(name: str) -> frozenset[str]:
    place = _place(name)
    assert place is not None
    is_package = place.name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    tree = ast.parse(place.read_text())
    found = {module for node in ast.walk(tree) for module in _modules(node, package)}
    if any(isinstance(node, ast.Name | ast.Attribute) and _called(node) == "import_module" for node in ast.walk(tree)):
        found |= {f"{package}.{path.stem}" for path in place.parent.glob("*.py") if path.stem != "__init__"}
    return frozenset(module for module in found if _place(module) is not None)


def _called(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def _modules(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".", maxsplit=1)[0] == LIBRARY)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = importlib.util.resolve_name("." * node.level + base, package)
        if base.split(".", maxsplit=1)[0] == LIBRARY:
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
