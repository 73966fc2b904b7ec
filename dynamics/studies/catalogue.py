"""The studies by name, and running one."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from ...landscape.selection import near_names
from ..atomic_files import write_atomically
from .laboratory import Laboratory
from .result import StudyResult
from .study import Study

# The module of each, loaded when it is asked for.
STUDIES = {
    "sam-late": "sam_late",
    "sgd-noise-regimes": "sgd_noise_regimes",
    "heavy-tails": "heavy_tails",
    "accelerated-sgd": "accelerated_sgd",
    "coherence": "coherence",
    "warmup": "warmup",
    "uv-model": "uv_model",
    "phase-diagram": "phase_diagram",
    "sign-transformer": "sign_transformer",
    "low-bit-adamw": "low_bit_adamw",
    "sgd-sai": "sgd_sai",
    "psgd": "psgd",
    "adam-mini": "adam_mini",
    "block-heterogeneity": "block_heterogeneity",
    "slim-adam": "slim_adam",
    "sign-methods": "sign_methods",
    "adam-convergence": "adam_convergence",
    "generic-adam": "generic_adam",
    "sign-round": "sign_round",
    "adaptive-edge": "adaptive_edge",
}
DEFAULT_PARENT = "runs/studies"
RESULT, TABLE = "study.json", "study.md"


def study_named(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in STUDIES:
        raise ValueError(f"`name` is {name!r}; near it: {near_names(name, STUDIES)}; all: {', '.join(STUDIES)}")
    return importlib.import_module(f".{STUDIES[name]}", __package__).STUDY


def default_study_folder(name: str, *, quick: bool) -> Path:
    """runs/studies/NAME, runs/studies-quick/NAME for the short version."""
    return default_studies_folder(quick=quick) / name


def default_studies_folder(*, quick: bool) -> Path:
    """runs/studies, or runs/studies-quick for short versions."""
    return Path(f"{DEFAULT_PARENT}-quick" if quick else DEFAULT_PARENT)


def kept_result(folder: Path) -> StudyResult | None:
    """What a study wrote into its folder, or None where it has not run whole."""
    path = folder / RESULT
    return StudyResult.from_json(json.loads(path.read_text())) if path.is_file() else None


def study(
    name: str,
    *,
    quick: bool = False,
    out: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> StudyResult:
    """Puts the claims of a paper to the test and writes what was found.

    Every part is kept as it finishes: a study that was killed goes on with the next part.

    Args:
        name: One of `STUDIES`.
        quick: Fewer seeds and steps, less than a minute.
        out: Folder of the result, default `default_study_folder(...)`: study.json, study.md and `parts/`.
        say: Called with the name of each part that begins.
    """
    chosen = study_named(name)
    folder = default_study_folder(name, quick=quick) if out is None else Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`out` {folder} cannot be made ({error.strerror}); give a writable folder") from error
    result = chosen.run(Laboratory(folder, quick=quick, say=say))
    write_atomically(folder / RESULT, json.dumps(result.to_json()).encode() + b"\n")
    write_atomically(folder / TABLE, result.markdown().encode())
    return result
