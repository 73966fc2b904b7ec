"""The regimes of a run as shades behind its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.patches import Patch

from ..dynamics.regimes import Regime
from .style import BLUE, GREY, ORANGE, PURPLE, VERMILION


class Shade(NamedTuple):
    """Colour and hatching, which a grey print keeps."""

    color: str
    hatch: str | None


SHADES = {
    "transient": Shade(BLUE, "...."),
    "saturation": Shade(GREY, None),
    "progressive sharpening": Shade(ORANGE, None),
    "edge of stability": Shade(VERMILION, "////"),
    "progressive flattening": Shade(PURPLE, "\\\\\\\\"),
}
LEGEND = "regimes-legend"


def shade_regimes(axes: Sequence[Axes], regimes: Sequence[Regime], steps: tuple[int, int]) -> None:
    """Shades every regime in all `axes` and names them over the first.

    A border lies halfway between the last record of a regime and the first of the next.

    Args:
        steps: First and last of the run.
    """
    for regime in regimes:
        if not isinstance(regime, Regime):
            raise TypeError(
                f"`regimes` holds a {type(regime).__name__}; give what sharpscope.regimes(trajectory) returns"
            )
    if any(artist.get_gid() == LEGEND for artist in axes[0].get_children()):
        raise ValueError("`regimes` are those of a second run on the same `ax`; shade one run only")
    ordered = sorted(regimes, key=lambda regime: regime.first_step)
    first, last = ordered[0].first_step, max(regime.last_step for regime in ordered)
    if first < steps[0] or last > steps[1]:
        raise ValueError(
            f"`regimes` go from step {first} to {last}, `trajectory` from {steps[0]} to {steps[1]}; give those "
            "of this trajectory"
        )
    for i, regime in enumerate(ordered):
        left = (ordered[i - 1].last_step + regime.first_step) / 2 if i else regime.first_step
        right = (regime.last_step + ordered[i + 1].first_step) / 2 if i + 1 < len(ordered) else regime.last_step
        for ax in axes:
            ax.axvspan(left, right, zorder=0, gid=f"regime-{i}", **_area(regime.label))
            if i:
                ax.axvline(left, color="#999999", linewidth=0.6, zorder=0.1, gid=f"regime-{i}-border")
    labels = list(dict.fromkeys(regime.label for regime in ordered))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    handles = [Patch(**_area(label)) for label in labels]
    legend = Legend(
        axes[0], handles, labels, ncols=3, frameon=False, fontsize="small", handlelength=1.6, columnspacing=1.2, **place
    )
    legend.set_gid(LEGEND)
    axes[0].add_artist(legend)
    legend.set_clip_on(False)  # it stands outside, and takes its own place in the layout


def _area(label: str) -> dict[str, Any]:
    shade = SHADES[label]
    return {"facecolor": (shade.color, 0.16), "edgecolor": (shade.color, 0.3), "hatch": shade.hatch, "linewidth": 0}
