"""Many Adam runs at once, in NumPy: a grid of settings and seeds costs little more than one run.

What is run is the plain rule, that of torch.optim.Adam or `GenericAdam`, which the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .schedules import Values

CHUNK = 2048  # steps whose random numbers are drawn together


@dataclass(frozen=True)
class Paths:
    """
    Attributes:
        x: Where the runs ended, [*shape].
        means: Mean of `watch(x)` over each of equally long stretches of steps, [num_stretches, *shape of watch(x)].
        ends: Last step of each stretch.
    """

    x: Values
    means: Values
    ends: Values


def adam_paths(
    gradient: Callable[[Values, Any], Values],
    samples: Callable[[int], Any],
    x: Values,
    *,
    steps: int,
    alpha: Callable[[Values], Values],
    beta: ArrayLike,
    theta: ArrayLike | Callable[[Values], Values],
    corrected: bool,
    v0: float = 0.0,
    eps: float = 1e-8,
    box: tuple[float, float] | None = None,
    watch: Callable[[Values], Values] = lambda x: x,
    num_stretches: int = 100,
) -> Paths:
    """x ← x − α_t m̂ / (√v̂ + eps) in every element, where m averages g with β and v averages g² with θ.

    Args:
        gradient: g from x [*shape] and the sample of this step.
        samples: `samples(k)` gives those of the next k steps, k first.
        x: Start, [*shape]: settings, seeds, coordinates; float64.
        steps: T.
        alpha: α_t at an array of steps t = 1, 2, ...
        beta, theta: Broadcast against x. `theta` may be a function of steps [k] that gives [k] or [k, *broadcast].
        corrected: Divide m by 1 − βᵗ and v by 1 − θᵗ, as Adam does; only for a constant θ.
        v0: Start of v.
        eps: Added to the root.
        box: Each step is projected onto this interval.
        watch: What is averaged along the run.
        num_stretches: For how many parts of the run.
    """
    if corrected and callable(theta):
        raise ValueError(
            "`corrected` is Adam's correction for a constant `theta`; with a schedule pass corrected=False"
        )
    x = np.array(x, dtype=np.float64)
    beta = np.asarray(beta, dtype=np.float64)
    m, v = np.zeros_like(x), np.full_like(x, v0)
    ends = np.unique(np.linspace(0, steps, min(num_stretches, steps) + 1).astype(int)[1:])
    total, means, count = np.zeros_like(watch(x)), [], 0
    for first in range(1, steps + 1, CHUNK):
        t = np.arange(first, min(first + CHUNK, steps + 1), dtype=np.float64)
        alphas, drawn = np.broadcast_to(alpha(t), t.shape), samples(len(t))
        thetas = (
            theta(t) if callable(theta) else np.broadcast_to(np.asarray(theta, np.float64), (len(t), *np.shape(theta)))
        )
        for k in range(len(t)):
            g, step = gradient(x, drawn[k]), first + k
            m *= beta
            m += (1 - beta) * g
            v *= thetas[k]
            v += (1 - thetas[k]) * (g * g)
            if corrected:
                move = (m / (1 - beta**step)) / (np.sqrt(v / (1 - thetas[k] ** step)) + eps)
            else:
                move = m / (np.sqrt(v) + eps)
            x -= alphas[k] * move
            if box is not None:
                np.clip(x, *box, out=x)
            total += watch(x)
            count += 1
            if step == ends[len(means)]:
                means.append(total / count)
                total, count = np.zeros_like(total), 0
    return Paths(x, np.array(means), ends.astype(np.float64))
