"""Every figure that a trajectory has data for, as files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from ..dynamics.trajectory import Trajectory
from ..landscape.selection import near_names
from .blocks import block_spectra_grid, js_heatmap
from .comparison import stability
from .quantities import quantities
from .quantity_panels import measured
from .spectrum import density, density_evolution
from .style import save
from .trajectory import sharpness_trajectory

FORMATS = ("png", "pdf", "svg")


class Figure(NamedTuple):
    """What draws a figure, the quantity it needs with arrays at that many steps (0: values will do), what it shows.

    `quantity` "" is any. `shows` are the quantities whose values at all steps are in the figure.
    """

    draw: Callable[[Trajectory], Axes]
    quantity: str
    num_arrays: int = 0
    shows: tuple[str, ...] = ()


FIGURES = {
    "sharpness": Figure(sharpness_trajectory, "sharpness", shows=("sharpness", "stability_threshold", "loss")),
    "stability": Figure(
        stability, "threshold_ratio", shows=("loss", "sharpness", "preconditioned_sharpness", "threshold_ratio")
    ),
    "density": Figure(density, "density", 1, ("density",)),
    "density_evolution": Figure(density_evolution, "density", 2, ("density",)),
    "block_spectra": Figure(block_spectra_grid, "heterogeneity", 1),
    "block_distances": Figure(js_heatmap, "heterogeneity", 1),
    "quantities": Figure(quantities, ""),
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
        figures: Among "sharpness", "stability", "density", "density_evolution", "block_spectra",
            "block_distances" and "quantities", which shows everything measured; None draws all that there is data for,
            and "quantities" where something measured is in none of the others.
        formats: Among "png", "pdf" and "svg".

    Returns:
        The files written.
    """
    if not isinstance(trajectory, Trajectory):
        with Trajectory.open(trajectory, mode="r") as opened:
            return plot(opened, out, figures=figures, formats=formats)
    possible = _possible(trajectory)
    if not possible:
        raise ValueError(
            f"`trajectory` {trajectory.path} has nothing to draw: it holds "
            f"{', '.join(trajectory.quantities()) or 'no rows'}; add measurements to its monitor, such as Sharpness()"
        )
    chosen = list(drawable(trajectory) if figures is None else figures)
    for name in chosen:
        if name not in FIGURES:
            raise ValueError(
                f"`figures` names {name!r}; choose among {', '.join(FIGURES)} (near: {near_names(name, FIGURES)})"
            )
        if name not in possible:
            need = FIGURES[name]
            times = f" at {need.num_arrays} steps" if need.num_arrays > 1 else ""
            raise ValueError(
                f"`figures` asks for {name!r}, which needs {need.quantity!r}{times}; {trajectory.path} has data for "
                f"{', '.join(possible)}"
            )
    written = []
    for name, paths in _targets(chosen, out, formats, trajectory.path).items():
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        save(FIGURES[name].draw(trajectory), *paths)
        written += paths
    return written


def drawable(trajectory: Trajectory) -> list[str]:
    """Names of the figures that show everything measured, each quantity in its own or among all "quantities"."""
    possible = _possible(trajectory)
    shown = {quantity for name in possible for quantity in FIGURES[name].shows}
    complete = all(name in shown and _is_one_line(trajectory, name) for name in measured(trajectory))
    return [name for name in possible if not (complete and name == "quantities")]


def _possible(trajectory: Trajectory) -> list[str]:
    """Names of the figures that there is data for."""
    known = measured(trajectory)
    return [
        name
        for name, figure in FIGURES.items()
        if (figure.quantity in known or (known and not figure.quantity))
        and (not figure.quantity or "" in trajectory.blocks(figure.quantity))
        and (figure.num_arrays == 0 or len(trajectory.array_steps(figure.quantity)) >= figure.num_arrays)
    ]


def _is_one_line(trajectory: Trajectory, quantity: str) -> bool:
    """Whether the other figures, which show whole models and only of the sharpness several, show all of it."""
    if trajectory.blocks(quantity) != [""]:
        return False
    return quantity == "sharpness" or len(trajectory.indices(quantity)) == 1


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
