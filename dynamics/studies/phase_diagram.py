"""The phase diagram of early training: what learning rate, depth and width do to loss and sharpness."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .laboratory import Laboratory
from .phase_limits import linear_unit, recovered, two_layers
from .phase_panels import diagram, numbers, or_inf, shape_panel
from .phase_runs import SOURCE, regime_claims, saturation_claims
from .phase_scan import early_runs, joined
from .result import Claim, Panel
from .study import Study

PAPER = "Kalra and Barkeshli, Phase diagram of early training dynamics in deep neural networks, 2023"
PILOT = "own reference run, before this study"
OWN = "derived here"

Cells = Mapping[tuple[int, int], Sequence[Mapping[str, Any]]]

# Cells (depth, width) and their seeds. The deep narrow one varies most from seed to seed; the deep one of width 64 is
# dear, and no claim is about it alone.
CELLS = {
    **dict.fromkeys([(2, 16), (2, 64), (2, 128), (4, 32), (4, 64), (4, 128), (8, 16), (8, 128)], 3),
    (4, 16): 5,
    (8, 64): 1,
}
# A share of active units below which they count as dead.
DEAD = 0.01
ZERO_CELLS = [(2, 16), (2, 128), (4, 16), (4, 128)]
GRID = [2 ** (0.2 * i) for i in range(31)]
ZERO_GRID = [2 ** (0.2 * i) for i in range(11)]
# Learning rates of one part.
PART_LENGTH = 8
QUICK_CELLS = {(2, 64): 1, (4, 16): 1, (4, 64): 1}
QUICK_GRID = [2 ** (0.5 * i) for i in range(11)]


def investigate(laboratory: Laboratory) -> tuple[list[Claim], list[Panel]]:
    quick = laboratory.quick
    grid = QUICK_GRID if quick else GRID
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for (depth, width), num in (QUICK_CELLS if quick else CELLS).items():
        cells[depth, width] = [
            _scan(laboratory, f"scan-{depth}-{width}-{seed}", grid, depth=depth, width=width, seed=seed)
            for seed in range(num)
        ]
    claims = [*_order(cells), *_trend(cells, quick), *_zero_output(laboratory), *_largest(cells), *_limits(laboratory)]
    width = 64 if quick else 128
    saturated, curve = saturation_claims(laboratory, width, _of(cells, (4, width), "c_loss"))
    along, runs = regime_claims(laboratory)
    claims += [*saturated, *along, *_definitions(laboratory)]
    return claims, [*diagram(cells, 4), shape_panel(cells), *runs[:2], curve, *runs[2:]]


def _scan(laboratory: Laboratory, name: str, grid: Sequence[float], **settings: Any) -> dict[str, Any]:
    """A scan over `grid` in parts, up to the first divergence."""
    parts: list[dict[str, Any]] = []
    for i in range(0, len(grid), PART_LENGTH):
        risen = parts[-1]["risen"] if parts else []
        cs = list(grid[i : i + PART_LENGTH])
        parts.append(laboratory.part(f"{name}-{i // PART_LENGTH}", early_runs, cs=cs, risen=risen, **settings))
        if parts[-1]["runs"][-1]["diverged"]:
            break
    return joined(parts)


def _order(cells: Cells) -> list[Claim]:
    """The order of the constants, in the cells that are not narrow."""
    found = [(cell, run["constants"]) for cell, runs in cells.items() if cell[1] >= 64 for run in runs]
    order = [or_inf(c["c_loss"]) <= or_inf(c["c_sharp"]) <= or_inf(c["c_max"]) for _, c in found]
    barrier = [or_inf(c["c_sharp"]) <= or_inf(c["c_barrier"]) <= or_inf(c["c_max"]) for _, c in found]
    lowest = min(or_inf(c["c_loss"]) for _, c in found)
    step = GRID[1]

    def broken(kept: Sequence[bool], *names: str) -> str:
        texts = [
            f"d = {d}, w = {w}: {', '.join(_text(c[name]) for name in names)}"
            for ((d, w), c), keeps in zip(found, kept, strict=True)
            if not keeps
        ]
        return f"{' ≤ '.join(names)} broken at " + "; ".join(texts) if texts else ""

    return [
        Claim(
            "c_loss ≤ c_sharp ≤ c_max at width 64 and above",
            SOURCE,
            "in every run",
            f"{sum(order)} of {len(order)} runs",
            all(order),
            broken(order, "c_loss", "c_sharp", "c_max"),
        ),
        Claim(
            "c_sharp ≤ c_barrier ≤ c_max at width 64 and above",
            SOURCE,
            "in every run",
            f"{sum(barrier)} of {len(barrier)} runs",
            all(barrier),
            broken(barrier, "c_sharp", "c_barrier", "c_max"),
        ),
        Claim(
            "The loss does not catapult below the edge of stability, c_loss ≥ 2",
            SOURCE,
            f">= {2 / step:.3g}, a step of the grid below",
            f"smallest c_loss {lowest:.3g}",
            lowest >= 2 / step,
        ),
    ]


def _trend(cells: Cells, quick: bool) -> list[Claim]:
    """c_loss and c_sharp over depth and width."""

    def claim(cell: tuple[int, int], expected: str, rule: Callable[[float], bool]) -> Claim:
        runs = cells.get(cell, [])
        found = [run["constants"]["c_loss"] for run in runs]
        note = "the median, as seeds differ much in a narrow net" if len(found) > 3 else ""
        values = [or_inf(c) for c in found]
        holds = rule(statistics.median(values)) if note else all(rule(c) for c in values)
        return Claim(
            f"c_loss at depth {cell[0]}, width {cell[1]}",
            PILOT,
            expected,
            f"{numbers(found)} (seeds 0 to {len(found) - 1})" if found else "not in the short version",
            None if quick else holds,
            "short version: a coarser grid" if quick and found else note,
        )

    claims = [
        claim((2, 128), "in [2, 3.1]", lambda c: 2 <= c <= 3.1),
        claim((4, 128), ">= 3.4", lambda c: c >= 3.4),
        claim((8, 128), ">= 3.4", lambda c: c >= 3.4),
        claim((4, 16), ">= 8", lambda c: c >= 8),
    ]
    sharp = {cell: [run["constants"]["c_sharp"] for run in runs] for cell, runs in cells.items()}
    texts = [f"d = {d}, w = {w}: {numbers(found)}" for (d, w), found in sharp.items() if w == 128]
    narrow = [f"d = {d}: {numbers(_of(cells, (d, 16), 'c_loss'))}" for d in (2, 8) if (d, 16) in cells]
    if texts:
        claims.append(Claim("c_sharp at width 128", PILOT, "reported", "; ".join(texts), None))
    if narrow:
        claims.append(Claim("c_loss at width 16", PILOT, "reported", "; ".join(narrow), None))
    for name in ("c_loss", "c_sharp"):
        shapes = [d / w for d, w in cells]
        levels = [statistics.median(or_inf(c) for c in _of(cells, cell, name)) for cell in cells]
        rank = _rank_correlation(shapes, levels)
        claims.append(
            Claim(
                f"{name} grows with depth over width",
                f"{SOURCE}; tolerance chosen here",
                "rank correlation over all cells >= 0.8",
                f"{rank:.2f} over {len(cells)} cells, medians over seeds",
                None if quick else rank >= 0.8,
            )
        )
    return claims


def _zero_output(laboratory: Laboratory) -> list[Claim]:
    """Networks that begin at f = 0."""
    cells = ZERO_CELLS[:1] if laboratory.quick else ZERO_CELLS
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for depth, width in cells:
        settings = {"depth": depth, "width": width, "zero_output": True}
        found[depth, width] = [
            _scan(laboratory, f"zero-{depth}-{width}-{seed}", ZERO_GRID, **settings, seed=seed)["constants"]
            for seed in ([0] if laboratory.quick else [0, 1, 2])
        ]
    loss = [c["c_loss"] for runs in found.values() for c in runs]
    sharp = [c["c_sharp"] for runs in found.values() for c in runs]
    by_cell = [f"d = {d}, w = {w}: {{}}" for d, w in cells]

    def listed(name: str) -> str:
        return "; ".join(
            t.format(numbers([c[name] for c in found[cell]])) for t, cell in zip(by_cell, cells, strict=True)
        )

    return [
        Claim(
            "With a last layer of zeros there is no sharpness reduction: c_loss is about 2",
            f"{SOURCE}; range from {PILOT}",
            "in [2, 2.64]",
            listed("c_loss"),
            all(c is not None and 2 <= c <= 2.6391 for c in loss),
            "2.64 is the second value of the grid above 2",
        ),
        Claim(
            "With a last layer of zeros the sharpness rises at once: c_sharp is the first c of the grid",
            f"{SOURCE}; {PILOT}",
            "1",
            listed("c_sharp"),
            all(c == 1 for c in sharp),
        ),
    ]


def _largest(cells: Cells) -> list[Claim]:
    """c_max at width 128."""
    claims = []
    for cell in [(2, 128), (4, 128), (8, 128)]:
        if cell not in cells:
            continue
        found = _of(cells, cell, "c_max")
        holds = all(c is not None and 9 <= c <= 28 for c in found)
        beyond = [
            f"seed {seed} a share of {run['active'][-1]:.1g}" + (" (they die)" if run["active"][-1] < DEAD else "")
            for seed, run in enumerate(cells[cell])
            if run["constants"]["c_max"] is None and run["active"][-1] is not None
        ]
        note = f"no divergence up to c = {GRID[-1]:g}; units active there: {', '.join(beyond)}" if beyond else ""
        claims.append(Claim(f"c_max at depth {cell[0]}, width 128", PILOT, "in [9, 28]", numbers(found), holds, note))
    return claims


def _limits(laboratory: Laboratory) -> list[Claim]:
    """Linear models, whose constants are known."""
    near = [1.0, 1.9, 1.99, 1.999, 2.0, 2.001, 2.01, 2.1]
    unit = laboratory.part("linear-unit", linear_unit, seeds=[0, 1, 2], cs=near)
    seeds = [0] if laboratory.quick else [0, 1, 2]
    cs = [2 ** (0.1 * i) for i in range(5, 22)]
    pair = laboratory.part("two-layers", two_layers, width=256, seeds=seeds, cs=cs, late_steps=60)
    largest = [found[2] for found in pair["trained"]]
    return [
        Claim(
            "One linear unit on one example has c_loss = 2 exactly",
            OWN,
            "between 2 and 2.001, for each seed",
            f"{unit['brackets']}; losses differ from (1 − c)^(2t) L_0 by {unit['error']:.0e}",
            all(list(bracket) == [2.0, 2.001] for bracket in unit["brackets"]),
        ),
        Claim(
            "Its sharpness never rises",
            OWN,
            "no c_sharp on the grid",
            numbers(unit["c_sharp"], near[-1]),
            all(c is None for c in unit["c_sharp"]),
        ),
        Claim(
            "Two linear layers on one example train as their closed map says",
            "Kalra, He and Barkeshli 2025; derived here",
            "losses to 1e-10, sharpness to 1e-3, up to c = 3",
            f"loss {pair['loss']:.0e}, sharpness {pair['sharpness']:.0e}, largest of {len(seeds)} seeds",
            pair["loss"] <= 1e-10 and pair["sharpness"] <= 1e-3,
        ),
        Claim(
            "Their c_loss, c_sharp and c_max are those of the closed map",
            "Kalra, He and Barkeshli 2025; derived here",
            "equal on the grid, for each seed",
            f"c_loss, c_sharp, c_max trained {[[round(c, 2) for c in found] for found in pair['trained']]}",
            pair["trained"] == pair["mapped"],
            f"width 256, grid 2^0.1; c_max of linear nets is about 4 for large width, here {numbers(largest)}",
        ),
    ]


def _definitions(laboratory: Laboratory) -> list[Claim]:
    num = 200
    right = laboratory.part("definitions", recovered, num=num, seed=0)
    return [
        Claim(
            "The four constants of a scan are found from its curves",
            SOURCE,
            "all, in scans put together around constants drawn at random",
            f"{right} of {num}",
            right == num,
        )
    ]


def _of(cells: Cells, cell: tuple[int, int], name: str) -> list[float | None]:
    return [run["constants"][name] for run in cells[cell]]


def _text(c: float | None) -> str:
    return numbers([c])


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(np.asarray(spearmanr(x, y))[0])


STUDY = Study(
    name="phase-diagram",
    title="The phase diagram of early training",
    paper=PAPER,
    setting="Fully connected ReLU networks without biases in the standard parametrisation, one-hot squared error "
    "(half the mean over examples and outputs) on the first 500 handwritten digits; gradient descent on the whole "
    "batch for 10 steps, 50 to tell divergence; float64. Learning rate η = c/λ_0 with c = 1 to 64 in factors of 2^0.2. "
    "Seeds 0 to 2 of the weights, 0 to 4 at depth 4 and width 16, 0 alone at depth 8 and width 64. Long runs: 200 "
    "digits, seeds 0 to 2; the figure has the first seed with all four regimes, if there is one.",
    investigate=investigate,
)
