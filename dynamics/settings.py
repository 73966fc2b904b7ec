"""Settings written as text, `key=value,key=value`, for measurements and optimizers chosen by name."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..landscape.selection import near_names
from . import (
    beta_condition,
    coherence_measurement,
    gradient_noise,
    measurements,
    optimizer_measurements,
    preconditioned_measurements,
    sam_sharpness,
    second_moment_snr,
    spectra_measurements,
)
from .point import Measurement

# Between the words of a class's name: before a capital after a small letter, before the last one of an acronym.
_BORDER = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
MODULES = (
    measurements,
    spectra_measurements,
    preconditioned_measurements,
    optimizer_measurements,
    sam_sharpness,
    second_moment_snr,
    beta_condition,
    gradient_noise,
    coherence_measurement,
)


def parse_settings(text: str) -> dict[str, Any]:
    """`lr=0.1,betas=(0.9,0.99),which=LM` as keyword arguments; a bare word is a string."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("it is not of that form")
        settings = {str(k.arg): _value(k.value) for k in call.keywords}
        if len(settings) < len(call.keywords):
            raise ValueError("a key stands there twice")
        return settings
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{text!r} cannot be read as key=value,key=value ({error}); an example: lr=0.1,betas=(0.9,0.99)"
        ) from None


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def measurement_names() -> list[str]:
    """Every name that `measurement` takes."""
    return sorted(_classes())


def measurement(spec: str) -> Measurement:
    """A measurement from its name and settings.

    Args:
        spec: "sharpness", or its class "Sharpness", or what its rows are called; with a period in steps,
            "sharpness:20"; or with any settings, "sharpness:num=3,every=20".
    """
    name, _, settings = spec.partition(":")
    classes = _classes()
    name = _canonical(name.strip().replace("-", "_"), classes)
    if name not in classes:
        others = [*classes, *(known.name for known in classes.values())]
        raise ValueError(
            f"`measure` names {name!r}; near it: {near_names(name, others)}; all: {', '.join(measurement_names())}"
        )
    arguments = {"every": int(settings)} if settings.strip().isdecimal() else parse_settings(settings)
    known = [key for key in inspect.signature(classes[name]).parameters]
    for key in arguments:
        if key not in known:
            raise ValueError(
                f"`measure` {spec!r} sets {key!r} (near: {near_names(key, known)}); {name} takes {', '.join(known)}"
            )
    every = arguments.get("every")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"`measure` {spec!r} has every={every!r}; give a number of steps >= 1")
    return classes[name](**arguments)


def chosen_measurements(specs: Sequence[str]) -> list[Measurement]:
    """A measurement for each entry, of which there is at least one."""
    if isinstance(specs, str):
        specs = [specs]
    if not specs:
        raise ValueError(f"`measure` is empty; name at least one of {', '.join(measurement_names())}")
    return [measurement(spec) for spec in specs]


def _canonical(name: str, classes: Mapping[str, Any]) -> str:
    """A measurement may also be named by its class, or as its rows are in the table, such as heterogeneity."""
    for known, kind in classes.items():
        if name in (known, kind.__name__, kind.name):
            return known
    return name


def _classes() -> dict[str, Any]:
    found = {}
    for module in MODULES:
        for value in vars(module).values():
            if (
                inspect.isclass(value)
                and value.__module__ == module.__name__
                and callable(getattr(value, "measure", None))
            ):
                found[re.sub(_BORDER, "_", value.__name__).lower()] = value
    return found
