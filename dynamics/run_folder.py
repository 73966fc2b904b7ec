"""The folder of a training run: its options, its checkpoints, its trajectory."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .atomic_files import write_atomically
from .checkpoints import CheckpointError, read_checkpoint
from .schema import DATABASE

OPTIONS = "run.json"
CHECKPOINTS = "checkpoints"
FIGURES = "figures"
FORMAT = "sharpscope run"
VERSION = 1
STATE = ("step", "model", "optimizer", "monitor", "rng")  # entries of a checkpoint
DEFAULT_PARENT = "runs"


class RunFolder:
    """`path` with run.json, checkpoints/step-*.pt, and beside them the trajectory and its figures."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    @property
    def exists(self) -> bool:
        return (self.path / OPTIONS).is_file()

    def claim(self) -> None:
        """Makes the folder, or takes one in which a run died before it had written its options.

        Raises:
            ValueError: it holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`out` {self.path} is a file; give a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"`out` {self.path} cannot be made ({error.strerror}); give a writable folder") from error
        self._drop_drafts(self.path)
        foreign = sorted(entry.name for entry in self.path.iterdir())
        if foreign:
            raise ValueError(
                f"`out` {self.path} is not empty and no run of sharpscope (it holds {', '.join(foreign[:3])}); "
                "give a new folder"
            )

    def clear(self) -> None:
        """Deletes the run, and only the run."""
        # The options go last: until then the folder is known as a run and can be cleared again.
        for name in (CHECKPOINTS, FIGURES, "arrays"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for path in (*self.path.glob(f"{DATABASE}*"), self.path / OPTIONS):
            path.unlink(missing_ok=True)

    def write_options(self, options: Mapping[str, Any], fingerprint: str) -> None:
        content = {"format": FORMAT, "version": VERSION, "options": dict(options), "fingerprint": fingerprint}
        write_atomically(self.path / OPTIONS, json.dumps(content, indent=2).encode() + b"\n")

    def read_options(self) -> tuple[dict[str, Any], str]:
        """The options of the run and the fingerprint of its data."""
        path = self.path / OPTIONS
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, version = content["format"], content["version"]
            options, fingerprint = dict(content["options"]), str(content["fingerprint"])
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not the folder of a training run: it has no {OPTIONS}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); restore it, or train into a new folder") from error
        if kind != FORMAT or version > VERSION:
            raise ValueError(
                f"{path} says {kind!r} version {version}; this sharpscope knows {FORMAT!r} up to {VERSION}"
            )
        return options, fingerprint

    def checkpoints(self) -> list[Path]:
        """Files of the checkpoints, ascending in step."""
        return sorted((self.path / CHECKPOINTS).glob("step-*.pt"))

    def save_checkpoint(self, step: int, state: Mapping[str, Any]) -> Path:
        """Keeps `state` as the checkpoint of a step; it is there as a whole or not at all."""
        path = self.path / CHECKPOINTS / f"step-{step:08d}.pt"
        buffer = io.BytesIO()
        torch.save({"step": step, **state}, buffer)
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise OSError(
                f"the checkpoint {path} cannot be written ({error}); all before it is kept: make room, then go on with "
                "`resume` (--resume)"
            ) from error
        return path

    def latest_checkpoint(self) -> dict[str, Any] | None:
        """The contents of the last checkpoint, on the CPU; None when there is none."""
        if (self.path / CHECKPOINTS).is_dir():
            self._drop_drafts(self.path / CHECKPOINTS)
        found = self.checkpoints()
        if not found:
            return None
        try:
            state, _ = read_checkpoint(found[-1])
            if not isinstance(state, dict) or not set(STATE) <= state.keys():
                raise CheckpointError(f"it lacks some of {', '.join(STATE)}")
        except CheckpointError as error:
            before = f"delete it to go on from {found[-2].name}" if len(found) > 1 else "delete it to start again"
            raise ValueError(f"the checkpoint {found[-1]} cannot be used: {error}; {before}") from error
        return state

    @staticmethod
    def _drop_drafts(folder: Path) -> None:
        for draft in folder.glob(".*.tmp"):
            draft.unlink(missing_ok=True)


def default_folder(name: str, *, resume: bool, parent: str = DEFAULT_PARENT) -> Path:
    """runs/NAME, or runs/NAME-2 and so on: the first that is free, or the last that is there for `resume`."""
    number = 1
    last = None
    while (path := Path(parent) / (name if number == 1 else f"{name}-{number}")).exists():
        last = path
        number += 1
    return last if resume and last is not None else path
