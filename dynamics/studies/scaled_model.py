"""A network whose change of output is scaled by α: from lazy training to feature learning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .character_training import single_thread
from .digit_problems import digit_examples
from .until_fitted import next_update

NUM_DIGITS = 1797


class KernelNetwork(nn.Module):
    """A fully connected network whose tangent kernel stays put as the width grows.

    Weights are standard normal, and each layer divides by the root of its fan-in: f(x) = a·ReLU(W x / √d) / √h with one
    hidden layer. No biases.

    Args:
        inputs: d.
        width: h, of each hidden layer.
        depth: Number D of hidden layers.
        seed: Of the weights.
        dtype: Of the weights.

    Source: Jacot, Gabriel, Hongler, Neural Tangent Kernel, 2018, section 2, with ReLU and without biases.
    """

    def __init__(self, inputs: int, width: int, depth: int = 1, *, seed: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        sizes = [inputs, *[width] * depth, 1]
        self.weights = nn.ParameterList(
            torch.randn(rows, columns, generator=random, dtype=dtype) for columns, rows in itertools.pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, d] -> [N]."""
        for i, weight in enumerate(self.weights):
            x = nn.functional.linear(x.relu() if i else x, weight) / math.sqrt(weight.shape[1])
        return x.squeeze(1)


def train_until_fitted(
    model: nn.Module,
    inputs: Tensor,
    signs: Tensor,
    *,
    alpha: float,
    temperature: float,
    batch_size: int,
    seed: int,
    max_updates: int,
) -> dict[str, Any]:
    r"""SGD on the mean of (1/α) max(0, 1 − y F) with F(x) = α (f(x) − f_0(x)), f_0 the initial f, until it is zero.

    An example's gradient is −y ∇f(x) where y (f − f_0) < 1/α and zero elsewhere: α sets the margin that f − f_0 has to
    reach, and nothing else. Batches are independent draws with replacement; those without a gradient are jumped over,
    see `next_update`.

    Args:
        model: f, changed in place; maps [N, ...] to [N].
        inputs: [P, ...].
        signs: y in {−1, 1}, [P].
        alpha: α.
        temperature: T = η/B.
        batch_size: B.
        seed: Of the batches.
        max_updates: Gives up then.

    Returns:
        "fitted": whether the loss reached exactly zero; "time": t* = η · (number of steps); "updates": steps with a
        gradient; "change": ‖w − w_0‖ / ‖w_0‖.
    """
    params = list(model.parameters())
    first = [p.detach().clone() for p in params]
    random = np.random.default_rng(seed)
    steps = updates = 0
    with torch.no_grad():
        start = model(inputs)
    while True:
        with torch.no_grad():
            margins = signs * (model(inputs) - start)
        unfitted = np.flatnonzero(~(margins >= 1 / alpha).numpy())  # what is not a number is not fitted
        if len(unfitted) == 0 or updates == max_updates or not bool(torch.isfinite(margins).all()):
            break
        waited, chosen = next_update(random, unfitted, len(signs), batch_size)
        steps += waited
        updates += 1
        rows = torch.from_numpy(chosen)
        gradients = torch.autograd.grad((signs[rows] * model(inputs[rows])).sum(), params)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p.add_(g, alpha=temperature)
    moved = sum(float((p.detach() - q).square().sum()) for p, q in zip(params, first, strict=True))
    size = sum(float(q.square().sum()) for q in first)
    return {
        "fitted": len(unfitted) == 0,
        "time": temperature * batch_size * steps,
        "updates": updates,
        "change": math.sqrt(moved / size),
    }


def parity_run(
    alpha: float,
    temperature: float,
    num_examples: int,
    *,
    width: int,
    batch_size: int,
    num_test: int,
    seed: int,
    max_updates: int,
) -> dict[str, Any]:
    """`train_until_fitted` on whether a handwritten digit is even, with one hidden layer.

    Args:
        num_test: Examples kept aside, the same for all P of a seed.
        seed: Of the weights, the choice of examples and the batches.

    Returns:
        What `train_until_fitted` does, and "error": the share of test examples with the wrong sign of F.
    """
    images, labels = digit_examples(NUM_DIGITS, seed=seed, dtype=torch.float32)
    signs = 1.0 - 2.0 * (labels % 2).float()
    model = KernelNetwork(images.shape[1], width, seed=seed)
    with single_thread():
        test = images[-num_test:]
        with torch.no_grad():
            start = model(test)
        found = train_until_fitted(
            model,
            images[:num_examples],
            signs[:num_examples],
            alpha=alpha,
            temperature=temperature,
            batch_size=batch_size,
            seed=seed,
            max_updates=max_updates,
        )
        with torch.no_grad():
            wrong = (model(test) - start) * signs[-num_test:] <= 0
    return {**found, "error": float(wrong.double().mean())}


def parity_runs(
    alphas: Sequence[float], temperatures: Sequence[float], num_examples: int, **settings: Any
) -> list[list[dict[str, Any]]]:
    """`parity_run` for each temperature (rows) and α (columns)."""
    return [[parity_run(alpha, t, num_examples, **settings) for alpha in alphas] for t in temperatures]
