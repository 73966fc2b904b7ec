"""The gradient noise scale from what a training step has anyway: gradients of micro-batches, or of ranks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.accurate import dot
from ..landscape.intervals import ratio_interval, student_quantile
from ..landscape.per_example_noise import NoiseScale
from .rank_gradients import gradient_of_ranks, table_device

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
        optimizer.zero_grad()

    It keeps one copy of the gradient. Every batch must start from gradients that are None or 0: what is left of the
    batch before would count as the first micro-batch's. This is refused where nothing else has written to the
    gradients in between; it is not seen before the first batch, or where they were clipped, unscaled or averaged.

    Ranks, with the gradients before they are averaged (`model.no_sync()`):

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
        # The gradients after the last micro-batch, without keeping them alive, and how often they had been written to.
        self._last: list[tuple[weakref.ref[Tensor], int] | None] = []
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
            parameters: Of the model, the same in every micro-batch; those without a gradient count as zeros.
            num_examples: Of the micro-batch.
            factor: By which its mean loss was multiplied before the backward pass, gradient scaling included. It must
                be in proportion to `num_examples`, so that the sum is the gradient of the whole batch.

        Raises:
            ValueError: numbers that do not fit, other parameters than before, gradients that were dropped within a
                batch or are left from the batch before.
        """
        if not (num_examples > 0 and factor > 0):
            raise ValueError(f"`num_examples` is {num_examples} and `factor` {factor}; both must be positive")
        if self._sizes and abs(factor / num_examples / self._share - 1) > EQUAL_SHARES:
            raise ValueError(
                f"`factor` is {factor:g} for {num_examples} examples, but was {self._share:g} for each example before; "
                "weight micro-batches by their examples"
            )
        held = [p.grad for p in parameters]
        if self._sizes and len(self._before) != len(held):
            raise ValueError(
                f"`parameters` has {len(held)} entries and had {len(self._before)}; call `step` after every batch, and "
                "use the same parameters in every micro-batch"
            )
        if not self._sizes:
            self._refuse_leftovers(held)
        whole = [None if g is None else g.detach() for g in held]
        own = []
        for k, (g, before) in enumerate(zip(whole, self._before or [None] * len(whole), strict=True)):
            if g is not None:
                own.append(g if before is None else g - before)
            elif before is not None:
                raise ValueError(
                    f"`parameters` number {k} has lost its gradient since the last micro-batch; gradients add up over "
                    "a batch: call `step` before they are set to zero"
                )
        self._share = factor / num_examples
        self._squares.append(_square(own) / factor**2)
        self._sizes.append(float(num_examples))
        self._before = [None if g is None else g.clone() for g in whole]
        self._last = [None if g is None else (weakref.ref(g), g._version) for g in held]

    def step(self) -> tuple[float, float] | None:
        """Ends a batch of micro-batches; returns its tr Σ and |G|². None where it had one micro-batch only."""
        sizes, squares, before = self._sizes, self._squares, self._before
        total = self._share * math.fsum(sizes)  # factor of the whole batch
        self._forget()
        whole = [g for g in before if g is not None]
        return None if len(sizes) < 2 else self.add(squares, sizes, _square(whole) / total**2)

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
            gradients: This rank's own, of the mean loss of its examples, in the same order on every rank; None counts
                as zeros, also where other ranks have a gradient. Nothing is changed.
            num_examples: Of this rank.
            averaged: Their mean over ranks, weighted by examples, where it is known; else it is made here, which costs
                one reduction of all gradients.
            group: Of the ranks; None is the default group.

        Returns:
            This step's tr Σ and |G|².

        Raises:
            ValueError: on every rank: a rank without examples, gradients of other parameters than another rank's,
                `averaged` on some ranks only, gradients that are not finite.
        """
        own = [None if g is None else g.detach() for g in gradients]
        ranks, mine, device = dist.get_world_size(group), dist.get_rank(group), table_device(group)
        table = torch.zeros(4, ranks, dtype=torch.float64)
        table[:, mine] = torch.tensor(
            [_square(g for g in own if g is not None), float(num_examples), len(own), averaged is not None],
            dtype=torch.float64,
        )
        table = table.to(device)
        dist.all_reduce(table, group=group)
        squares, sizes, lengths, known = table.tolist()
        # What is wrong on one rank is refused on all: the others would wait for it in the next reduction.
        if not all(size > 0 for size in sizes):
            raise ValueError(f"`num_examples` is {sizes} on the ranks; every rank must have examples")
        if len(set(known)) > 1:
            raise ValueError("`averaged` is None on some ranks only; give it on all of them or on none")
        if len(set(lengths)) > 1:
            raise ValueError(
                f"`gradients` has {[int(length) for length in lengths]} entries on the ranks; give one for each "
                "parameter on every rank, None for those without"
            )
        if averaged is None:
            whole = gradient_of_ranks(own, num_examples / math.fsum(sizes), device=device, group=group)
        else:
            whole = [g.detach() for g in averaged if g is not None]
        return self.add(squares, sizes, _square(whole))

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
        self._last = []
        self._forget()

    def _refuse_leftovers(self, held: Sequence[Tensor | None]) -> None:
        """A gradient that was written to once at most since the last batch was set to zero, or added to, not both."""
        left = []
        for gradient, last in zip(held, self._last, strict=False):
            if last is None:
                continue
            # Views are pieces of buckets, which their owner overwrites instead of setting them to zero.
            if gradient is None or last[0]() is not gradient or gradient._is_view() or gradient._version > last[1] + 1:
                return
            left.append(gradient.detach())
        if _square(left) > 0:
            raise ValueError(
                "`parameters` still hold the gradients of the batch before, which would count as the first "
                "micro-batch's; call zero_grad() after every batch"
            )

    def _forget(self) -> None:
        """Of the batch in the making."""
        self._sizes: list[float] = []
        self._squares: list[float] = []
        self._before: list[Tensor | None] = []
        self._share = 0.0


def _square(gradients: Iterable[Tensor]) -> float:
    """Σ g² over tensors, with sums in float64."""
    return math.fsum(float(dot(flat, flat)) for flat in (g.reshape(-1) for g in gradients))
