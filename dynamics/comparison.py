"""The same training with several optimizers, one run each, to be laid over each other."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..landscape.selection import near_names
from .optimizers.choice import check_options, optimizer_class, option_names
from .run_folder import default_folder
from .settings import parse_settings
from .training import train
from .training_result import TrainingResult

MEASURED = ("loss", "sharpness", "threshold_ratio")


@dataclass(frozen=True)
class Comparison:
    """Finished runs by label, in the order asked for; their folders lie in `folder`."""

    folder: Path
    results: Mapping[str, TrainingResult]


def compare(
    optimizers: str | Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Comparison:
    """Trains a workload once with each optimizer, everything else equal: weights, data order, measurements.

    Args:
        optimizers: Names with settings of their own: "SGD,Adam:lr=0.001,SAM:rho=0.1,lr=0.2", or a list of such.
        out: Folder of the runs, default a new one in runs/; each run has a folder of its own inside.
        resume: Go on where the runs were stopped; those that are finished stay as they are.
        options: Of `train`. `lr`, `momentum` and `optimizer_options` are for all that take them and do not set them
            themselves.

    Raises:
        ValueError: fewer than two, two that are the same, an option that none of them takes, or what `train` raises.
    """
    chosen = _chosen(optimizers)
    if len(chosen) < 2:
        raise ValueError(f"`optimizers` is {optimizers!r}; name at least two to compare, such as 'SGD,Adam'")
    workload = options.get("workload") or "digits-mlp"
    folder = Path(out) if out is not None else default_folder(f"{workload}-compared", resume=resume)
    options.setdefault("measure", MEASURED)
    common = {key: options.pop(key) for key in ("lr", "momentum") if options.get(key) is not None}
    common |= options.pop("optimizer_options", None) or {}
    _check_common(common, chosen)
    results = {}
    for label, (name, settings) in chosen.items():
        results[label] = train(
            optimizer=name,
            optimizer_options=_fitting(name, common, settings) | settings or None,
            out=folder / re.sub(r"[^A-Za-z0-9.=-]+", "_", label),
            resume=resume,
            **options,
        )
    return Comparison(folder, results)


def _chosen(optimizers: str | Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label to name and settings."""
    entries = _entries(optimizers) if isinstance(optimizers, str) else list(optimizers)
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in entries:
        name, _, settings = entry.partition(":")
        name = optimizer_class(name.strip()).__name__
        label = f"{name} {settings.strip()}".strip()
        if label in found:
            raise ValueError(f"`optimizers` names {label!r} twice; give one of them other settings")
        options = parse_settings(settings) if settings.strip() else {}
        check_options(name, options)
        found[label] = (name, options)
    return found


def _entries(text: str) -> list[str]:
    """`SGD,Adam:lr=0.1,eps=1` as ["SGD", "Adam:lr=0.1,eps=1"]: a piece without a name goes with the one before."""
    entries: list[str] = []
    for piece in re.split(r",(?![^(\[]*[)\]])", text):
        if re.match(r"\s*\w+\s*=", piece) and entries:
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    return [entry for entry in entries if entry.strip()]


def _fitting(name: str, common: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options for all, the learning rate and those that this optimizer takes."""
    known = option_names(name, settings)
    return {key: value for key, value in common.items() if key == "lr" or key in known}


def _check_common(common: Mapping[str, Any], chosen: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    known = {option for name, settings in chosen.values() for option in option_names(name, settings)} | {"lr"}
    for option in common:
        if option not in known:
            raise ValueError(
                f"`optimizer_options` has {option!r}, which none of {', '.join(chosen)} takes (near: "
                f"{near_names(option, known)})"
            )
