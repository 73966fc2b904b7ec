"""SAM late in training: the escape from a minimum of SGD, two phases, and how fast sharpness falls."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np

from .laboratory import Laboratory
from .late_training import adversarial_run, late_run, switch_run
from .result import Claim, Line, Panel
from .sam_escape import escape_run, full_batch_run
from .sam_late_claims import (
    adversarial_claim,
    connection_claim,
    error_claim,
    gap_closed,
    phases_claim,
    reverse_claim,
    sharpness_claims,
    valley_claim,
)
from .sam_linear import closed_forms, operator_check
from .sam_stability_claims import Found, Parts, arrival_claims, closed_form_claims, escape_claims, operator_claims
from .study import Study

# Of the network that escapes: η is this many times the largest stable one of SAM.
ESCAPE = {"lr": 0.3, "ratio": 1.2}
LOSSES = ("cross-entropy", "squares")


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims; panels of the escape, the switch, the sharpness by late epochs, and the adversarial counterpart."""
    quick, whole = lab.quick, not lab.quick
    seeds = [0] if quick else [0, 1, 2]
    losses = LOSSES[:1] if quick else LOSSES
    epochs, late, reverse = (30, [0, 5, 30], 5) if quick else (200, [0, 10, 20, 40, 100, 200], 40)
    sizes = {"copies": 500, "steps": 3, "long_copies": 4, "long_steps": 600}
    if whole:
        sizes = {"copies": 4000, "steps": 5, "long_copies": 16, "long_steps": 2000}

    def parts(name: str, compute: Any, **settings: Any) -> Parts:
        return [lab.part(f"{name}-{seed}", compute, seed=seed, **settings) for seed in seeds]

    checks = [lab.part(f"operator-{seed}", operator_check, seed=seed) for seed in range(3)]
    forms = lab.part("closed-forms", closed_forms)
    full = parts("full-batch", full_batch_run, **{**ESCAPE, "ratio": 1.1}, steps=20)
    escapes = parts("escape", escape_run, **ESCAPE, **sizes)
    trained = {
        loss: parts(f"late-{loss}", late_run, loss=loss, epochs=epochs, late=late, reverse=reverse) for loss in losses
    }
    half = epochs // 2
    switches = {
        loss: parts(f"switch-{loss}", switch_run, loss=loss, epochs=half, before=half // 5, after=half)
        for loss in losses
    }
    attacked = parts(
        "adversarial",
        adversarial_run,
        epochs=10 if quick else 100,
        late=[0, 2, 10] if quick else [0, 5, 10, 20, 50, 100],
    )
    claims = [
        *operator_claims(checks),
        *closed_form_claims(forms),
        *escape_claims(escapes, full),
        *arrival_claims(escapes, whole=whole),
        *(claim for loss in losses for claim in sharpness_claims(loss, trained[loss], whole=whole)),
        *(valley_claim(loss, trained[loss], whole=whole) for loss in losses),
        *(connection_claim(loss, trained[loss], whole=whole) for loss in losses),
        *(phases_claim(loss, switches[loss], whole=whole) for loss in losses),
        reverse_claim(trained["cross-entropy"], reverse, whole=whole),
        error_claim(trained["cross-entropy"]),
        adversarial_claim(attacked, whole=whole),
    ]
    return claims, _panels(escapes[0], switches["cross-entropy"][0], trained, attacked)


def _panels(escape: Found, switch: Found, trained: dict[str, Parts], attacked: Parts) -> list[Panel]:
    steps, runs = escape["long_step"], np.asarray(escape["long_loss"])
    typical = np.exp(np.log(runs).mean(1))
    linear = [t for t, value in zip(steps, typical, strict=True) if value < 1e-4][
        : int(np.argmax(typical > 1e-4)) or None
    ]
    rate = 2 * fmean(escape["lyapunov"])
    gaps = []
    for loss, found in trained.items():
        late = sorted(int(num) for num in found[0] if num != "reverse")
        each = [gap_closed(found, num)[1] for num in late]
        mean, spread = [100 * fmean(shares) for shares in each], [100 * float(np.std(shares)) for shares in each]
        gaps.append(Line(loss, [18 * num for num in late], mean, spread, marker=True))
    names = sorted(attacked[0], key=int)
    errors = [
        Line(
            label,
            [int(name) for name in names],
            [fmean(run[name][key] for run in attacked) for name in names],
            [float(np.std([run[name][key] for run in attacked])) for name in names],
            marker=True,
        )
        for key, label in (("robust", "under attack"), ("error", "plain"))
    ]
    return [
        Panel(
            "Escape from a minimum of SGD (seed 0)",
            "steps of SAM",
            "loss",
            [
                Line(f"SAM, geometric mean of {runs.shape[1]} runs", steps, typical.tolist()),
                Line("linear prediction", linear, [typical[0] * float(np.exp(rate * t)) for t in linear]),
            ],
            y_log=True,
        ),
        Panel(
            "Switch to SAM (cross-entropy, seed 0)",
            "steps after the switch",
            "train loss (nats)",
            [
                Line("SGD, then SAM", switch["step"], switch["loss"]),
                Line("SGD goes on", switch["sgd_step"], switch["sgd_loss"]),
            ],
        ),
        Panel(
            "Sharpness around the switch (seed 0)",
            "steps after the switch",
            "largest eigenvalue of H",
            [Line("SGD, then SAM", switch["sharp_step"], switch["sharpness"])],
        ),
        Panel("Gap from SGD to SAM closed", "steps of SAM at the end", "share of the gap in sharpness (%)", gaps),
        Panel("Adversarial training late", "epochs of it at the end", "error on held-out digits (%)", errors),
    ]


STUDY = Study(
    name="sam-late",
    title="SAM selects flatter minima late in training",
    paper="Zhou, Wang, Mao, Li, Yan, Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training, "
    "2025",
    setting="Digits: 600 to train on, each pixel standardised; 64-64-64-10 with ReLU, batch 32, SGD at 0.1 without "
    "momentum, normalised SAM with ρ = 0.2, 200 epochs of 18 steps; cross-entropy with label smoothing 0.1 or squares; "
    "the switch is shown after 100 epochs. Escape: 64-16-1 with tanh on ten digits of two classes, unnormalised SAM "
    "with one example a step at η = 0.3, ρ such that η is 1.2 times the stable one. Adversarial: pixels in [0, 1], 100 "
    "epochs, PGD of 10 steps within 0.1. Seeds 0, 1, 2; bars: standard deviation over them.",
    investigate=investigate,
)
