"""What the study of block heterogeneity claims about networks: their blocks, and what SGD loses to Adam on them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .claim_numbers import listed
from .result import Claim

PAPER = "Zhang et al., Why Transformers Need Adam: A Hessian Perspective, 2024"
OWN = "derived here"
REFERENCE = "own reference run"
TRANSFORMER, MLP, CNN, SCALED = "transformer, 0.02", "MLP", "CNN", "MLP, scaled"

# By model, for each seed the block records by step.
Records = Mapping[str, Sequence[Mapping[str, Any]]]
# By model, the results of `tuned` for "SGD" and "Adam".
Gaps = Mapping[str, Mapping[str, Any]]

BOUNDS = {TRANSFORMER: (">= 1e3", 1e3, math.inf), CNN: ("<= 30", 0.0, 30.0), MLP: ("<= 30", 0.0, 30.0)}
REFERENCES = {TRANSFORMER: "3.3e5", CNN: "2.3 to 9", MLP: "6 and 7.6", "transformer, fan-in": "4.3"}
NOTES = {
    "transformer, fan-in": "embeddings and positions too start with variance 1 / width; chosen after a first run with "
    "variance 1 there had given 27 on seed 0, where LayerNorm divides the embedding's block by 16",
    SCALED: "the same function as the MLP, each layer's weights divided by, and its output multiplied with, 10, 1 and "
    "0.1: blocks 100, 1 and 0.01 times the MLP's",
    CNN: "BatchNorm with the statistics of the batch",
}


def ratio_claims(records: Records) -> list[Claim]:
    """How far apart the largest eigenvalues of the blocks are at the start."""
    claims = []
    for name, found in records.items():
        ratios = [one["0"]["ratio"] for one in found]
        expected, low, high = BOUNDS.get(name, ("-", 0.0, math.inf))
        source = f"{PAPER}, block-wise spectra" + (f"; {REFERENCE}: {REFERENCES[name]}" if name in REFERENCES else "")
        claims.append(
            Claim(
                f"Largest max |λ| of a block over the smallest at the start: {name}",
                source,
                expected,
                f"{listed(ratios)} by seed; first seed {_ends(found[0]['0'])}",
                all(low <= ratio <= high for ratio in ratios) if name in BOUNDS else None,
                NOTES.get(name, ""),
            )
        )
    return claims


def divergence_claims(records: Records) -> list[Claim]:
    """How far apart the spectra of the blocks are at the start."""
    start = {name: [one["0"] for one in found] for name, found in records.items()}
    log, linear = ({name: [one[key] for one in found] for name, found in start.items()} for key in ("mean", "linear"))
    worst = max(one["max"] for found in start.values() for one in found)
    seeds = zip(log[MLP], log[CNN], log[TRANSFORMER], strict=True)
    return [
        Claim(
            "Mean Jensen-Shannon divergence of blocks at the start, log axis: MLP and CNN below the transformer",
            f"{PAPER}, block-wise spectra; {REFERENCE}: MLP 0.105, CNN 0.247, transformer 0.365 nats",
            "for every seed",
            "; ".join(f"{name} {listed(values)}" for name, values in log.items()) + " nats",
            all(max(mlp, cnn) < transformer for mlp, cnn, transformer in seeds),
            "log10 |λ|, σ = 0.1 decades, independent of the grid, exact spectra",
        ),
        Claim("No pair of blocks exceeds ln 2", OWN, "<= 0.693 nats", f"{worst:.3f} nats", worst <= math.log(2)),
        Claim(
            "The same on the linear axis, which cannot tell small blocks apart",
            f"{OWN}; {REFERENCE}: MLP 0.007, CNN 0.335, transformer 0.050 nats",
            "-",
            "; ".join(f"{name} {listed(values)}" for name, values in linear.items()) + " nats",
            None,
            "σ = 1 % of the range over all blocks of a model, with the bin width",
        ),
    ]


def training_claims(records: Records) -> list[Claim]:
    """What Adam makes of the blocks."""
    claims = []
    for name, found in records.items():
        last = max(map(int, found[0]))
        if not last:
            continue
        ends = [[one[str(step)] for one in found] for step in (0, last)]
        ratios, means = (" -> ".join(listed([one[key] for one in end]) for end in ends) for key in ("ratio", "mean"))
        path = ", ".join(f"{found[0][step]['ratio']:.3g} at {step}" for step in sorted(found[0], key=int))
        claims.append(
            Claim(
                f"Ratio of blocks' largest eigenvalues, trained with Adam: {name}",
                OWN,
                "-",
                f"{ratios} by seed after {last} steps (first seed {path}); log-axis divergence {means} nats",
                None,
            )
        )
    return claims


def gap_claims(gaps: Gaps, *, steps: int, quick: bool, origins: Mapping[str, str]) -> list[Claim]:
    """What SGD loses to Adam; `origins` are the models' data."""
    claims = []
    for name, found in gaps.items():
        values = by_seed(found)
        gap = statistics.fmean(values)
        held_out, accuracy = (_mean(found["SGD"][key]) - _mean(found["Adam"][key]) for key in ("held_out", "accuracy"))
        expected, holds = "-", None
        if name == TRANSFORMER:
            expected, holds = ">= 0.2 nats", math.isfinite(gap) and gap >= 0.2
        elif name in (MLP, CNN):
            expected = "<= 0.02 nats, or <= 1 point of held-out accuracy"
            holds = math.isfinite(gap) and (gap <= 0.02 or -100 * accuracy <= 1)
        source = f"{PAPER}, SGD against Adam; tolerance: {REFERENCE}"
        claims.append(
            Claim(
                f"Train loss of tuned SGD less that of tuned Adam: {name}",
                source + (", 2.43 against 2.12" if name == TRANSFORMER else ""),
                expected,
                f"{_with_error(values)} nats ({_seeds(values)}): "
                f"{', '.join(_rule(rule, found[rule]) for rule in found)}; "
                f"held-out {held_out:+.3f} nats, accuracy of SGD {100 * accuracy:+.1f} points",
                None if quick else holds,
                f"mean batch loss of the last tenth of {steps} steps; learning rates chosen on the first seed; "
                f"{origins[name]}",
            )
        )
    if SCALED in gaps:
        plain, scaled = (by_seed(gaps[name]) for name in (MLP, SCALED))
        claims.append(
            Claim(
                "An MLP made heterogeneous by scaling its layers loses more with SGD than the MLP itself",
                f"{PAPER}, hand-scaled MLP",
                "gap of the scaled MLP above that of the MLP",
                f"{_with_error(scaled)} against {_with_error(plain)} nats, standard errors over seeds",
                math.isfinite(_mean(scaled)) and _mean(scaled) > _mean(plain),
                "learning rates chosen on the first seed",
            )
        )
    return claims


def correlation_claims(records: Records, gaps: Gaps) -> list[Claim]:
    """Whether heterogeneity at the start orders the models by their gap."""
    names = list(gaps)
    num_seeds = len(records[names[0]])
    values = {name: by_seed(gaps[name]) for name in names}
    gap = {name: _mean(values[name]) for name in names}

    def against(key: str) -> float:
        return rank_correlation([_mean([one["0"][key] for one in records[name]]) for name in names], list(gap.values()))

    ratio = against("ratio")
    alone = [
        rank_correlation([records[name][i]["0"]["ratio"] for name in names], [values[name][i] for name in names])
        for i in range(num_seeds)
    ]
    others = {"log-axis divergence": "mean", "linear-axis divergence": "linear", "spread of log10 max |λ|": "spread"}
    predicted = sorted(names, key=lambda name: _mean([one["0"]["ratio"] for one in records[name]]))
    actual = sorted(names, key=lambda name: gap[name])
    return [
        Claim(
            "The ratio of blocks' largest eigenvalues at the start orders the models by what SGD loses to Adam",
            f"{PAPER}, order by JS0; threshold: {REFERENCE}",
            f"rank correlation >= 0.7 over {len(names)} models",
            f"{ratio:+.2f} (by seed {', '.join(f'{value:+.2f}' for value in alone)}). By ratio "
            f"{' < '.join(predicted)}; by gap {' < '.join(actual)}",
            ratio >= 0.7,
            "gaps with their standard errors over seeds, nats: "
            + ", ".join(f"{name} {_with_error(values[name])}" for name in actual),
        ),
        Claim(
            "The same with other measures of heterogeneity",
            OWN,
            "-",
            ", ".join(f"{label} {against(key):+.2f}" for label, key in others.items()),
            None,
        ),
    ]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: ties share the mean of their ranks."""
    from scipy.stats import spearmanr

    found: Any = spearmanr(x, y)
    return float(found.statistic)


def by_seed(found: Mapping[str, Any]) -> list[float]:
    """Train loss of SGD less that of Adam."""
    return [sgd - adam for sgd, adam in zip(found["SGD"]["train"], found["Adam"]["train"], strict=True)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _with_error(values: Sequence[float]) -> str:
    """Mean and, of several, its standard error."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{_mean(values):+.4f}{error}"


def _seeds(values: Sequence[float]) -> str:
    return f"{len(values)} seeds" if len(values) > 1 else "one seed"


def _rule(name: str, found: Mapping[str, Any]) -> str:
    place = "" if found["inside"] else ", the best at an end"
    return f"{name} {_mean(found['train']):.3g} (lr {found['lr']:g}, best of {len(found['tried'])}{place})"


def _ends(record: Mapping[str, Any]) -> str:
    scales = dict(zip(record["blocks"], record["scale"], strict=True))
    small, large = min(scales, key=lambda block: scales[block]), max(scales, key=lambda block: scales[block])
    return f"{scales[small]:.2g} ({small}) to {scales[large]:.2g} ({large})"
