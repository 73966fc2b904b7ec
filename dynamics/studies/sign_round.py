"""SignRound put to the test: against rounding to nearest, all roundings and Adam, on networks at two bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .rounding_experiments import (
    ADAM_LRS,
    ITERATIONS,
    rounded_block,
    rounded_digits,
    rounded_text,
    rounding_landscape,
    row_roundings,
    update_rules,
)
from .study import Study

PAPER = "Cheng et al. 2023"
BITS = (2, 3, 4)


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims; curves of the descent, of all roundings and of the loss along V."""
    blocks, block_panel = _blocks(lab)
    all_roundings, rounding_panel = _all_roundings(lab)
    landscape, line_panel = _landscape(lab)
    claims = [*blocks, *_updates(lab), *all_roundings, *_networks(lab), *landscape]
    return claims, [block_panel, rounding_panel, line_panel]


# --- a residual block -----------------------------------------------------------------------------------------------


def _blocks(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds = range(2 if lab.quick else 5)
    runs = {
        (bits, clip): [
            lab.part(f"block-{bits}-{'clip' if clip else 'V'}-{s}", rounded_block, bits=bits, clip=clip, seed=s)
            for s in seeds
        ]
        for bits in BITS
        for clip in (False, True)
    }

    def of(bits: int, clip: bool, name: str) -> list[float]:
        return [run[name] for run in runs[bits, clip]]

    def told(clip: bool, name: str) -> str:
        return "; ".join(
            f"{bits} bits {min(of(bits, clip, name)):.3f}-{max(of(bits, clip, name)):.3f}" for bits in BITS
        )

    every = [run for found in runs.values() for run in found]
    lower = {
        bits: [a < b for a, b in zip(of(bits, True, "ratio"), of(bits, False, "ratio"), strict=True)] for bits in BITS
    }
    travel = max(run["max_offset"] for run in every)
    where = f"{len(seeds)} seeds"
    claims = [
        Claim(
            "learned rounding lowers the output error of a residual block",
            f"{PAPER}, section 3",
            "error / rounding to nearest <= 0.7 in every seed, offsets alone",
            f"{told(False, 'ratio')} ({where}; held-out inputs {told(False, 'held_out')})",
            all(x <= 0.7 for bits in BITS for x in of(bits, False, "ratio")),
        ),
        Claim(
            "so does learned rounding with clipping",
            f"{PAPER}, section 3",
            "<= 0.6 in every seed",
            f"{told(True, 'ratio')} (held-out inputs {told(True, 'held_out')})",
            all(x <= 0.6 for bits in BITS for x in of(bits, True, "ratio")),
        ),
        Claim(
            "clipping helps",
            f"{PAPER}, section 3",
            "lower than with offsets alone in every seed",
            "; ".join(
                f"{bits} bits in {sum(lower[bits])} of {len(seeds)}, mean {np.mean(of(bits, True, 'ratio')):.3f} "
                f"against {np.mean(of(bits, False, 'ratio')):.3f}"
                for bits in BITS
            ),
            all(all(found) for found in lower.values()),
            "" if all(all(found) for found in lower.values()) else "not in every seed",
        ),
        Claim(
            "never worse than rounding to nearest on the fixed subset it is judged by",
            "derived here: nearest is the first candidate",
            "<= 1 in all runs",
            f"largest {max(run['best'] for run in every):.3f} of {len(every)}",
            all(run["best"] <= 1 for run in every),
        ),
        Claim(
            "offsets stay within half a grid step: lr = 1/K with linear decay travels (K + 1)/(2K)",
            "derived here",
            "max |V| <= 0.5025 + 1e-6",
            f"{travel:.4f}; {100 * np.mean([run['flips'] for run in every]):.0f} % of the codes differ from nearest",
            travel <= 0.5025 + 1e-6,
        ),
        Claim(
            "the packed codes decode to the weights in the block",
            "derived here",
            "bit for bit, all runs",
            f"{sum(run['exact'] for run in every)} of {len(every)}; bytes x 8 / weight: "
            + ", ".join(f"{of(bits, True, 'bits_per_weight')[0]:.3f}" for bits in BITS),
            all(run["exact"] for run in every),
        ),
    ]
    lines = []
    for bits in BITS:
        curves = np.array(of_curves(runs[bits, True]))
        lines.append(
            Line(f"{bits} bits", list(range(curves.shape[1])), curves.mean(0).tolist(), curves.std(0).tolist())
        )
    panel = Panel("Residual block, with clipping", "iteration", "error / nearest", lines, levels={"nearest": 1.0})
    return claims, panel


def of_curves(runs: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [run["curve"] for run in runs]


# --- sign against Adam ----------------------------------------------------------------------------------------------


def _updates(lab: Laboratory) -> list[Claim]:
    seeds = range(1 if lab.quick else 3)
    runs = {
        bits: [lab.part(f"updates-{bits}-{s}", update_rules, bits=bits, seed=s, iterations=ITERATIONS) for s in seeds]
        for bits in BITS
    }
    every = [run for found in runs.values() for run in found]

    def means(bits: int, name: str) -> float:
        return float(np.mean([run[name] for run in runs[bits]]))

    tuned = {bits: min(means(bits, f"Adam {multiple:g}") for multiple in ADAM_LRS) for bits in BITS}
    same = {bits: means(bits, "Adam 1") for bits in BITS}
    signs = {bits: means(bits, "sign") for bits in BITS}
    moved = max(run["moved"] for run in every)
    return [
        Claim(
            "signed updates of V do as well as Adam's at the same rate and number of iterations",
            f"{PAPER}, section 3",
            "error <= 1.1 times Adam's at every number of bits",
            "; ".join(f"{bits} bits sign {signs[bits]:.3f}, Adam {same[bits]:.3f}" for bits in BITS)
            + f" of nearest ({len(seeds)} seeds)",
            all(signs[bits] <= 1.1 * same[bits] for bits in BITS),
            "on a small block and with offsets alone",
        ),
        Claim(
            "the same against the best of four rates of Adam, 0.5 to 4 over K",
            "not claimed by the paper",
            "reported",
            "; ".join(f"{bits} bits sign / Adam {signs[bits] / tuned[bits]:.3f}" for bits in BITS),
            None,
        ),
        Claim(
            "a loss 1024 times as large gives the same offsets",
            "derived here",
            "bit for bit",
            f"largest difference {moved:g}",
            moved == 0,
        ),
    ]


# --- all roundings of one row ---------------------------------------------------------------------------------------


def _all_roundings(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds = range(5 if lab.quick else 20)
    runs = [lab.part(f"row-{s}", row_roundings, bits=3, orthogonal=False, seed=s) for s in seeds]
    straight = [lab.part(f"orthogonal-{s}", row_roundings, bits=3, orthogonal=True, seed=s) for s in seeds]
    best, nearest, last = (np.array([run[name] for run in runs]) for name in ("best", "nearest", "last"))
    flips = {keep: sum(run[f"flips {keep}"] for run in straight) for keep in ("best", "last")}
    within = int((best <= 1.5).sum())
    claims = [
        Claim(
            "the error lies between the least of all 4096 roundings of a row of 12 weights and that of nearest",
            "derived here",
            "in every row",
            f"least <= SignRound <= nearest in {int(((best >= 1 - 1e-9) & (best <= nearest)).sum())} of {len(runs)}",
            bool(((best >= 1 - 1e-9) & (best <= nearest)).all()),
        ),
        Claim(
            "it comes within 1.5 times the least error",
            "derived here",
            "in every row",
            f"in {within} of {len(runs)}; median {np.median(best):.2f}, largest {best.max():.2f} (nearest: median "
            f"{np.median(nearest):.2f}, largest {nearest.max():.2f}; last step: median {np.median(last):.2f})",
            within == len(runs),
            "" if within == len(runs) else "the best of 201 steps can be far from the best of 4096 roundings",
        ),
        Claim(
            "for orthogonal inputs nearest is the least, and it is kept",
            "derived here",
            "no code changes",
            f"{flips['best']} of {12 * len(straight)} codes differ; after the last step instead {flips['last']}",
            flips["best"] == 0,
            "the last step may stand on the other side of a boundary that V crosses back and forth"
            if flips["last"]
            else "",
        ),
    ]
    order = np.argsort(nearest)
    x = list(range(1, len(runs) + 1))
    lines = [
        Line(label, x, values[order].tolist(), marker=True)
        for label, values in (("nearest", nearest), ("SignRound, best step", best), ("SignRound, last step", last))
    ]
    panel = Panel(
        "Rows of 12 weights, 3 bits", "row, in order of nearest", "error / least of all roundings", lines, y_log=True
    )
    return claims, panel


# --- networks at two bits -----------------------------------------------------------------------------------------


def _networks(lab: Laboratory) -> list[Claim]:
    text = [
        lab.part(f"text-{s}", rounded_text, seed=s, steps=120 if lab.quick else 400)
        for s in range(1 if lab.quick else 3)
    ]
    images = [
        lab.part(f"digits-{s}", rounded_digits, seed=s, epochs=10 if lab.quick else 40)
        for s in range(2 if lab.quick else 5)
    ]
    shares = [(run["nearest"] - run["signround"]) / (run["nearest"] - run["full"]) for run in text]
    full, nearest, learned = (np.array([run[name] for run in images]) for name in ("full", "nearest", "signround"))
    lost = full.mean() - nearest.mean()
    kept = [run["signround held-out error"] / run["nearest held-out error"] for run in images]

    def overfit(runs: list[dict[str, float]], name: str) -> list[float]:
        return [run[f"{name} error"] / run[f"{name} held-out error"] for run in runs]

    ratios = {"text": overfit(text, "signround"), "digits": overfit(images, "signround")}
    plain = {"text": overfit(text, "nearest"), "digits": overfit(images, "nearest")}
    return [
        Claim(
            "character transformer with its layers at 2 bits: lost nats are won back",
            f"{PAPER}, table of 2-bit results",
            ">= 30 % of what rounding to nearest loses on held-out text, in every seed",
            "; ".join(
                f"{run['full']:.3f}, nearest {run['nearest']:.3f}, SignRound {run['signround']:.3f}: "
                f"{100 * share:.0f} %"
                for run, share in zip(text, shares, strict=True)
            ),
            all(share >= 0.3 for share in shares),
        ),
        Claim(
            "digits network at 2 bits, held-out accuracy",
            f"{PAPER}, table of 2-bit results",
            ">= 30 % of what rounding to nearest loses, where that is a point or more",
            f"full {full.mean():.2f}, nearest {nearest.mean():.2f}, SignRound {learned.mean():.2f} ({len(images)} "
            f"seeds); error of the logits / nearest {min(kept):.2f} to {max(kept):.2f}",
            None if lost < 1 else bool(learned.mean() - nearest.mean() >= 0.3 * lost),
            f"rounding to nearest loses {lost:.2f} points, too little to win back" if lost < 1 else "",
        ),
        Claim(
            "it does not overfit the calibration data",
            "derived here",
            "error of the logits, calibration / held-out >= 0.7 in every seed",
            "; ".join(
                f"{name} {min(found):.2f} to {max(found):.2f} (nearest: {min(plain[name]):.2f} to "
                f"{max(plain[name]):.2f})"
                for name, found in ratios.items()
            ),
            min(min(found) for found in ratios.values()) >= 0.7,
        ),
    ]


# --- the landscape of rounding --------------------------------------------------------------------------------------


def _landscape(lab: Laboratory) -> tuple[list[Claim], Panel]:
    num_points = 21 if lab.quick else 81
    runs = {
        bits: lab.part(f"landscape-{bits}", rounding_landscape, bits=bits, seed=0, num_points=num_points)
        for bits in BITS
    }

    def told(name: str) -> str:
        pairs = ((bits, run[f"nearest {name}"], run[f"learned {name}"]) for bits, run in runs.items())
        return "; ".join(f"{bits} bits {a:.4g} -> {b:.4g}" for bits, a, b in pairs)

    claims = [
        Claim(
            "sharpness of the block loss by the weights, nearest -> learned", PAPER, "reported", told("sharpness"), None
        ),
        Claim(
            "eᵀHe/2 over the loss, e the rounding error, H at full precision, nearest -> learned",
            "derived here",
            "reported",
            told("quadratic"),
            None,
            f"1 where the loss is quadratic in e; ‖e‖ {told('length')}: longer, but along flatter directions",
        ),
    ]
    lines = [Line(f"{bits} bits", run["place"], run["loss"]) for bits, run in runs.items()]
    return claims, Panel(
        "Loss along the learned offsets", "a in V = a V*", "error / nearest", lines, levels={"nearest": 1.0}
    )


STUDY = Study(
    name="sign-round",
    title="SignRound: learned rounding by signed gradient descent",
    paper="Cheng, Zhang, Shen, Cai, He, Lv, Liu, Optimize Weight Rounding via Signed Gradient Descent for the "
    "Quantization of LLMs, 2023 (Findings of EMNLP 2024)",
    setting="Residual GELU block 64-256-64 on 2048 correlated inputs with 5 % outlier channels, groups of 32, 200 "
    "iterations of batch 256, 5 seeds; rows of 12 weights against all 4096 roundings; digits MLP (5 seeds) and "
    "character transformer (3 seeds) at 2 bits.",
    investigate=investigate,
)
