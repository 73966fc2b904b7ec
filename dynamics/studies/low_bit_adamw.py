"""Memory Efficient Optimizers with 4-bit States, put to the test on digits, real text and made-up moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ...kernels.codec import Rounding
from ..optimizer_measurements import nibbles
from ..optimizers.adamw4bit import AdamW4bit
from ..optimizers.moment_codecs import SignedFourBit
from ..workloads.digits import digits
from .character_training import single_thread, tuned
from .dynamic_exponents import TableCodec, dynamic_exponents
from .laboratory import Laboratory
from .low_bit_codec import PAPER, codec_claims
from .result import Claim, Line, Panel
from .study import Study

# Name of a variant to the options of AdamW4bit; "DE" and "DE-0" are maps of the second moment.
DIGITS_VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW, float32": {},
    "DE with zero": {"table": "DE"},
    "DE without zero": {"table": "DE-0"},
    "block, linear": {"v": "block"},
    "rank-1, linear": {"v": "rank1"},
    "rank-1, square": {"v": "rank1", "map": "square"},
    "factored": {"v": "factor"},
    "rank-1, linear, stochastic": {"v": "rank1", "rounding": "stochastic"},
}
DIGITS_SPLIT, DIGITS_BATCH, DIGITS_LR = 360, 128, 3e-3
CHARACTER_VARIANTS: dict[str, dict[str, Any]] = {
    "rank-1, linear": {"v": "rank1"},
    "rank-1, square": {"v": "rank1", "map": "square"},
    "factored": {"v": "factor"},
}
CHARACTER_LRS = (1e-3, 3e-3, 1e-2)
CHARACTER_MARGIN = 0.05


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, and curves of the digits, the frozen codes and the text."""
    training, digits_panel = _digits(lab)
    frozen, frozen_panel = _frozen(lab)
    text, text_panel = _characters(lab)
    return [*training, *codec_claims(lab), *frozen, *text], [digits_panel, frozen_panel, text_panel]


def digits_run(variant: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Trains 64-256-256-10 with ReLU; every tensor has compressed moments. Loss and accuracy are None after a NaN."""
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        (x, y), (held_x, held_y) = _digits_split(seed)
        optimizer = digits_optimizer(model, variant)
        curve = []
        for step in range(1, steps + 1):
            rows = torch.randint(0, len(x), (DIGITS_BATCH,))
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if not math.isfinite(float(loss.detach())):
                return {"loss": None, "accuracy": None, "failed_at": step, "curve": curve}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % max(1, steps // 40) == 0:
                curve.append([step, float(loss.detach())])
        with torch.no_grad():
            final = float(F.cross_entropy(model(x), y))
            accuracy = float((model(held_x).argmax(1) == held_y).double().mean())
    if not math.isfinite(final):
        return {"loss": None, "accuracy": None, "failed_at": steps, "curve": curve}
    return {"loss": final, "accuracy": accuracy, "failed_at": None, "curve": curve}


def digits_optimizer(model: nn.Module, variant: Mapping[str, Any]) -> Optimizer:
    if not variant:
        return torch.optim.AdamW(model.parameters(), lr=DIGITS_LR)
    options = dict(variant)
    if "table" in options:
        options["codec"] = (SignedFourBit(), TableCodec(second_moment_map(options.pop("table"))))
    return AdamW4bit(model.parameters(), lr=DIGITS_LR, min_size=0, **options)


def second_moment_map(name: str) -> tuple[float, ...]:
    """Unsigned dynamic exponents, "DE"; "DE-0": the zero replaced by the smallest of the others."""
    values = dynamic_exponents(4, signed=False)
    return tuple(values if name == "DE" else [values[1], *values[1:]])


def _digits_split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    data = digits()
    x = torch.cat([data.train.inputs, data.held_out.inputs])
    y = torch.cat([data.train.targets, data.held_out.targets])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:DIGITS_SPLIT], order[DIGITS_SPLIT:]
    return (x[rest], y[rest]), (x[held], y[held])


def _digits(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds, steps = (range(2), 200) if lab.quick else (range(5), 600)
    runs = {
        name: [lab.part(f"digits-{name}-{seed}", digits_run, variant=v, seed=seed, steps=steps) for seed in seeds]
        for name, v in DIGITS_VARIANTS.items()
    }
    zero, plain = runs["DE with zero"], runs["AdamW, float32"]
    failed = [run["failed_at"] for run in zero]
    claims = [
        Claim(
            "a zero among the codes of the second moment destroys training",
            f"{PAPER}, section 4, zero-point problem",
            "no finite loss in any seed, or a train loss above ln 10, that of guessing",
            f"loss not finite at steps {failed}; losses {[_short(run['loss']) for run in zero]}",
            all(run["loss"] is None or run["loss"] > math.log(10) for run in zero),
        )
    ]
    others = {name: found for name, found in runs.items() if name not in ("AdamW, float32", "DE with zero")}
    for name, found in others.items():
        losses = [run["loss"] for run in found]
        finite = [x for x in losses if x is not None]
        claims.append(
            Claim(
                f"second moment {name}: training ends as low as it should",
                f"{PAPER}, section 4, zero-point problem; bound: ours",
                "finite, train loss <= 0.006 in every seed",
                f"{max(finite):.2g} at most of {len(finite)} finite losses; AdamW {max(r['loss'] for r in plain):.2g}",
                len(finite) == len(losses) and max(finite) <= 0.006,
                _steps_note(lab),
            )
        )
        if len(finite) < len(losses):
            continue
        gaps = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(found, plain, strict=True)]
        mean, error = _mean_and_error(gaps)
        accuracy = 100 * sum(run["accuracy"] for run in found) / len(found)
        claims.append(
            Claim(
                f"second moment {name}: accuracy as in float32",
                f"{PAPER}, section 5",
                "within 1 point of AdamW, mean over seeds",
                f"{accuracy:.2f} %, {mean:+.2f} ± {error:.2f} points ({len(gaps)} seeds)",
                abs(mean) <= 1,
            )
        )
    lines = []
    for name, found in runs.items():
        curve = found[0]["curve"]
        lines.append(Line(name, [step for step, _ in curve], [loss for _, loss in curve]))
    return claims, Panel("Digits, seed 0", "step", "batch loss", lines, y_log=True, levels={"guessing": math.log(10)})


def frozen_codes(beta2: float, rounding: Rounding, steps: int) -> dict[str, Any]:
    """Gradients N(0, s²) with log-normal s, which change places half way: how v and its codes follow."""
    gen = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = AdamW4bit([p], lr=0.0, betas=(0.9, beta2), v="block", min_size=0, rounding=rounding)
    variance = torch.randn(p.shape, generator=gen).exp()
    curve, changed, before = [], 0.0, None
    for step in range(1, 2 * steps + 1):
        if step == steps + 1:
            variance = variance.reshape(-1)[torch.randperm(p.numel(), generator=gen)].view(p.shape)
        p.grad = torch.randn(p.shape, generator=gen) * variance.sqrt()
        optimizer.step()
        codes = nibbles(optimizer.state[p]["v_codes"], p.numel())
        if before is not None and steps // 2 < step <= steps:
            changed += float((codes != before).double().mean()) / (steps - steps // 2)
        before = codes.clone()
        if step % (steps // 20) == 0:
            curve.append([step, _log_correlation(optimizer.moments(p)[1], variance)])
    return {"changed": changed, "settled": curve[len(curve) // 2 - 1][1], "end": curve[-1][1], "curve": curve}


def _log_correlation(v: Tensor, variance: Tensor) -> float:
    both = torch.stack((v.reshape(-1).log(), variance.reshape(-1).log())).double()
    return float(torch.corrcoef(both)[0, 1])


def _frozen(lab: Laboratory) -> tuple[list[Claim], Panel]:
    steps = 400 if lab.quick else 2000
    rates = {
        beta2: lab.part(f"frozen-{beta2}", frozen_codes, beta2=beta2, rounding="nearest", steps=steps)
        for beta2 in (0.95, 0.99, 0.999)
    }
    nearest = rates[0.999]
    stochastic = lab.part("frozen-stochastic", frozen_codes, beta2=0.999, rounding="stochastic", steps=steps)
    claims = [
        Claim(
            "with β₂ near 1 nearest rounding freezes the codes of the second moment",
            "derived here: an increment below half a code, g² < 31 max v at β₂ = 0.999, is lost",
            "share of codes that a step changes falls with β₂ and is <= 1e-4 at 0.999",
            ", ".join(f"{run['changed']:.1e} at {beta2}" for beta2, run in rates.items()),
            rates[0.95]["changed"] > rates[0.99]["changed"] > nearest["changed"] and nearest["changed"] <= 1e-4,
        ),
        Claim(
            "after the gradients' variances changed places nearest rounding follows less than stochastic rounding",
            "derived here",
            "correlation of log v with log variance: nearest ends below where it was, stochastic ends above nearest",
            f"nearest {nearest['settled']:.2f} to {nearest['end']:.2f}, "
            f"stochastic {stochastic['settled']:.2f} to {stochastic['end']:.2f}",
            nearest["end"] < nearest["settled"] and stochastic["end"] > nearest["end"],
        ),
    ]
    lines = [
        Line(name, [step for step, _ in run["curve"]], [value for _, value in run["curve"]])
        for name, run in (("nearest", nearest), ("stochastic", stochastic))
    ]
    return claims, Panel(
        "Codes of v at β₂ = 0.999, variances permuted half way", "step", "correlation of logarithms", lines
    )


def _characters(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds, steps, lrs = ([0], 60, [3e-3]) if lab.quick else ([0, 1, 2], 400, list(CHARACTER_LRS))
    budget = {"lrs": lrs, "seeds": seeds, "steps": steps}
    plain = lab.part("text-AdamW", tuned, optimizer="AdamW", options={}, **budget)
    claims, runs = [], {"AdamW, float32": plain}
    for name, options in CHARACTER_VARIANTS.items():
        options = {**options, "min_size": 0}
        run = lab.part(f"text-{name}", tuned, optimizer="AdamW4bit", options=options, **budget)
        runs[name] = run
        mean, error = _mean_and_error([a - b for a, b in zip(run["losses"], plain["losses"], strict=True)])
        claims.append(
            Claim(
                f"character transformer on real text, second moment {name}: held-out loss as in float32",
                f"{PAPER}, section 5, on larger language models; margin: ours",
                f"at most {CHARACTER_MARGIN} nats above AdamW, both with the best of {len(lrs)} learning rates",
                f"{_mean_and_error(run['losses'])[0]:.3f}, {mean:+.3f} ± {error:.3f} nats at lr {run['lr']:g} "
                f"(AdamW {plain['lr']:g}; {len(seeds)} seeds)",
                mean <= CHARACTER_MARGIN,
                _steps_note(lab),
            )
        )
    lines = [
        Line(name, [step for step, _ in run["curve"]], [loss for _, loss in run["curve"]]) for name, run in runs.items()
    ]
    return claims, Panel("Character transformer, seed 0", "step", "batch loss, nats", lines)


def _steps_note(lab: Laboratory) -> str:
    return "the short version of the study trains for a third of the steps or less" if lab.quick else ""


def _short(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3g}"


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the error of one value is unknown."""
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return float(x.mean()), error


STUDY = Study(
    name="low-bit-adamw",
    title="AdamW with moments in four bits",
    paper="Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, NeurIPS 2023",
    setting=(
        "Digits: 64-256-256-10 with ReLU, batches of 128, learning rate 3e-3, 600 steps, five random splits; text: 2 "
        "layers of width 48, 400 steps, three seeds; moments of every tensor in four bits"
    ),
    investigate=investigate,
)
