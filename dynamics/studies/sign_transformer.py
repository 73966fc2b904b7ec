"""Sign descent on the two-layer transformer: four stages, fast convergence, poor generalisation."""

from __future__ import annotations

from typing import Any

from .attention_stages import detect_stages
from .laboratory import Laboratory
from .order_curves import Run, at, between
from .result import Claim, Line, Panel
from .sign_comparison_claims import adam_claims, descent_claims, digits_claims, generalisation_claims
from .sign_stage_claims import Runs, first_stages_claims, later_stages_claims, rounding_claims, scaling_claims
from .sign_transformer_experiments import stages_run
from .study import Study

LR, GD_LR = 1e-4, 0.1


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims; panels of attention, projections, votes and losses of the first seed."""
    seeds = [0] if lab.quick else [0, 1, 2]
    adam_steps = 200 if lab.quick else 1500

    sign_steps = 200 if lab.quick else 900

    def runs(name: str, steps: int, dtype: str = "float32", **settings: Any) -> Runs:
        return [
            lab.part(f"{name}-{seed}", stages_run, steps=steps, seed=seed, dtype=dtype, **settings) for seed in seeds
        ]

    sign = runs("sign", sign_steps, optimizer="SignGD", lr=LR)
    double = runs("sign-float64", sign_steps, "float64", optimizer="SignGD", lr=LR)
    half = runs("sign-half", 400, optimizer="SignGD", lr=LR / 2)
    adam = runs("adam", adam_steps, optimizer="Adam", lr=LR)
    descent = runs("gd", 100, optimizer="GD", lr=GD_LR)
    claims = [
        *first_stages_claims(sign, half),
        *later_stages_claims(sign, double),
        *generalisation_claims(sign),
        *scaling_claims(sign, half),
        *adam_claims(adam, whole=not lab.quick),
        *descent_claims(descent, sign),
        *rounding_claims(sign, double),
        *digits_claims(lab),
    ]
    return claims, _panels(sign[0], double[0], adam[0], descent[0])


def _panels(sign: Run, double: Run, adam: Run, descent: Run) -> list[Panel]:
    starts = [start for start in detect_stages(sign).values() if start is not None]
    # Step 0 has no place on a logarithmic axis.
    steps = sign["step"][1:]
    attention = [
        Line("s_11: signal on signal", steps, sign["s11"][1:]),
        Line("s_21: noise on signal", steps, sign["s21"][1:]),
        Line("Adam s_11", adam["step"][1:], adam["s11"][1:]),
        Line("Adam s_21", adam["step"][1:], adam["s21"][1:]),
        Line("stages II, III, IV begin", starts[1:], [at(sign, "s11", t) for t in starts[1:]], points=True),
    ]
    names = {"value_noise": "value", "query_noise": "|query|", "key_noise": "|key|"}
    noise = [Line(label, *between(sign, name, 0, 200)) for name, label in names.items()]
    noise.append(Line("|query|, float64", *between(double, "query_noise", 0, 200)))
    shares = {"aligned": "query and key noise agree", "query_vote": "query follows", "key_vote": "key follows"}
    votes = [Line(label, steps, sign[name][1:]) for name, label in shares.items()]
    losses = []
    for label, run in (("SignGD", sign), ("Adam", adam), ("GD", descent)):
        losses.append(Line(f"{label} train", *between(run, "loss", 0, 400)))
        shown = [i for i, t in enumerate(run["test_step"]) if t <= 400]
        losses.append(Line(f"{label} test", [run["test_step"][i] for i in shown], [run["test_loss"][i] for i in shown]))
    return [
        Panel("Attention on the signal (SignGD, Adam)", "step", "attention weight", attention, x_log=True),
        Panel("Projections on the noise (SignGD)", "step", "⟨w, y ξ⟩", noise),
        Panel("Signs, and the vote of the noise (SignGD)", "step", "share", votes, x_log=True),
        Panel("Loss", "step", "logistic loss (nats)", losses, y_log=True),
    ]


STUDY = Study(
    name="sign-transformer",
    title="Sign descent on a two-layer transformer with noisy data",
    paper="Li, Huang, Han, Zhou, Suzuki, Zhu, Chen, On the Optimization and Generalization of Two-layer Transformers "
    "with Sign Gradient Descent, 2025",
    setting="Two tokens of size 2000, signal e_0 and noise of 200 random coordinates with σ = 2; 20 examples to train "
    "on, full batch, 400 fresh ones to test; queries and keys of 100 rows, values of 20; first weights of σ = "
    "0.1/√2000; float32, SignGD in float64 too; seeds 0, 1, 2. SignGD η = 1e-4, 900 steps; Adam 1e-4, 1500 steps; GD "
    "0.1, 100 steps. Figure: seed 0.",
    investigate=investigate,
)
