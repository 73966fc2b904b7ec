"""What is claimed of SAM and adversarial training late in training, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import numpy as np

from .claim_numbers import listed, with_spread
from .late_training import LR, STEPS_PER_EPOCH
from .result import Claim
from .sam_stability_claims import PAPER, Parts

REFERENCE = "own reference run"
# Share of the gap in robust error, chosen before the runs: no limit is given.
ROBUST_SHARE = 0.8
# Sharpness after 0, 10, 20, 40, 100 and 200 epochs of SAM there.
REFERENCE_SHARPNESS = {
    "cross-entropy": (1.265, 1.038, 0.981, 0.913, 0.815, 0.753),
    "squares": (5.30, 4.55, 4.22, 3.83, 3.23, 2.64),
}
# Highest loss on a segment without a barrier, over that of its higher end.
NO_BARRIER = 1.02


def sharpness_claims(loss: str, runs: Parts, *, whole: bool) -> list[Claim]:
    """On `late_run`, one for each seed; without verdicts unless `whole`, like all below."""
    late = sorted(int(num) for num in runs[0] if num != "reverse")
    values = {num: [run[str(num)]["sharpness"] for run in runs] for num in late}
    plain = {num: fmean(run[str(num)]["plain"] for run in runs) for num in late}
    falls = all(np.all(np.diff([run[str(num)]["sharpness"] for num in late]) < 0) for run in runs)
    measured = "; ".join(f"{num}: {with_spread(found)}" for num, found in values.items())
    if loss == "cross-entropy":
        measured += f"; without smoothing {listed(list(plain.values()))}"
    reference = REFERENCE_SHARPNESS[loss]
    claims = [
        Claim(
            f"{loss}: sharpness falls with the number of SAM epochs at the end",
            f"{PAPER}; {REFERENCE}: {listed(reference, '.4g')} for 0, 10, 20, 40, 100, 200",
            "strictly, in every seed",
            measured,
            falls if whole else None,
            "of the loss that is minimised; the reference does not say how it scales pixels and squares: here each "
            "pixel is standardised and squares are a mean over outputs; these, ReLU and the first weights were chosen "
            "after trials of the sharpness of SGD alone, which ends at "
            f"{fmean(values[0]) / reference[0]:.2f} times the figure of the reference",
        )
    ]
    if loss == "cross-entropy":
        claims += [_gap_claim(runs, num, least, whole) for num, least in ((10, 0.35), (100, 0.8)) if num in late]
    return claims


def gap_closed(runs: Parts, num: int) -> tuple[float, list[float]]:
    """Share of the way in sharpness from SGD to SAM throughout: of the means over seeds, and by seed."""
    last = _longest(runs)

    def share(values: Mapping[str, float]) -> float:
        return (values["0"] - values[str(num)]) / (values["0"] - values[last])

    names = ("0", str(num), last)
    means = {name: fmean(run[name]["sharpness"] for run in runs) for name in names}
    return share(means), [share({name: run[name]["sharpness"] for name in names}) for run in runs]


def _gap_claim(runs: Parts, num: int, least: float, whole: bool) -> Claim:
    mean, each = gap_closed(runs, num)
    return Claim(
        f"cross-entropy: SAM in the last {num} epochs ({STEPS_PER_EPOCH * num} steps) closes much of the gap from SGD "
        "to SAM",
        f"{PAPER}, abstract; limit from our {REFERENCE}",
        f">= {100 * least:.0f} % of the gap in mean sharpness",
        f"{100 * mean:.0f} %; by seed {listed([100 * share for share in each], '.0f')} %",
        mean >= least if whole else None,
    )


def valley_claim(loss: str, runs: Parts, *, whole: bool) -> Claim:
    """On the segments of `late_run` from the switch to the end."""
    ratios = {
        num: max(run[num]["segment"] / max(run[num]["loss"], run[num]["switch_loss"]) for run in runs)
        for num in _late_only(runs)
    }
    return Claim(
        f"{loss}: same valley, no barrier between the switch and the end",
        f"{PAPER}; limit from our {REFERENCE}",
        f"highest loss on the segment <= {NO_BARRIER:g} times the higher end",
        _by_epochs(ratios),
        max(ratios.values()) <= NO_BARRIER if whole else None,
    )


def connection_claim(loss: str, runs: Parts, *, whole: bool) -> Claim:
    """On the segments of `late_run` from the end of SGD to that of late SAM."""

    def ratio(num: str) -> float:
        return max(run[num]["across"] / max(run[num]["loss"], run["0"]["loss"]) for run in runs)

    ratios = {num: ratio(num) for num in _late_only(runs)}
    return Claim(
        f"{loss}: the ends of SGD and of late SAM are linearly connected without a barrier",
        f"{PAPER}; no limit is given",
        f"highest loss on the segment <= {NO_BARRIER:g} times the higher end",
        f"{_by_epochs(ratios)}; SAM throughout: {ratio(_longest(runs)):.4f}",
        max(ratios.values()) <= NO_BARRIER if whole else None,
        "this limit is that of the segment from the switch; SAM throughout is reported only",
    )


def _longest(runs: Parts) -> str:
    """SAM throughout."""
    return max((num for num in runs[0] if num != "reverse"), key=int)


def _late_only(runs: Parts) -> list[str]:
    """Numbers of SAM epochs, without SGD alone and SAM throughout."""
    return [num for num in runs[0] if num not in ("0", "reverse", _longest(runs))]


def _by_epochs(ratios: Mapping[str, float]) -> str:
    return "; ".join(f"{num} epochs: {ratio:.4f}" for num, ratio in ratios.items())


def phases_claim(loss: str, runs: Parts, *, whole: bool) -> Claim:
    """On `switch_run`, one for each seed."""
    starts = [run["loss"][run["step"].index(0)] for run in runs]
    rises = [max(value for t, value in zip(run["step"], run["loss"], strict=True) if 0 < t <= 60) for run in runs]
    ends = [run["loss"][-1] for run in runs]
    sgd = [max(value for t, value in zip(run["sgd_step"], run["sgd_loss"], strict=True) if 0 < t <= 60) for run in runs]
    sgd_ends = [run["sgd_loss"][-1] for run in runs]
    good = all(
        rise > max(start, plain) and start > end
        for start, rise, plain, end in zip(starts, rises, sgd, ends, strict=True)
    )
    rising = sum(plain > start for start, plain in zip(starts, sgd, strict=True))
    return Claim(
        f"{loss}: two phases, the train loss rises at the switch, then falls below its old value",
        f"{PAPER}; {REFERENCE}: .00157 to .00167",
        "within 60 steps of SAM above its value at the switch, and above the highest of as many steps of SGD going on; "
        "below its value at the switch at the end",
        f"at the switch {listed(starts, '.5f')}; highest within 60 steps {listed(rises, '.5f')}, of SGD going on "
        f"{listed(sgd, '.5f')}; end {listed(ends, '.5f')}, of SGD {listed(sgd_ends, '.5f')}",
        good if whole else None,
        f"SGD going on rises above the value at the switch too in {rising} of {len(runs)} seeds; that SAM has to rise "
        "above it was asked for after the first runs; the switch is at half of the epochs; the loss of the reference "
        "has another scale",
    )


def reverse_claim(runs: Parts, epochs: int, *, whole: bool) -> Claim:
    """On SAM first and SGD in so many last epochs of `late_run`."""
    sgd, sam, found = ([run[name]["sharpness"] for run in runs] for name in ("0", _longest(runs), "reverse"))
    back = (fmean(found) - fmean(sam)) / (fmean(sgd) - fmean(sam))
    return Claim(
        f"cross-entropy: SAM first and SGD in the last {epochs} epochs ends like SGD alone",
        PAPER,
        "more than half of the way back to the sharpness of SGD",
        f"{with_spread(found)} (SGD {with_spread(sgd)}, SAM {with_spread(sam)}): {100 * back:.0f} % of the way",
        back > 0.5 if whole else None,
        f"{STEPS_PER_EPOCH * epochs} steps of SGD, which end at {100 * LR * fmean(found) / 2:.0f} % of the edge of "
        f"stability 2/η = {2 / LR:g}"
        + ("" if back > 0.5 else "; our own reference run, after 720 such steps: .786, SGD 1.265, SAM .753"),
    )


def error_claim(runs: Parts) -> Claim:
    """On the test errors of `late_run`."""
    names = [name for name in runs[0] if name != "reverse"]
    return Claim(
        "cross-entropy: test error by number of SAM epochs",
        f"{PAPER}, abstract: late SAM almost as good as SAM throughout; no claim on digits",
        "reported only (2.2 to 2.7 % in our own reference run)",
        "; ".join(f"{name}: {with_spread([run[name]['error'] for run in runs])} %" for name in names),
        None,
    )


def adversarial_claim(runs: Parts, *, whole: bool) -> Claim:
    """On `adversarial_run`, one for each seed."""
    names = sorted(runs[0], key=int)
    robust = {name: fmean(run[name]["robust"] for run in runs) for name in names}
    closed = {name: (robust["0"] - robust[name]) / (robust["0"] - robust[names[-1]]) for name in names[1:-1]}
    epochs = int(names[-1])
    fifth = str(epochs // 5)
    return Claim(
        "adversarial training in the last epochs only reaches nearly the robustness of adversarial training throughout",
        f"{PAPER}; no limit is given",
        f">= {100 * ROBUST_SHARE:.0f} % of the gap in robust error closed by the last fifth of the epochs",
        "; ".join(
            f"{name}: robust {with_spread([run[name]['robust'] for run in runs])} %, plain "
            f"{fmean(run[name]['error'] for run in runs):.1f} %"
            + (f", {100 * closed[name]:.0f} % closed" if name in closed else "")
            for name in names
        ),
        closed[fifth] >= ROBUST_SHARE if whole else None,
        "this limit was chosen before the runs",
    )
