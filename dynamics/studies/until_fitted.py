"""SGD on hinge losses until every example is fitted, and the perceptron on data depleted near its boundary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def next_update(
    random: np.random.Generator, unfitted: NDArray[np.intp], num_examples: int, batch_size: int
) -> tuple[int, NDArray[np.intp]]:
    """The next batch that changes the weights, of independent uniform batches with replacement.

    A batch of fitted examples has a zero gradient, so that the weights, and with them the set of unfitted examples,
    stand still until a draw hits that set. The number of draws until then is geometric, and what the rest of that batch
    hits is binomial. Nothing is approximated; late in training, where few are left, this spares almost all batches.

    Args:
        random: Where the draws come from.
        unfitted: Indices of the examples with a gradient, at least one.
        num_examples: P.
        batch_size: B.

    Returns:
        How many batches it took, that one included; the unfitted examples in it, with repetitions.
    """
    share = len(unfitted) / num_examples
    draws = int(random.geometric(share))
    left = batch_size - 1 - (draws - 1) % batch_size
    hits = 1 + (int(random.binomial(left, share)) if left else 0)
    return -(-draws // batch_size), unfitted[random.integers(len(unfitted), size=hits)]


def depleted_gaussian(
    num: int, dim: int, chi: float, random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Inputs x [num, dim] and labels sign(x_1) [num].

    The density of x_1 is proportional to |x_1|^χ exp(−x_1²/2), that of the other coordinates standard normal: χ = 0
    has no gap between the classes, and the larger χ the fewer examples are near the boundary.

    Raises:
        ValueError: χ is at most −1, where the density has no integral.

    Source: Sclocchi, Geiger, Wyart 2023, section on the perceptron.
    """
    if chi <= -1:
        raise ValueError(f"`chi` is {chi:g}; it must be above -1, or the density cannot be normalised")
    labels = random.choice([-1.0, 1.0], size=num)
    x = random.standard_normal((num, dim))
    x[:, 0] = labels * np.sqrt(2 * random.standard_gamma((chi + 1) / 2, size=num))
    return x, labels


def perceptron_run(
    num_examples: int,
    temperature: float,
    *,
    batch_size: int,
    chi: float,
    margin: float,
    dim: int,
    seed: int,
    max_updates: int = 2_000_000,
) -> dict[str, Any]:
    """Trains f(x) = w·x/√d from w = 0 on the mean of max(0, κ − y f) until that is exactly zero.

    Args:
        num_examples: P.
        temperature: T = η/B.
        batch_size: B.
        chi: Of `depleted_gaussian`.
        margin: κ.
        dim: d.
        seed: Of the data and the batches.
        max_updates: Gives up then.

    Returns:
        "signal": w_1; "noise": ‖w_⊥‖; "time": t* = η · (number of steps); "updates"; "fitted": whether it ended.
    """
    x, labels = depleted_gaussian(num_examples, dim, chi, np.random.default_rng([seed, num_examples]))
    random = np.random.default_rng([seed, num_examples, batch_size, round(1e6 * temperature)])
    towards = labels[:, None] * x / np.sqrt(dim)  # the step of w for an unfitted example, over T
    w, outputs = np.zeros(dim), np.zeros(num_examples)
    steps = updates = 0
    while len(unfitted := np.flatnonzero(outputs < margin)) and updates < max_updates:
        waited, chosen = next_update(random, unfitted, num_examples, batch_size)
        steps += waited
        updates += 1
        w += temperature * towards[chosen].sum(0)
        outputs = towards @ w
    return {
        "signal": float(w[0]),
        "noise": float(np.linalg.norm(w[1:])),
        "time": temperature * batch_size * steps,
        "updates": updates,
        "fitted": len(unfitted) == 0,
    }


def stationary_noise(chi: float, dim: int) -> float:
    r"""‖w_⊥‖ / T of the perceptron late in training, where w_1 ≫ ‖w_⊥‖ ≫ κ and examples are fresh.

    With u = y x_⊥·w_⊥ / ‖w_⊥‖ standard normal, an example is unfitted where |x_1| w_1 < −u ‖w_⊥‖, of probability
    ∝ |u|^(1+χ). A step on it adds T y x_⊥ / √d, with E‖x_⊥‖² = d − 2 + E u² = d + χ over the unfitted. That leaves
    ‖w_⊥‖² as it is on average where 2 ‖w_⊥‖ E|u| / √d = T (d + χ)/d, with E|u| = √2 Γ((3+χ)/2) / Γ(1+χ/2). Hence
    ‖w_⊥‖ = T (√d/2) (1 + χ/d) / E|u|, whatever P.
    """
    size = math.sqrt(2) * math.gamma((3 + chi) / 2) / math.gamma(1 + chi / 2)
    return math.sqrt(dim) / 2 * (1 + chi / dim) / size


def perceptron_runs(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`perceptron_run` for each of the settings."""
    return [perceptron_run(**setting) for setting in settings]
