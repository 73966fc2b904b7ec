"""What is claimed of the stages of sign descent on the two-layer transformer, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .attention_stages import detect_stages, first_below
from .claim_numbers import listed
from .order_curves import Run, at, between, crossings, curves_apart, differences, each, last_move, line_fit
from .result import Claim
from .sign_transformer_experiments import NUM_TEST

PAPER = "Li et al. 2025"
REFERENCE = "own reference run of the setting of Li et al. 2025"

# Of the scaling with η: largest difference over the range of a curve.
SCALING_LIMIT = 0.05
# What differs later than this is told from what differs at the start only.
FIRST_STEPS = 20
CURVES = (
    "loss",
    "test_loss",
    "test_error",
    "s11",
    "s21",
    "value_noise",
    "value_signal",
    "query_noise",
    "key_noise",
    "query_signal",
    "key_signal",
    "aligned",
    "query_vote",
    "key_vote",
)

Runs = Sequence[Run]


def first_stages_claims(sign: Runs, half: Runs) -> list[Claim]:
    """On stages I and II, of SignGD and of SignGD with half the learning rate."""
    fits = [line_fit(*between(run, "value_noise", 1, 200)) for run in sign]
    slopes = [slope for slope, _ in fits]
    shares = [
        line_fit(*between(slow, "value_noise", 1, 400))[0] / slope for slow, slope in zip(half, slopes, strict=True)
    ]
    growth = each(sign, lambda run: at(run, "query_noise", 2) / at(run, "query_noise", 0) - 1)
    peaks = each(sign, lambda run: max(run["aligned"]))
    when = [run["step"][int(np.argmax(run["aligned"]))] for run in sign]
    s21, s11 = (each(sign, lambda run, name=name: at(run, name, 10)) for name in ("s21", "s11"))
    return [
        Claim(
            "stage I: the value noise ⟨v, y ξ⟩ is linear in t",
            f"{PAPER}, stage I; figures from our own reference run",
            "R² > .999 on t = 1..200; slope .0405 ± 5 % a step at η = 1e-4",
            f"R² {listed([r2 for _, r2 in fits], '.6f')}; slope {listed(slopes, '.4f')}",
            all(r2 > 0.999 and abs(slope / 0.0405 - 1) <= 0.05 for slope, r2 in fits),
        ),
        Claim(
            "its slope is proportional to η",
            "derived here",
            "slope at η/2 over slope at η within 5 % of 1/2",
            listed(shares, ".4f"),
            all(abs(share / 0.5 - 1) <= 0.05 for share in shares),
        ),
        Claim(
            "stage I: queries are still near their first weights at t = 2",
            f"{PAPER}, stage I; limit from our own reference run",
            "|query noise| changes by less than 15 %",
            listed([100 * g for g in growth], ".1f") + " %",
            all(abs(g) < 0.15 for g in growth),
            "a step aligned with the noise moves ⟨w_Q, ξ⟩ by about .02 of its first .05, so that two steps can be most "
            "of it; the mean of the absolute values changes by the share that is aligned already",
        ),
        Claim(
            "stage II: query and key noise align in sign",
            f"{PAPER}, stage II; limit from our own reference run",
            "share of equal signs > .95 at its peak, near t = 10",
            f"{listed(peaks)} at t = {listed(when, 'g')}",
            all(peak > 0.95 for peak in peaks),
        ),
        Claim(
            "stage II: the noise query leaves the signal while the signal query does not",
            f"{PAPER}, stage II; limits from our own reference run",
            "s_21 < .05 and s_11 > .48 at t = 10",
            f"s_21 {listed(s21)}; s_11 {listed(s11)}",
            all(a < 0.05 and b > 0.48 for a, b in zip(s21, s11, strict=True)),
        ),
    ]


def later_stages_claims(sign: Runs, double: Runs) -> list[Claim]:
    """On their order, and stages III and IV; of the float64 runs only the query noise."""
    noise, signal = crossings(sign)
    query = each(sign, lambda run: at(run, "query_noise", 100))
    still, double_still = (each(runs, _query_change) for runs in (sign, double))
    growing = each(sign, lambda run: min(np.diff(_tail(run, "key_noise"))))
    growth = each(sign, lambda run: at(run, "key_noise", 200) / at(run, "key_noise", 100))
    stages = [detect_stages(run) for run in sign]
    votes = each(sign, lambda run: at(run, "query_vote", 100))
    against = each(sign, lambda run: 1 - at(run, "key_vote", 100))
    dip = each(sign, lambda run: min(between(run, "aligned", 10, 200)[1]))
    late = each(sign, lambda run: at(run, "aligned", 200))
    decays = []
    for run in sign:
        steps, losses = between(run, "loss", 50, 200)
        decays.append(line_fit(steps, [math.log(loss) for loss in losses]))
    s11 = each(sign, lambda run: at(run, "s11", 150))
    return [
        Claim(
            "the noise query leaves the signal long before the signal query does",
            f"{PAPER}; factor from our own reference run",
            "first t with s_11 < .1 at least 5 times the first t with s_21 < .01",
            f"s_21 at t = {listed(noise)}; s_11 at t = {listed(signal)}",
            all(a is not None and b is not None and b >= 5 * a for a, b in zip(noise, signal, strict=True)),
        ),
        Claim(
            "the four stages follow each other",
            f"{PAPER}; read with our thresholds",
            "every stage begins, in the order I, II, III, IV",
            "II, III, IV begin at t = "
            + "; ".join(listed([one[stage] for stage in ("II", "III", "IV")]) for one in stages),
            all(None not in one.values() for one in stages),
        ),
        Claim(
            "query noise freezes while key noise keeps growing",
            REFERENCE,
            "|query noise| changes by less than 1 % on t = 100..200 and |key noise| grows at every step (.802 there)",
            f"|query noise| {listed(query)} at t = 100, changes by {listed([100 * s for s in still], '.2g')} %; "
            f"|key noise| times {listed(growth)}",
            all(s < 0.01 for s in still) and all(g > 0 for g in growing),
            f"in float32; in float64 |query noise| changes by {listed([100 * s for s in double_still], '.2g')} % on "
            "the same steps",
        ),
        Claim(
            "stage III: the noise of all examples votes on the sign of a row's query and key signal",
            f"{PAPER}, stage III; no limit is given",
            "the query signal follows, the key signal opposes the vote",
            f"at t = 100: {listed([100 * v for v in votes], '.0f')} % of the queries follow, "
            f"{listed([100 * v for v in against], '.0f')} % of the keys oppose",
            None,
        ),
        Claim(
            "stage III: noise components whose sign disagrees with the vote are reversed",
            f"{PAPER}, stage III; no limit is given",
            "share of equal signs of query and key noise falls from its peak, then recovers",
            f"lowest {listed(dip)}, at t = 200 {listed(late)}",
            None,
        ),
        Claim(
            "stage IV: the train loss decays exponentially",
            f"{PAPER}, theorem on convergence; limit from our own reference run",
            "log loss linear in t on [50, 200], R² > .99",
            f"R² {listed([r2 for _, r2 in decays], '.4f')}; slope {listed([slope for slope, _ in decays], '.4f')}",
            all(r2 > 0.99 and slope < 0 for slope, r2 in decays),
        ),
        Claim(
            "stage IV: the signal query leaves the signal too",
            f"{PAPER}, stage IV; limit from our own reference run",
            "s_11 < .02 at t = 150",
            listed(s11),
            all(value < 0.02 for value in s11),
        ),
    ]


def _tail(run: Run, name: str) -> list[float]:
    return between(run, name, 100, 200)[1]


def _query_change(run: Run) -> float:
    """Largest relative change of the query noise since t = 100, up to t = 200."""
    return max(abs(v / at(run, "query_noise", 100) - 1) for v in _tail(run, "query_noise"))


def scaling_claims(sign: Runs, half: Runs) -> list[Claim]:
    """On half the learning rate and twice the steps."""
    apart: dict[str, tuple[float, float]] = {}
    beyond: dict[str, float] = {}
    for name in CURVES:
        clock = "test_step" if name.startswith("test") else "step"
        found = [
            pair
            for run, slow in zip(sign, half, strict=True)
            for pair in differences(run, slow, name, 200, stretch=2, clock=clock)
        ]
        apart[name] = max(found, key=lambda pair: pair[0])
        late = [t for share, t in found if share > SCALING_LIMIT]
        if late:
            beyond[name] = max(late)
    return [
        Claim(
            "time is counted in 1/η: half the learning rate gives all curves at 2t",
            "derived here; limit from our own reference run",
            f"within {100 * SCALING_LIMIT:.0f} % of each curve's range at every t <= 200 that both have",
            ", ".join(f"{name} {100 * value:.1f} % (t = {t:g})" for name, (value, t) in apart.items()),
            not beyond,
            _scaling_note(sign, beyond),
        )
    ]


def _scaling_note(sign: Runs, beyond: Mapping[str, float]) -> str:
    """Which curves differ by more than the limit, and until when."""
    first = [f"{name} (last at t = {t:g})" for name, t in beyond.items() if t <= FIRST_STEPS]
    later = [f"{name} (last at t = {t:g})" for name, t in beyond.items() if t > FIRST_STEPS]
    notes = []
    if first:
        notes.append(f"beyond the limit in the first {FIRST_STEPS} steps only: " + ", ".join(first))
    if later:
        notes.append("beyond the limit later: " + ", ".join(later))
    if "test_error" in beyond:
        spans = each(sign, lambda run: float(np.ptp(_errors(run))))
        notes.append(
            f"one of the {NUM_TEST} examples is "
            f"{listed([100 / (NUM_TEST * span) for span in spans if span])} % of the range of the test error"
        )
    return "; ".join(notes)


def _errors(run: Run) -> list[float]:
    return [error for t, error in zip(run["test_step"], run["test_error"], strict=True) if t <= 200]


def rounding_claims(single: Runs, double: Runs) -> list[Claim]:
    """On the same seeds in float32 and float64."""
    names = ("loss", "s11", "value_noise", "key_noise", "query_noise", "aligned")
    pairs = list(zip(single, double, strict=True))
    apart = {name: max(curves_apart(b, a, name, 200)[0] for a, b in pairs) for name in names}
    early, late = (each(double, lambda run, t=t: at(run, "query_noise", t)) for t in (100, 150))
    gone = [
        listed([first_below(run["step"], run["s21"], smallest) for run in runs], ".0f")
        for runs, smallest in ((single, 1e-44), (double, 1e-300))
    ]
    equal = [listed(each(runs, lambda run: at(run, "aligned", 200)), ".3f") for runs in (single, double)]
    stops = [
        listed(each(runs, lambda run: last_move(run["step"], run["value_signal"])), "g") for runs in (single, double)
    ]
    last = double[0]["step"][-1]
    return [
        Claim(
            "the freeze of the query noise is one of arithmetic: s_21 underflows, and the sign of a gradient of 0 is 0",
            "derived here",
            "in float64 |query noise| still grows by more than half from t = 100 to 150, in every seed",
            f"{listed(early, '.3f')} to {listed(late, '.3f')}; s_21 is gone at t = {gone[0]} in float32, {gone[1]} in "
            "float64",
            all(b > 1.5 * a for a, b in zip(early, late, strict=True)),
        ),
        Claim(
            "loss, attention of the signal query, value and key do not depend on the precision; the query does",
            "derived here; our own reference run: the value signal stops near t = 735 in float32",
            "reported only: largest difference of float32 and float64 over the range of a curve, t <= 200",
            ", ".join(f"{name} {100 * value:.2g} %" for name, value in apart.items())
            + f"; share of equal signs at t = 200 {equal[0]} and {equal[1]}; of {last:g} steps the value signal last "
            f"moves at t = {stops[0]} in float32, {stops[1]} in float64",
            None,
        ),
    ]
