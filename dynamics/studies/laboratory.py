"""Where a study works: its parts are kept as they finish, so that a killed study goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

from ..atomic_files import write_atomically
from .source_mark import source_mark


class Laboratory:
    """Runs the parts of one study and keeps what each returned.

    Args:
        folder: Of the study's results; None keeps nothing.
        quick: Whether the study should be short: fewer seeds and steps, the same code.
        say: Called with a line for every part that starts.
    """

    def __init__(self, folder: Path | None = None, *, quick: bool = False, say: Callable[[str], None] | None = None):
        self.folder = folder
        self.quick = quick
        self._seconds: dict[str, float] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._say = say or (lambda text: None)

    @property
    def seconds(self) -> float:
        """Processor time of the parts asked for, each counted once."""
        return math.fsum(self._seconds.values())

    def part(self, name: str, compute: Callable[..., Any], **settings: Any) -> Any:
        """`compute(**settings)`, or what an earlier process kept of it under the same name and settings and from
        the same source code; see `source_mark`.

        Nothing is kept where the source code has changed since this process began.

        Args:
            name: Short, unique within the study.
            compute: Returns numbers, strings, lists and dictionaries of them, which JSON keeps.
            settings: Likewise; decide the result together with the code of `compute`.
        """
        if self._settings.setdefault(name, settings) != settings:
            raise ValueError(f"`name` {name!r} stands for {self._settings[name]} already, not for {settings}")
        code = source_mark(compute)
        path = None if self.folder is None or code is None else self.folder / "parts" / f"{name}.json"
        mark = hashlib.sha256(json.dumps([code, settings], sort_keys=True).encode()).hexdigest()
        if path is not None and path.is_file():
            kept = json.loads(path.read_text())
            if kept["mark"] == mark:
                self._seconds[name] = kept["seconds"]
                return kept["value"]
        self._say(name)
        start = process_time()
        # Through JSON also at the first time, so that a resumed study sees the same types.
        value = json.loads(json.dumps(compute(**settings)))
        self._seconds[name] = process_time() - start
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"mark": mark, "seconds": self._seconds[name], "settings": settings, "value": value}
            write_atomically(path, json.dumps(content).encode())
        return value
