"""What decides a training run, complete and checked, so that the run can be repeated and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .optimizers.choice import descends_like, has_threshold, optimizer_class, with_defaults
from .settings import chosen_measurements
from .workloads.catalogue import Defaults, defaults_of
from .workloads.text import NAMED_TEXTS

NUM_CHECKPOINTS = 20
FULL_BATCH = "full"


@dataclass(frozen=True)
class TrainingOptions:
    """Every choice of a run, as `train` explains them; all of it fits into JSON."""

    workload: str
    optimizer: str
    optimizer_options: dict[str, Any]
    batch_size: int | str
    steps: int
    every: int
    measure: tuple[str, ...]
    seed: int
    data: str | None
    num_examples: int | None
    num_measured: int | None
    checkpoint_every: int
    device: str
    threads: int

    @classmethod
    def resolve(cls, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> TrainingOptions:
        """Fills in what was not `given` (absent or None): from the `stored` options of a run, or with defaults.

        `lr` and `momentum` among the given are shorthands for entries of `optimizer_options`.
        """
        given = {key: value for key, value in given.items() if value is not None}
        options = dict(stored["optimizer_options"]) if stored else {}
        options |= given.pop("optimizer_options", {})
        options |= {key: given.pop(key) for key in ("lr", "momentum") if key in given}
        found = dict(stored or {}) | given
        name = found.get("workload", "digits-mlp")
        defaults = defaults_of(name)
        optimizer = optimizer_class(found.get("optimizer", "SGD")).__name__
        like = descends_like(optimizer, options)
        if "lr" not in options and not stored and like in defaults.lr:
            options["lr"] = defaults.lr[like]
        if not stored:
            options = with_defaults(optimizer, options)
        steps = _count(found.get("steps", defaults.steps), "steps")
        batch_size = found.get("batch_size", defaults.batch_size or FULL_BATCH)
        measure = found.get("measure", _default_measure(defaults, optimizer, like))
        device = str(found.get("device", "cpu"))
        _check_device(device)
        resolved = cls(
            workload=name,
            optimizer=optimizer,
            optimizer_options={key: _plain(value, key) for key, value in sorted(options.items())},
            batch_size=batch_size if batch_size == FULL_BATCH else _count(batch_size, "batch_size"),
            steps=steps,
            every=_count(found.get("every", defaults.every), "every"),
            measure=(measure,) if isinstance(measure, str) else tuple(measure),
            seed=_count(found.get("seed", 0), "seed", least=0),
            data=_place(found.get("data")),
            num_examples=_optional_count(found.get("num_examples"), "num_examples"),
            num_measured=_optional_count(found.get("num_measured"), "num_measured"),
            checkpoint_every=_count(
                found.get("checkpoint_every", max(1, steps // NUM_CHECKPOINTS)), "checkpoint_every"
            ),
            device=device,
            threads=_count(found.get("threads", defaults.threads or torch.get_num_threads()), "threads"),
        )
        chosen_measurements(resolved.measure)
        return resolved

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"measure": list(self.measure)}

    def changes(self, other: TrainingOptions) -> list[str]:
        """Each option that differs, as "lr 0.2 -> 0.1"."""
        mine, others = self.to_json(), other.to_json()
        return [f"{key} {mine[key]!r} -> {others[key]!r}" for key in mine if mine[key] != others[key]]


def _default_measure(defaults: Defaults, optimizer: str, like: str) -> tuple[str, ...]:
    """The workload's; an optimizer with a geometry of its own has its threshold there."""
    if like == "SGD":
        return defaults.measure
    felt = ("preconditioned_sharpness", "threshold_ratio") if has_threshold(optimizer) else ()
    return tuple(name for name in defaults.measure if name != "stability_threshold") + felt


def _count(value: Any, name: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        full = f", or {FULL_BATCH!r}" if name == "batch_size" else ""
        raise TypeError(f"`{name}` is {value!r}; give a whole number{full}")
    if value < least:
        raise ValueError(f"`{name}` is {value}; it must be at least {least}")
    return value


def _optional_count(value: Any, name: str) -> int | None:
    return None if value is None else _count(value, name)


def _place(data: Any) -> str | None:
    """Where the data is, independent of the folder from which the run is resumed."""
    if data is None or data in NAMED_TEXTS:
        return data
    path = Path(data).expanduser()
    return str(path.absolute()) if path.exists() else str(data)


def _plain(value: Any, key: str) -> Any:
    """A value as JSON gives it back, so that stored and given options compare."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item, key) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"`optimizer_options[{key!r}]` is {value!r}; give numbers, strings, None or lists of them")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"`device` is {device!r}; give 'cpu' or 'cuda'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {device!r} but torch {torch.__version__} finds no CUDA device; use 'cpu'")
