"""Fashion-MNIST, or any data set in the same four idx files: from a folder, the Debian package or a download."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..atomic_files import write_atomically
from .examples import Dataset, Examples, num_to_train_on

# SHA-256 of the unpacked files: the Debian package and the original server compress them differently.
CONTENTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
TIMEOUT = 30.0  # seconds without an answer
NUM_TRAIN, NUM_HELD_OUT = 2000, 1000  # what two cores train on in minutes
MEAN, STD = 0.2860, 0.3530  # of the training images, black 0 and white 1
CURE = (
    "install the Debian package dataset-fashion-mnist, give a folder with the four idx files (`data`, --data), "
    "or connect this machine to the network once"
)


def fashion_mnist(folder: str | os.PathLike[str] | None = None, num_examples: int | None = None) -> Dataset:
    """Standardised images [N, 1, 28, 28] and labels [N] of ten classes.

    Args:
        folder: With the four usual idx files, packed (.gz) or not; MNIST and its other replacements fit as well.
            None takes the Debian package's folder, then an earlier download, then a download of 31 MB; what these
            hold is verified by SHA-256.
        num_examples: How many of the 60000 to train on, the first ones; None takes 2000.
    """
    if folder is not None:
        path, source = Path(folder).expanduser(), f"idx files in {folder}"
        if not path.is_dir():
            raise ValueError(f"`data` {folder} is not a folder; {CURE}")
        contents = {name: _read(_find(path, name)) for name in CONTENTS}
    else:
        path, source = _own_folder()
        contents = {name: _verified(name, _read(_find(path, name)), path) for name in CONTENTS}
    arrays = {name: parse_idx(content, f"{path / name}") for name, content in contents.items()}
    available = len(arrays["train-labels-idx1-ubyte"])
    train = _examples(arrays, "train", path, num_to_train_on(num_examples, available, NUM_TRAIN))
    return Dataset(train, _examples(arrays, "t10k", path, NUM_HELD_OUT), source)


def parse_idx(content: bytes, name: str) -> Tensor:
    """The array in an idx file of unsigned bytes: 0, 0, 8, rank, then each size as four bytes, then the data."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{name} starts with {content[:4]!r}; an idx file of unsigned bytes starts with 00 00 08")
    rank = content[3]
    header = 4 + 4 * rank
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + int(torch.tensor(shape, dtype=torch.int64).prod())
    if len(content) != expected:
        raise ValueError(f"{name} has {len(content)} bytes; its header {shape} announces {expected}: copy it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def _examples(arrays: dict[str, Tensor], part: str, folder: Path, num: int) -> Examples:
    """The first `num` images and labels of a part, or all when there are fewer."""
    images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"the {part} files in {folder} hold images {list(images.shape)} and labels {list(labels.shape)}; "
            "they must be [N, 28, 28] and [N] with the same N > 0"
        )
    if int(labels.max()) > 9:
        raise ValueError(
            f"the {part} labels in {folder} go up to {int(labels.max())}; this workload has ten classes, 0 to 9"
        )
    return Examples(((images[:num].float() / 255 - MEAN) / STD).unsqueeze(1), labels[:num].long())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"`data` {folder} has no file {name} or {name}.gz; {CURE}")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from error


def _verified(name: str, content: bytes, folder: Path) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != CONTENTS[name]:
        raise ValueError(
            f"{folder / name} is not the file that was published: SHA-256 {found[:16]}… of its contents, expected "
            f"{CONTENTS[name][:16]}…; delete it, or name the folder in `data` (--data) to use it as it is"
        )
    return content


def _own_folder() -> tuple[Path, str]:
    """The package's folder, or the one for downloads, filled."""
    if PACKAGE_FOLDER.is_dir():
        return PACKAGE_FOLDER, "Debian package dataset-fashion-mnist"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharpscope" / "fashion-mnist"
    for name in CONTENTS:
        if not (cache / f"{name}.gz").is_file():
            _download(name, cache)
    return cache, URL


def _download(name: str, folder: Path) -> None:
    url = f"{URL}{name}.gz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            packed = answer.read()
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Fashion-MNIST is not on this machine and {url} gave: {error}; {CURE}") from error
    _verified(name, content, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.gz", packed)
