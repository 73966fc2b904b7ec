"""Checkpoint files: finding them, reading them safely, and the model's weights among what they hold."""

from __future__ import annotations

import glob
import hashlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..landscape.selection import near_names

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
STEP_KEYS = ("step", "global_step", "iteration")
# Where frameworks keep the weights; an averaged copy beside them is taken only when asked for by `key`.
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module", "network", "net", "weights")
# The one file of weights in the `checkpoint-500` folders of Hugging Face trainers.
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Weights:
    """All that a model's state dict needs, under the model's own names, with a SHA-256 of names and contents."""

    tensors: dict[str, Tensor]
    fingerprint: str


def checkpoint_files(place: str | os.PathLike[str]) -> list[Path]:
    """Files at a path, in a folder or matching a glob, in natural order: step-9 stands before step-10.

    A folder stands for the checkpoint files in it, or in its sub-folder `checkpoints`, and for the sub-folders
    `NAME-STEP` that hold one model each.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _in_folder(path) or _in_folder(path / "checkpoints")
        if not found:
            raise ValueError(f"`checkpoints` {path} holds no file *{', *'.join(SUFFIXES)}; give a folder that does")
        return found
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [file for file in found if file.is_file()]
    files += [file for folder in found if folder.is_dir() for file in _weights_of(folder)]
    if not files:
        near = near_names(path.name, (entry.name for entry in path.parent.glob("*")))
        raise ValueError(f"`checkpoints` {place} matches no file; near it in {path.parent}: {near}")
    return sorted(files, key=natural_order)


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file()]
    for child in folder.iterdir():
        if child.is_dir() and re.search(r"\d", child.name):
            files += _weights_of(child)
    return sorted(files, key=natural_order)


def _weights_of(folder: Path) -> list[Path]:
    return [folder / name for name in _FOLDER_WEIGHTS if (folder / name).is_file()][:1]


def natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which runs of digits count as numbers."""
    pieces = re.split(r"(\d+)", str(path))
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in pieces]


def step_in_name(path: Path) -> int | None:
    """The number after "step" or "iter" in the name, else the last number; in the folder's name if there is none."""
    for name in (path.stem, path.parent.name if path.name in _FOLDER_WEIGHTS else ""):
        marked = re.search(r"(?:step|iter(?:ation)?)s?[-_=]?(\d+)", name, re.IGNORECASE)
        numbers = re.findall(r"\d+", name)
        if marked or numbers:
            return int(marked.group(1) if marked else numbers[-1])
    return None


def read_checkpoint(path: Path) -> tuple[Any, int | None]:
    """What the file holds, on the CPU, and the step that it names, if any. No code in the file is ever run."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path, device="cpu")
            with safetensors.safe_open(path, framework="pt") as file:
                return content, _step_in(file.metadata() or {})
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to give up weights_only; only the name of the object is of use here.
        named = re.search(r"GLOBAL ([A-Za-z_]\w*(?:\.\w+)+)", str(error))
        held = f"a {named.group(1)}" if named else "more than tensors"
        raise CheckpointError(
            f"refused by torch.load(weights_only=True): it is damaged or holds {held}; save model.state_dict(), "
            "numbers and strings alone"
        ) from error
    except Exception as error:  # each damaged format raises its own kind, from EOFError to RuntimeError
        raise CheckpointError(
            "cannot be read: it is no torch or safetensors checkpoint, or damaged "
            f"({type(error).__name__}: {error}); copy it again, or delete it"
        ) from error
    return content, _step_in(content)


def _step_in(content: Any) -> int | None:
    if isinstance(content, Mapping):
        for key in STEP_KEYS:
            found = content.get(key)
            if isinstance(found, Tensor) and found.numel() == 1:
                found = found.item()
            if (isinstance(found, int) and not isinstance(found, bool)) or (isinstance(found, str) and found.isdigit()):
                return int(found)
    return None


def weights_in(content: Any, model: nn.Module, key: str | None = None) -> Weights:
    """The model's weights in what a checkpoint holds, checked by name and shape against the model.

    Args:
        content: A state dict, or mappings that hold one, such as {"model": ..., "optimizer": ...}.
        model: Whose weights; prefixes of wrappers (`module.`, `_orig_mod.`, one common other) are taken off.
        key: Which entry holds them, with dots for deeper ones; None finds the one whose names fit.
    """
    wanted = {_plain(name): tensor for name, tensor in _state(model).items()}
    names = {_plain(name): name for name in _state(model)}
    found = [(key, _entry(content, key))] if key is not None else list(_state_dicts(content))
    found = [(place, _named_as(entry, wanted)) for place, entry in found if _is_state_dict(entry)]
    if not found:
        where = "it" if key is None else f"its entry {key!r}"
        raise CheckpointError(f"{where} holds no state dict ({_summary(content)}); name the entry with `key`")
    fitting = [(place, entry) for place, entry in found if not _mismatch(entry, wanted)]
    if not fitting:
        _, nearest = max(found, key=lambda item: len(item[1].keys() & wanted.keys()))
        raise CheckpointError(_mismatch(nearest, wanted))
    place, entry = fitting[0]
    if len(fitting) > 1 and place.partition(".")[0] not in WEIGHT_KEYS:
        raise CheckpointError(f"{[place for place, _ in fitting]} all fit this model; choose one of them with `key`")
    completed = _with_tied(entry, wanted)
    tensors = {names[name]: completed[name] for name in wanted}
    return Weights(tensors, _fingerprint(tensors))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict; extra state, which is not weights, stays the model's own."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _plain(name: str) -> str:
    """The name without the marks of torch.compile, which may stand at any depth."""
    return name.replace("_orig_mod.", "")


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and any(isinstance(value, Tensor) for value in content.values())
        and all(
            isinstance(name, str) and (isinstance(value, Tensor) or name.endswith("_extra_state"))
            for name, value in content.items()
        )
    )


def _state_dicts(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """State dicts at any level, with the key that leads there; WEIGHT_KEYS first."""
    if _is_state_dict(content):
        yield place, content
    elif isinstance(content, Mapping) and depth > 0:
        ranks = {key: rank for rank, key in enumerate(WEIGHT_KEYS)}
        for key in sorted(content, key=lambda key: ranks.get(key, len(ranks))):
            yield from _state_dicts(content[key], f"{place}.{key}".lstrip("."), depth - 1)


def _entry(content: Any, key: str) -> Any:
    if isinstance(content, Mapping) and key in content:
        return content[key]
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            known = [str(name) for name in content] if isinstance(content, Mapping) else []
            raise CheckpointError(f"`key` is {key!r}, but {part!r} is not in it; near it: {near_names(part, known)}")
        content = content[part]
    return content


def _summary(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    shown = [f"{key!r}: {type(value).__name__}" for key, value in list(content.items())[:6]]
    return "{" + ", ".join(shown) + (", ..." if len(content) > 6 else "") + "}"


def _named_as(entry: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entry's tensors without wrappers' prefixes, under those names that fit the model best."""
    tensors = {_plain(name): value for name, value in entry.items() if isinstance(value, Tensor)}
    variants = [tensors]
    while len(heads := {name.partition(".")[0] for name in variants[-1]}) == 1 and all("." in n for n in variants[-1]):
        prefix = f"{heads.pop()}."
        variants.append({name.removeprefix(prefix): value for name, value in variants[-1].items()})
    return max(variants, key=lambda variant: len(variant.keys() & wanted.keys()))  # of equals the first


def _tied_groups(wanted: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the model that stand for one and the same tensor."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in wanted.items():
        if tensor.numel() and tensor.device.type != "meta":
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _with_tied(entry: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entry with every name of a tied tensor, of which safetensors files keep only one."""
    completed = dict(entry)
    for group in _tied_groups(wanted):
        present = [name for name in group if name in entry]
        completed.update({name: entry[present[0]] for name in group if present and name not in entry})
    return completed


def _mismatch(entry: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Why the entry is not this model's, or nothing."""
    entry = _with_tied(entry, wanted)
    missing = [name for name in wanted if name not in entry]
    foreign = [name for name in entry if name not in wanted]
    problems = []
    if missing:
        near = f" (near it: {near_names(missing[0], foreign)})" if foreign else ""
        problems.append(f"it lacks {len(missing)} of the model's {len(wanted)} tensors, first {missing[0]!r}{near}")
    if foreign:
        problems.append(f"it has {len(foreign)} that the model has not, first {foreign[0]!r}")
    for name in entry.keys() & wanted.keys():
        ours, theirs = wanted[name], entry[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name!r} has shape {list(theirs.shape)}; the model's has {list(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name!r} is {theirs.dtype}; the model's is {ours.dtype}")
    for group in _tied_groups(wanted):
        given = [name for name in group if name in entry]
        if any(not torch.equal(entry[given[0]], entry[name]) for name in given[1:]):
            problems.append(f"{given} are one tensor in the model and differ in the checkpoint")
    if not problems:
        return ""
    return f"not a checkpoint of this model: {'; '.join(problems[:3])}; use the model that wrote it"


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        plain = tensors[name].detach().cpu().contiguous()
        sha.update(repr((name, plain.dtype, tuple(plain.shape))).encode())
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
