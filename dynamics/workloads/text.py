"""Real text as windows of character numbers: the King James Bible, a file of the user's, or what comes with Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from .examples import Dataset, Examples, num_to_train_on

# Output of Debian's bible-kjv 4.38 for the whole book.
KJV_COMMAND = ("bible", "-f", "-l100000", "Gen1:1-Rev22:21")
KJV_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
NAMED_TEXTS = ("kjv", "pydoc")
HELD_OUT_SHARE = 0.1
NUM_TRAIN, NUM_HELD_OUT = 1024, 256  # windows


class Text(NamedTuple):
    text: str
    source: str


def text(source: str | os.PathLike[str] | None = None) -> Text:
    """A text and where it is from.

    Args:
        source: "kjv", the King James Bible printed by the program `bible` (Debian package bible-kjv); "pydoc", the
            manual inside CPython, 0.5 MB of English prose; or the path of a text file in UTF-8. None takes "kjv"
            where the program is installed, else "pydoc".
    """
    if source is None:
        source = "kjv" if shutil.which(KJV_COMMAND[0]) else "pydoc"
    if source == "kjv":
        return _kjv()
    if source == "pydoc":
        from pydoc_data.topics import topics

        return Text("\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics of CPython")
    try:
        content = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`data` {str(source)!r} cannot be read as text ({error}); give a UTF-8 text file, 'kjv' or 'pydoc'"
        ) from error
    return Text(content, f"text file {source}")


def _kjv() -> Text:
    if shutil.which(KJV_COMMAND[0]) is None:
        raise ValueError(
            "`data` is 'kjv' but the program `bible` is not installed; install the Debian packages bible-kjv and "
            "bible-kjv-text, or use 'pydoc' or a text file"
        )
    run = subprocess.run(KJV_COMMAND, capture_output=True, check=False)
    if run.returncode or hashlib.sha256(run.stdout).hexdigest() != KJV_SHA256:
        raise ValueError(
            f"`{' '.join(KJV_COMMAND)}` (exit code {run.returncode}) printed another text than bible-kjv 4.38; "
            "write it to a file and give that file as `data`"
        )
    # Each verse starts with its reference, one word such as "Ge1:1".
    verses = [line.split(" ", 1)[1] for line in run.stdout.decode().splitlines()]
    return Text("\n".join(verses), "King James Bible (Debian package bible-kjv 4.38)")


class Windows(NamedTuple):
    """Windows of a text: the inputs [N, T] are character numbers, the targets [N, T] the characters that follow."""

    data: Dataset
    vocabulary: str


def text_windows(
    source: str | os.PathLike[str] | None = None, num_examples: int | None = None, *, length: int = 64
) -> Windows:
    """Evenly spaced, disjoint windows of `length` characters; those of the last tenth of the text are held out.

    Args:
        source: As for `text`.
        num_examples: How many windows to train on; None takes 1024.
    """
    content, origin = text(source)
    vocabulary = "".join(sorted(set(content)))
    number = {character: i for i, character in enumerate(vocabulary)}
    ids = torch.tensor([number[character] for character in content], dtype=torch.int64)
    border = int(len(ids) * (1 - HELD_OUT_SHARE))
    parts = {"train": ids[:border], "held-out": ids[border:]}
    cut = {}
    for part, characters in parts.items():
        available = (len(characters) - 1) // length
        if available < 1:
            raise ValueError(
                f"the {part} part of the text ({origin}) has {len(characters)} characters; "
                f"it must have more than {length}: give a text of at least {round(12 * length, -2)}"
            )
        wanted = (
            num_to_train_on(num_examples, available, NUM_TRAIN) if part == "train" else min(NUM_HELD_OUT, available)
        )
        starts = torch.arange(wanted) * (available // wanted) * length
        windows = characters[starts.unsqueeze(1) + torch.arange(length + 1)]  # [N, T + 1]
        cut[part] = Examples(windows[:, :-1].clone(), windows[:, 1:].clone())
    return Windows(Dataset(cut["train"], cut["held-out"], origin), vocabulary)
