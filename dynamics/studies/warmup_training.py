"""The study of warmup, in training: the boundary, Adam against GI-Adam, the edge of Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..catapults import warmup_mechanism
from . import warmup_runs as runs
from .claim_numbers import listed
from .laboratory import Laboratory
from .result import Claim, Heat, Line, Panel

PAPER = "Kalra & Barkeshli 2024"
REFERENCE = "own reference run"
WARMUPS, SHARES = (1, 4, 16, 64, 256), (2, 4, 8, 16, 32, 64, 128, 256)
# What the claims need of them.
CLAIMED_WARMUPS, CLAIMED_SHARES = (1, 16, 64, 256), (8, 16, 32, 64, 128)
BOUNDARY_STEPS = 300
ADAM_RATES = (1.25e-4, 5e-4, 2e-3, 8e-3, 0.032, 0.128)
ADAM_STEPS = 200
# Loss of the best constant prediction of ten equally frequent classes.
BEST_CONSTANT = 0.045
EDGE_RATES = {"Adam": 8e-3, "GI-Adam": 0.02}
EDGE = (0.8, 1.3)
NETS = {"standard": False, "zero output": True}


def seeds_of(lab: Laboratory) -> list[int]:
    """Of the weights."""
    return [0] if lab.quick else [0, 1, 2]


def first_sharpness(lab: Laboratory, seed: int, *, zero_output: bool) -> float:
    """λ_0 of the ReLU net."""
    name = f"initial-{seed}" + ("-zero" if zero_output else "")
    return lab.part(name, runs.initial, seed=seed, zero_output=zero_output)["sharpness"]


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


# --- the boundary of training ---------------------------------------------------------------------------------------


def boundary(lab: Laboratory) -> tuple[list[Claim], Panel]:
    """Which pairs of η_trgt and T_wrm train, and where they end."""
    seeds = seeds_of(lab)
    table: dict[tuple[int, int, int], Mapping[str, Any]] = {}
    for seed in seeds:
        whole = seed == 0 and not lab.quick
        for warmup in WARMUPS if whole else CLAIMED_WARMUPS:
            shares = SHARES if whole else CLAIMED_SHARES
            shares = (8, 128) if lab.quick else shares
            rows = lab.part(
                f"boundary-{seed}-{warmup}",
                runs.boundary,
                seed=seed,
                warmup_steps=warmup,
                shares=list(shares),
                steps=BOUNDARY_STEPS,
            )
            table |= {(seed, warmup, int(row["c"])): row for row in rows}
    first = [first_sharpness(lab, s, zero_output=False) for s in seeds]
    constant = {key: row for key, row in table.items() if key[1] == 1 and key[2] >= 16}
    slow = {key: row for key, row in table.items() if key[1] in (16, 64, 256)}
    highest = {key: row for key, row in slow.items() if key[2] == 128}
    edge = {key: row for key, row in slow.items() if 32 <= key[2] <= 128 and not row["diverged"]}
    lost = [f"seed {s}, T_wrm = {T}" for (s, T, _), row in highest.items() if row["diverged"]]
    outside = [
        f"{row['edge']:.2f} (seed {s}, T_wrm = {T}, c = {c})"
        for (s, T, c), row in edge.items()
        if not 1.8 <= row["edge"] <= 2.3
    ]
    gains = [
        (row["final"], table[s, T, 8]["final"])
        for (s, T, _), row in highest.items()
        if not row["diverged"] and not table[s, T, 8]["diverged"]
    ]
    fates = [{row["diverged"] for key, row in highest.items() if key[1] == T} for T in (16, 64, 256)]
    claims = [
        Claim(
            "Sharpness at the first weights of the ReLU net",
            REFERENCE,
            "reported (30.15 there)",
            listed(first),
            None,
        ),
        Claim(
            "Without warmup training at η = c/λ_0 diverges",
            f"{PAPER}; bounds of an {REFERENCE}",
            "for c >= 16, every seed",
            f"{sum(bool(row['diverged']) for row in constant.values())} of {len(constant)} runs "
            f"(c = {', '.join(str(c) for c in sorted({key[2] for key in constant}))}; {len(seeds)} seeds)",
            all(row["diverged"] for row in constant.values()),
        ),
        Claim(
            "With warmup it trains at c = 128",
            f"{PAPER}; bounds of an {REFERENCE}",
            "T_wrm = 16, 64, 256, every seed",
            f"{len(highest) - len(lost)} of {len(highest)} runs train"
            + (f"; diverged: {', '.join(lost)}" if lost else ""),
            not lost,
            "16 steps to c = 128 are 8/λ_0 a step"
            + ("; with the same warmup the fate depends on the seed" if {True, False} in fates else ""),
        ),
        Claim(
            "After warmup training ends at the edge",
            f"{PAPER}; bounds of an {REFERENCE}",
            "η λ_max after the last step in [1.8, 2.3] for c = 32 to 128",
            f"{len(edge) - len(outside)} of {len(edge)} runs that train"
            + (f", {spread([row['edge'] for row in edge.values()])}" if edge else "")
            + (f"; outside: {', '.join(outside)}" if outside else ""),
            bool(edge) and not outside,
            f"the value at one step; after T_wrm = 256 {BOUNDARY_STEPS - 256} steps at η_trgt are left",
        ),
        Claim(
            "The larger rate that warmup makes possible trains better",
            f"{PAPER}; numbers of an {REFERENCE}",
            "final loss at c = 128 below a quarter of that at c = 8 (9e-4 vs 8 to 11e-3 there)",
            "; ".join(f"{a:.1e} vs {b:.1e}" for a, b in gains),
            bool(gains) and all(a < b / 4 for a, b in gains),
        ),
    ]
    warmups = [T for T in WARMUPS if (0, T, 8) in table]
    shares = [c for c in SHARES if (0, 1, c) in table]
    values = [[None if table[0, T, c]["diverged"] else table[0, T, c]["final"] for c in shares] for T in warmups]
    heat = Heat(
        [float(c) for c in shares], [float(T) for T in warmups], values, "final loss (blank: diverged)", log=True
    )
    return claims, Panel(
        "Warmup moves the boundary", "η_trgt λ_0", "T_wrm (steps)", [], x_log=True, y_log=True, heat=heat
    )


# --- Adam and GI-Adam -----------------------------------------------------------------------------------------------


def failure(lab: Laboratory) -> tuple[list[Claim], Panel]:
    """Adam and GI-Adam from small learning rates to those at which Adam fails."""
    seeds, rates = seeds_of(lab), (1.25e-4, 0.032, 0.128) if lab.quick else ADAM_RATES
    found = {
        (method, lr): [
            _summary(lab.part(f"{method}-{lr:g}-{s}", runs.adaptive, method=method, seed=s, lr=lr, steps=ADAM_STEPS))
            for s in seeds
        ]
        for method in ("Adam", "GI-Adam")
        for lr in rates
    }
    adam, gi = ([found[method, lr] for lr in (1.25e-4, 0.032, 0.128)] for method in ("Adam", "GI-Adam"))
    peaks = [(a["largest"] / a["initial"], b["largest"] / b["initial"]) for a, b in zip(adam[1], gi[1], strict=True)]
    ends = [(a["final"], b["final"]) for a, b in zip(adam[2], gi[2], strict=True)]
    slow = [(a["final"], b["final"]) for a, b in zip(adam[0], gi[0], strict=True)]
    claims = [
        Claim(
            "At η = 0.032 Adam's loss shoots up, GI-Adam's does not",
            f"{PAPER}, GI-Adam; bounds of an {REFERENCE}",
            "largest loss above 10 times the initial one for Adam (57 there), never above it for GI-Adam",
            f"{listed([run['largest'] for run in adam[1]])}; in units of the initial loss "
            + "; ".join(f"{a:.3g} vs {b:.4g}" for a, b in peaks)
            + f" ({len(seeds)} seeds)",
            all(a > 10 and b <= 1 for a, b in peaks),
        ),
        Claim(
            "At η = 0.128 Adam fails without diverging, GI-Adam trains",
            f"{PAPER}, failure boundary; bounds of an {REFERENCE}",
            "final loss of GI-Adam below a tenth of Adam's (0.0005 vs 0.050 there)",
            "; ".join(f"{b:.2g} vs {a:.2g}" for a, b in ends)
            + f"; Adam's largest loss {listed([run['largest'] for run in adam[2]])}, accuracies "
            f"{listed([run['accuracy'] for run in adam[2]])} (below 0.15 is failure) and "
            f"{listed([run['accuracy'] for run in gi[2]])}",
            all(b < 0.1 * a for a, b in ends),
        ),
        Claim(
            "At a small rate GI-Adam is slower: it is a warmup",
            f"{REFERENCE}",
            "final loss above Adam's at η = 1.25e-4 (0.0936 vs 0.0289 there)",
            "; ".join(f"{b:.4f} vs {a:.4f}" for a, b in slow),
            all(b > a for a, b in slow),
        ),
    ]
    lines = []
    for method in ("Adam", "GI-Adam"):
        logs = [np.log([run["final"] for run in found[method, lr]]) for lr in rates]
        means = [float(np.exp(np.mean(values))) for values in logs]
        errors = [mean * float(np.std(values)) for mean, values in zip(means, logs, strict=True)]
        lines.append(Line(method, list(rates), means, errors, marker=True))
    panel = Panel(
        "Adam and GI-Adam, 200 steps",
        "learning rate η",
        "final loss",
        lines,
        x_log=True,
        y_log=True,
        levels={"constant": BEST_CONSTANT},
    )
    return claims, panel


def _summary(run: Mapping[str, Any]) -> dict[str, float]:
    loss = run["loss"]
    return {"initial": loss[0], "largest": max(loss), "final": loss[-1], "accuracy": run["accuracy"]}


def edge(lab: Laboratory) -> tuple[list[Claim], Panel]:
    """Where the preconditioned sharpness starts and where it stays."""
    seeds, (steps, every) = seeds_of(lab), (400, 40) if lab.quick else (1000, 25)
    rates = {"Adam": 0.016} if lab.quick else EDGE_RATES
    ratios: dict[str, list[np.ndarray]] = {}
    for method, lr in rates.items():
        settings = {"method": method, "lr": lr, "steps": steps, "activation": "tanh", "measure_every": every}
        some = [lab.part(f"edge-{method}-{s}", runs.adaptive, seed=s, **settings) for s in seeds]
        ratios[method] = [np.array(run["sharpness"]) / run["threshold"] for run in some]
    last = {method: [float(ratio[-(len(ratio) // 3) :].mean()) for ratio in some] for method, some in ratios.items()}
    text = "; ".join(
        f"{method} at η = {rates[method]:g}: {listed(last[method])}, before the first step "
        f"{listed([float(r[0]) for r in some])}, largest later {listed([float(r[1:].max()) for r in some])}"
        for method, some in ratios.items()
    )
    claim = Claim(
        "The preconditioned sharpness rises to 38/η and stays there",
        f"{PAPER}, thresholds of Adam; Cohen et al. 2022, section 3; tolerance chosen here",
        f"mean of η λ/38 over the last third of {steps} steps in [{EDGE[0]:g}, {EDGE[1]:g}]",
        f"{text} ({len(seeds)} seeds, tanh net)",
        all(EDGE[0] <= value <= EDGE[1] for values in last.values() for value in values),
        "rates chosen after two trials of seed 0 so that the edge comes within the run; tanh, since the weights of "
        "dead ReLUs have P = eps",
    )
    x = list(range(0, steps + 1, every))
    lines = [Line(f"{method}, η = {rates[method]:g}", x, some[0].tolist()) for method, some in ratios.items()]
    panel = Panel(
        "Preconditioned sharpness at the edge", "step", "η λ(P⁻¹H) / 38", lines, y_log=True, levels={"edge": 1.0}
    )
    return [claim, _adam_start(lab)], panel


def _adam_start(lab: Laboratory) -> Claim:
    seeds, steps = seeds_of(lab), 12
    settings = {"method": "Adam", "lr": 1e-5, "steps": steps, "activation": "tanh", "measure_every": 1}
    labels: dict[str, list[str]] = {name: [] for name in NETS}
    values: dict[str, list[str]] = {name: [] for name in NETS}
    for name, zero in NETS.items():
        for s in seeds:
            run = lab.part(f"start-{s}-{zero}", runs.adaptive, seed=s, zero_output=zero, **settings)
            first = int(zero)
            found = warmup_mechanism(run["loss"][first : steps + 1], run["sharpness"][first:], run["threshold"])
            labels[name].append(str(found.label))
            values[name].append(" -> ".join(f"{run['sharpness'][i]:.3g}" for i in (0, 1, 2, steps)))
    shown = "; ".join(
        f"{name}: {', '.join(labels[name])}, at steps 0, 1, 2, {steps}: {', '.join(values[name])}" for name in NETS
    )
    return Claim(
        "Adam starts with a natural reduction of the preconditioned sharpness (C2), whatever the initial weights",
        PAPER,
        "its first change by 10 % is a fall, η = 1e-5, tanh, standard weights and zero output",
        shown,
        all(label == "C2" for found in labels.values() for label in found),
        "from zero output counted from step 1: before it the hidden layers have no gradient, P is nothing but eps "
        "there, and they are left out",
    )
