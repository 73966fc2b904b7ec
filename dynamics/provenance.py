"""Where a run came from: versions, machine, command."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch


def origin() -> dict[str, Any]:
    """Versions, start time (UTC) and command line of this process."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "sharpscope": own_version(),
            "platform": platform.platform(),
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
    }


def own_version() -> str:
    try:
        return importlib.metadata.version("sharpscope")
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return "unknown"


def to_json(notes: Mapping[str, Any]) -> dict[str, str]:
    """Each note as JSON text; TypeError for a note that JSON cannot keep."""
    texts = {}
    for key, note in notes.items():
        if not isinstance(key, str):
            raise TypeError(f"a key of `provenance` is {key!r}; keys are strings")
        try:
            texts[key] = json.dumps(note)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`provenance[{key!r}]` is {note!r}, which JSON cannot keep ({error}); give numbers, strings, "
                "lists and dictionaries, e.g. str(...) of it"
            ) from error
    return texts
