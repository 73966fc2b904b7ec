"""Which recorded rows stand in which panel of the figure of all quantities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..dynamics.trajectory import Trajectory
from ..landscape.selection import near_names
from .blocks import shortened
from .curve import Curve, Look, curve
from .style import BLACK, BLUE, COLORS, DASHES, GREY, MARKERS

if TYPE_CHECKING:
    import pandas as pd

# What the monitor notes about itself.
BOOKKEEPING = ("cadence", "skipped")
# They have the stability threshold as a level.
AT_THRESHOLD = ("sharpness", "batch_sharpness")
# Learning rates of one measurement, which share a panel.
RATES = re.compile(r"(?P<panel>.+_lr)_(?P<line>exact|condition_d|theorem1|gradient_descent)")
MOST_NAMED = 7
# Values over a longer range have a logarithmic axis.
DECADE = 10.0


class Line(NamedTuple):
    """A curve with the ends of its band [k], maybe infinite; `name` is None where it is not in the legend."""

    curve: Curve
    lower: np.ndarray
    upper: np.ndarray
    name: str | None
    look: Look


class Panel(NamedTuple):
    """Lines, background first, the number of grey ones, and the level to draw."""

    name: str
    lines: list[Line]
    others: int = 0
    threshold: Curve | None = None

    @property
    def width(self) -> int:
        """Cells of the grid: names stand in a second one."""
        return 2 if any(line.name for line in self.lines) else 1

    @property
    def is_log(self) -> bool:
        """Whether all values are positive and span more than a decade."""
        values = np.concatenate([line.curve.values for line in self.lines])
        values = values[np.isfinite(values)]
        return len(values) > 0 and values.min() > 0 and values.max() > DECADE * values.min()


def measured(trajectory: Trajectory) -> list[str]:
    """The quantities of a trajectory without the monitor's notes about itself."""
    return [name for name in trajectory.quantities() if name not in BOOKKEEPING]


def panels_of(trajectory: Trajectory, names: Sequence[str] | None = None) -> list[Panel]:
    """A panel for each of the quantities `names`, default all, but for those that belong into another's."""
    known = trajectory.quantities()
    chosen = measured(trajectory) if names is None else [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"`names` has {name!r}, which {trajectory.path} does not hold; near it: {near_names(name, known)}"
            )
    chosen = [name for name in dict.fromkeys(chosen) if not _belongs(name, chosen, known)]
    shared: dict[str, list[tuple[str, str]]] = {}
    for name in chosen:
        found = RATES.fullmatch(name)
        panel, line = (found["panel"], found["line"]) if found else (name, "")
        shared.setdefault(panel, []).append((name, line))
    table = trajectory.to_pandas()
    threshold = curve(table, "stability_threshold")
    panels = []
    for panel, members in shared.items():
        lines = [line for name, label in members for line in _lines(trajectory, table, name, label)]
        lines, others = _styled(lines)
        panels.append(Panel(panel, lines, others, threshold if panel in AT_THRESHOLD else None))
    return panels


def _belongs(name: str, chosen: Sequence[str], known: Sequence[str]) -> bool:
    """Whether it is an end of another quantity's band, or the level of another panel."""
    if name == "stability_threshold":
        return any(other in chosen for other in AT_THRESHOLD)
    base = re.sub("_(low|high)$", "", name)
    return base in chosen and base != name and {f"{base}_low", f"{base}_high"} <= set(known)


def _lines(trajectory: Trajectory, table: pd.DataFrame, name: str, label: str) -> list[Line]:
    """Lines of a quantity, not yet styled; the whole model has an empty name where it is alone."""
    ends = {f"{name}_low", f"{name}_high"} <= set(trajectory.quantities())
    rows = table.loc[table["quantity"] == name]
    blocks = trajectory.blocks(name)
    short = _short_names(blocks)
    lines = []
    for block in blocks:
        indices = sorted(set(rows.loc[rows["block"] == block, "index"]))
        for index in indices:
            one = curve(rows, name, block, index)
            if one is None:
                continue
            lower, upper = one.values - one.errors, one.values + one.errors
            if ends:
                lower, upper = (_at(table, f"{name}_{end}", block, index, one.steps) for end in ("low", "high"))
            words = [label, short[block] or ("whole model" if len(blocks) > 1 else "")]
            if len(indices) > 1:
                words.append(f"[{index}]" if any(words) else f"index {index}")
            lines.append(Line(one, lower, upper, " ".join(filter(None, words)), Look(BLUE)))
    return lines


def _short_names(blocks: Sequence[str]) -> dict[str, str]:
    """Blocks without the modules that all are in, and without the middle of a long name where they stay different."""
    parts = [block.split(".") for block in blocks if block]
    shared = sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False)))
    if any(len(words) == shared for words in parts):
        shared -= 1
    names = {block: ("…" if block and shared > 0 else "") + ".".join(block.split(".")[shared:]) for block in blocks}
    short = {block: shortened(name) for block, name in names.items()}
    return short if len(set(short.values())) == len(blocks) else names


def _at(table: pd.DataFrame, quantity: str, block: str, index: int, steps: np.ndarray) -> np.ndarray:
    """Values [k] at `steps`, infinite ones too; NaN where there is none."""
    rows = table[(table["quantity"] == quantity) & (table["block"] == block) & (table["index"] == index)]
    found = dict(zip(rows["step"], rows["value"], strict=True))
    return np.array([found.get(step, np.nan) for step in steps.tolist()], dtype=float)


def _styled(lines: list[Line]) -> tuple[list[Line], int]:
    """The lines with their looks, the grey ones first, and how many those are."""
    if len(lines) == 1:
        return [lines[0]._replace(name=None, look=Look(BLUE, width=1.5))], 0
    whole = [i for i, line in enumerate(lines) if (line.name or "").startswith("whole model")][:1]
    parts = [i for i in range(len(lines)) if i not in whole]
    colors = [color for color in COLORS if not (whole and color == BLACK)]
    named = _spread(lines, parts, MOST_NAMED - len(whole))
    grey = [lines[i]._replace(name=None, look=Look(GREY, "-", "", 0.5, 0.7, 0.0)) for i in parts if i not in named]
    styled = []
    for look, i in enumerate(named):
        drawn = Look(colors[look], DASHES[look + len(whole)], MARKERS[look], 1.1, 1.0, 0.12)
        styled.append(lines[i]._replace(look=drawn))
    styled += [lines[i]._replace(look=Look(BLACK, width=1.7)) for i in whole]
    return [*grey, *styled], len(grey)


def _spread(lines: list[Line], parts: list[int], most: int) -> list[int]:
    """At most so many of `parts`, evenly over the order of their last finite values, in their own order."""
    if len(parts) <= most:
        return parts

    def last(i: int) -> float:
        values = lines[i].curve.values
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else -np.inf

    ordered = sorted(parts, key=last)
    ranks = np.linspace(0, len(ordered) - 1, most).round().astype(int)
    return sorted(ordered[rank] for rank in ranks)
