"""The gradient noise scale from what a training step has anyway: gradients of micro-batches, or of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.accurate import dot
from ..landscape.intervals import ratio_interval, student_quantile
from ..landscape.per_example_noise import NoiseScale

# Of two micro-batches' loss factors per example.
EQUAL_SHARES = 1e-6
# With a decay their effective number is not an integer.
FEWEST_STEPS = 1.5
NAMES = ("weight", "squared_weight", "trace", "squared_norm", "trace_2", "squared_norm_2", "product")


class BatchNoise:
    r"""Running estimate of the simple gradient noise scale tr Σ / |G|² from gradients G_j of k parts of a batch.

    Part j has b_j examples, B = Σ b_j together; G = Σ b_j G_j / B is the gradient of the batch. Each step gives

        tr Σ ≈ (Σ b_j ‖G_j‖² / B − ‖G‖²) · B / (k − 1),    |G|² ≈ ‖G‖² − tr Σ / B,

    both without bias when examples are drawn independently; when a batch is drawn without replacement from a data set,
    the expectations are those of `per_example_statistics(...).noise_scale()` on that set. For equal parts these are the
    paper's equations. The noise scale is the ratio of the two means over steps, never a mean of ratios, and the
    interval is Fieller's from their scatter over steps, which it takes for independent.

    Accumulation, with `loss` a mean over the micro-batch:

        noise = BatchNoise(decay=0.99)
        for part in parts:
            (loss(part) * len(part) / num_examples).backward()
            noise.micro_batch(model.parameters(), len(part), factor=len(part) / num_examples)
        noise.step()
        optimizer.step()

    It keeps one copy of the gradient. Ranks, with the gradients before they are averaged (`model.no_sync()`):

        noise.rank([p.grad for p in model.parameters()], num_examples=len(batch))

    Args:
        decay: Each step counts this many times the next one, above 0 and at most 1. 1 weighs all steps alike; a
            training run changes, so that 0.99 or so follows it.
        confidence: Of the interval.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, appendix A.1; unequal parts derived
    here.
    """

    def __init__(self, *, decay: float = 1.0, confidence: float = 0.95) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` is {decay}; give a factor above 0 and at most 1, such as 0.99")
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` is {confidence}; give a probability between 0 and 1, such as 0.95")
        self.decay, self.confidence = decay, confidence
        self._sums: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self._forget()

    def add(self, squares: Sequence[float], sizes: Sequence[float], whole: float) -> tuple[float, float]:
        """One step from numbers.

        Args:
            squares: ‖G_j‖² [k], k >= 2.
            sizes: b_j [k].
            whole: ‖G‖².

        Returns:
            This step's tr Σ and |G|².
        """
        if len(squares) != len(sizes) or len(sizes) < 2:
            raise ValueError(
                f"`squares` has {len(squares)} entries and `sizes` {len(sizes)}; the noise scale needs two parts of a "
                "batch at least, each with its number of examples"
            )
        if not all(size > 0 for size in sizes):
            raise ValueError(f"`sizes` is {list(sizes)}; every part must have examples")
        total = math.fsum(sizes)
        mean = math.fsum(b * s for b, s in zip(sizes, squares, strict=True)) / total
        trace = (mean - whole) * total / (len(sizes) - 1)
        squared_norm = whole - trace / total
        if not (math.isfinite(trace) and math.isfinite(squared_norm)):
            raise ValueError(f"the gradients are not finite (‖G‖² = {whole}); leave out steps that overflow")
        new = (1.0, 1.0, trace, squared_norm, trace**2, squared_norm**2, trace * squared_norm)
        for name, value in zip(NAMES, new, strict=True):
            factor = self.decay**2 if name == "squared_weight" else self.decay
            self._sums[name] = self._sums[name] * factor + value
        return trace, squared_norm

    def micro_batch(self, parameters: Iterable[Tensor], num_examples: int, *, factor: float) -> None:
        """To be called after each backward pass that adds to `.grad`.

        Args:
            parameters: Of the model; those without a gradient count as zeros.
            num_examples: Of the micro-batch.
            factor: By which its mean loss was multiplied before the backward pass, gradient scaling included. It must
                be in proportion to `num_examples`, so that the sum is the gradient of the whole batch.
        """
        if not (num_examples > 0 and factor > 0):
            raise ValueError(f"`num_examples` is {num_examples} and `factor` {factor}; both must be positive")
        if self._sizes and abs(factor / num_examples / self._share - 1) > EQUAL_SHARES:
            raise ValueError(
                f"`factor` is {factor:g} for {num_examples} examples, but was {self._share:g} for each example before; "
                "weight micro-batches by their examples"
            )
        self._share = factor / num_examples
        whole = [p.grad.detach() for p in parameters if p.grad is not None]
        known = self._before
        if known and len(known) != len(whole):
            raise ValueError(
                f"`parameters` has {len(whole)} gradients and had {len(known)}; call `step` after every batch, and use "
                "the same parameters in every micro-batch"
            )
        own = [g - k for g, k in zip(whole, known, strict=True)] if known else whole
        self._squares.append(_square(own) / factor**2)
        self._sizes.append(float(num_examples))
        self._before = [g.clone() for g in whole]

    def step(self) -> tuple[float, float] | None:
        """Ends a batch of micro-batches; returns its tr Σ and |G|². None where it had one micro-batch only."""
        sizes, squares, before = self._sizes, self._squares, self._before
        total = self._share * math.fsum(sizes)  # factor of the whole batch
        self._forget()
        return None if len(sizes) < 2 else self.add(squares, sizes, _square(before) / total**2)

    def rank(
        self,
        gradients: Iterable[Tensor | None],
        num_examples: int,
        *,
        averaged: Iterable[Tensor | None] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[float, float]:
        """One step from the gradients of all ranks; every rank calls it and gets the same numbers.

        Args:
            gradients: This rank's own, of the mean loss of its examples; nothing is changed.
            num_examples: Of this rank.
            averaged: Their mean over ranks, weighted by examples, where it is known; else it is made here, which costs
                one reduction of all gradients.
            group: Of the ranks; None is the default group.

        Returns:
            This step's tr Σ and |G|².
        """
        own = [g.detach() for g in gradients if g is not None]
        ranks, mine = dist.get_world_size(group), dist.get_rank(group)
        table = torch.zeros(2, ranks, dtype=torch.float64, device=own[0].device if own else None)
        table[0, mine], table[1, mine] = _square(own), float(num_examples)
        dist.all_reduce(table, group=group)
        sizes = table[1].tolist()
        if averaged is None:
            # Weighted before the sum, in at least float32: sums of half-precision gradients overflow.
            share = num_examples / math.fsum(sizes)
            whole = [g.to(torch.promote_types(g.dtype, torch.float32), copy=True).mul_(share) for g in own]
            for gradient in whole:
                dist.all_reduce(gradient, group=group)
        else:
            whole = [g.detach() for g in averaged if g is not None]
        return self.add(table[0].tolist(), sizes, _square(whole))

    @property
    def steps(self) -> float:
        """Steps behind the estimate; with a decay, how many of equal weight would be as good."""
        return self._sums["weight"] ** 2 / self._sums["squared_weight"] if self._sums["weight"] else 0.0

    def noise_scale(self) -> NoiseScale:
        """tr Σ / |G|² after the steps so far, with the standard error of its linearisation and Fieller's interval.

        Infinite where the estimate of |G|² is not positive.

        Raises:
            ValueError: fewer than two steps, which have no scatter.
        """
        s, steps = self._sums, self.steps
        if steps < FEWEST_STEPS:
            raise ValueError(f"the noise scale needs two steps at least; so far there are {steps:.3g}")
        trace, squared_norm = s["trace"] / s["weight"], s["squared_norm"] / s["weight"]

        def of_means(product: float, first: float, second: float) -> float:
            """Covariance of the weighted means of two quantities."""
            return (product / s["weight"] - first * second) / (steps - 1)

        trace_var = max(of_means(s["trace_2"], trace, trace), 0.0)
        norm_var = max(of_means(s["squared_norm_2"], squared_norm, squared_norm), 0.0)
        both = of_means(s["product"], trace, squared_norm)
        low, high = ratio_interval(
            trace, squared_norm, trace_var, norm_var, both, student_quantile(steps - 1, self.confidence)
        )
        scale, stderr = math.inf, math.inf
        if squared_norm > 0:
            scale = trace / squared_norm
            stderr = math.sqrt(max(trace_var - 2 * scale * both + scale**2 * norm_var, 0.0)) / squared_norm
        return NoiseScale(
            estimate=scale,
            stderr=stderr,
            trace=trace,
            squared_norm=squared_norm,
            low=low,
            high=high,
            confidence=self.confidence,
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums so far; a batch that is not finished is not kept."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(NAMES):
            raise ValueError(f"`state` has the keys {sorted(state)}; a state of BatchNoise has {sorted(NAMES)}")
        self._sums = {name: float(state[name]) for name in NAMES}
        self._forget()

    def _forget(self) -> None:
        """Of the batch in the making."""
        self._sizes: list[float] = []
        self._squares: list[float] = []
        self._before: list[Tensor] = []
        self._share = 0.0


def _square(gradients: Iterable[Tensor]) -> float:
    """Σ g² over tensors, with sums in float64."""
    return math.fsum(float(dot(flat, flat)) for flat in (g.reshape(-1) for g in gradients))
