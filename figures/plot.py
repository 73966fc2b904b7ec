"""Every figure that a trajectory has data for, as files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ..dynamics.trajectory import Trajectory
from ..landscape.selection import near_names
from .style import save
from .trajectory import sharpness_trajectory

FORMATS = ("png", "pdf", "svg")
# Name of a figure: the quantity that it needs, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[Trajectory], Axes]]] = {
    "sharpness": ("sharpness", sharpness_trajectory),
}


def plot(
    trajectory: Trajectory | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    figures: Sequence[str] | None = None,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Draws a trajectory into files.

    Args:
        trajectory: Open, or its folder.
        out: A folder, default the trajectory's own; or one file whose ending is the format, for a single figure.
        figures: Among "sharpness", "density", "blocks" and "distances"; None draws all that there is data for.
        formats: Among "png", "pdf" and "svg".

    Returns:
        The files written.
    """
    if not isinstance(trajectory, Trajectory):
        with Trajectory.open(trajectory, mode="r") as opened:
            return plot(opened, out, figures=figures, formats=formats)
    known = trajectory.quantities()
    possible = [name for name, (quantity, _) in FIGURES.items() if quantity in known]
    if not possible:
        needed = ", ".join(dict.fromkeys(quantity for quantity, _ in FIGURES.values()))
        raise ValueError(
            f"`trajectory` {trajectory.path} has nothing to draw: it holds {', '.join(known) or 'no rows'}, and the "
            f"figures need one of {needed}"
        )
    chosen = list(possible if figures is None else figures)
    for name in chosen:
        if name not in FIGURES:
            raise ValueError(
                f"`figures` names {name!r}; choose among {', '.join(FIGURES)} (near: {near_names(name, FIGURES)})"
            )
        if name not in possible:
            raise ValueError(
                f"`figures` asks for {name!r}, which needs {FIGURES[name][0]!r}; here are {', '.join(possible)}"
            )
    written = []
    for name, paths in _targets(chosen, out, formats, trajectory.path).items():
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        save(FIGURES[name][1](trajectory), *paths)
        written += paths
    return written


def _targets(
    chosen: list[str], out: str | os.PathLike[str] | None, formats: Sequence[str], folder: Path
) -> dict[str, list[Path]]:
    """The files of each figure."""
    for kind in formats:
        if kind not in FORMATS:
            raise ValueError(f"`formats` has {kind!r}; choose among {', '.join(FORMATS)}")
    place = folder if out is None else Path(out).expanduser()
    if place.suffix[1:] in FORMATS and not place.is_dir():
        if len(chosen) != 1:
            raise ValueError(
                f"`out` {place} is one file, and there are {len(chosen)} figures ({', '.join(chosen)}); name one with "
                "`figures` (--figure), or give a folder"
            )
        return {chosen[0]: [place]}
    return {name: [place / f"{name}.{kind}" for kind in formats] for name in chosen}
