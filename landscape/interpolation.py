"""The loss on the straight line between two sets of weights, and the barrier on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import Objective
from .sharpness import loss_at

NUM_ALPHAS = 21


@dataclass(frozen=True)
class LinearInterpolation:
    """L((1 − α) θ_a + α θ_b) along α.

    Attributes:
        alphas: Increasing; among them 0 and 1.
        losses: L at each.
    """

    alphas: Sequence[float]
    losses: Sequence[float]

    @property
    def ends(self) -> tuple[float, float]:
        """L(θ_a) and L(θ_b)."""
        a, b = (self.losses[self.alphas.index(end)] for end in (0.0, 1.0))
        return a, b

    @property
    def highest(self) -> float:
        """Largest L on the segment, 0 <= α <= 1, among the points evaluated."""
        return max(loss for _, loss in self._segment())

    @property
    def barrier(self) -> float:
        r"""max over α in [0, 1] of L((1 − α) θ_a + α θ_b) − (1 − α) L(θ_a) − α L(θ_b); never below 0.

        In units of the loss. It is that of the points evaluated, so a lower bound on that of the segment.

        Source: Frankle, Dziugaite, Roy, Carbin, Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020,
        section 2, with the line between the end losses in the place of their mean, as in Entezari, Sedghi, Saukh,
        Neyshabur, The Role of Permutation Invariance in Linear Mode Connectivity, 2022, equation 1.
        """
        a, b = self.ends
        return max(0.0, *(loss - (1 - alpha) * a - alpha * b for alpha, loss in self._segment()))

    def _segment(self) -> list[tuple[float, float]]:
        return [pair for pair in zip(self.alphas, self.losses, strict=True) if 0 <= pair[0] <= 1]


def linear_interpolation(
    objective: Objective,
    start: Tensor | Mapping[str, Tensor],
    end: Tensor | Mapping[str, Tensor],
    alphas: Sequence[float] | None = None,
) -> LinearInterpolation:
    """The loss on the line from one set of weights to another; those of the model are not touched.

    Buffers are those that the model has now. A model with BatchNorm has statistics that fit neither end: give an
    objective with mode="train", which takes them from each batch.

    Args:
        start, end: θ_a at α = 0 and θ_b at α = 1: flat [n], or tensors by name such as a state_dict, of which what the
            objective does not analyse is left out.
        alphas: Where to evaluate, also outside [0, 1]; 0 and 1 are added. None takes 21 points from 0 to 1.

    Raises:
        ValueError: weights of another size, names that are missing, or a closure that uses its tensors directly.
    """
    if objective.captures_tensors:
        raise ValueError(
            "the closure uses its tensors directly, so the loss elsewhere is unknown; write closure(*tensors)"
        )
    given = torch.linspace(0, 1, NUM_ALPHAS, dtype=torch.float64).tolist() if alphas is None else alphas
    where = sorted({0.0, 1.0, *(float(alpha) for alpha in given)})
    a, b = _flat(objective, "start", start), _flat(objective, "end", end)
    # The difference is not formed: at α = 0 and 1 the weights are those given, bit for bit.
    losses = [loss_at(objective, (1 - alpha) * a + alpha * b) for alpha in where]
    return LinearInterpolation(where, losses)


def _flat(objective: Objective, argument: str, weights: Tensor | Mapping[str, Tensor]) -> Tensor:
    if isinstance(weights, Mapping):
        names = list(objective.parameters)
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"`{argument}` lacks {missing[:5]}; give a tensor for each of the {len(names)} parameters")
        weights = objective.flatten({name: weights[name].detach() for name in names})
    if weights.shape != (objective.num_parameters,):
        raise ValueError(
            f"`{argument}` has the shape {tuple(weights.shape)}; give a flat vector of the objective's "
            f"{objective.num_parameters} weights, or tensors by name"
        )
    return weights.to(objective.device, objective.dtype)
