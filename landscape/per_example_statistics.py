"""What the gradients of single examples tell: their scatter, signal against noise, noise scale, alignment, tails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .blocks import Blocks, Partition
from .layout import Layout
from .per_example_alignment import Alignment, alignment_of
from .per_example_noise import NoiseScale, noise_scale_of
from .per_example_rows import SAMPLED_COLUMNS, GradientRows
from .per_example_snr import Definition, signal_to_noise
from .per_example_tails import GradientTails, gradient_tails

# Entries of gradients that are formed at one time.
FORMED_ENTRIES = 1 << 23


@dataclass(frozen=True)
class KeptExamples:
    """Gradients of this rank's examples, or what stands for them, with ‖g_i‖ and w_i, float64."""

    rows: GradientRows
    norms: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PerExampleStatistics:
    r"""What one pass over the gradients g_i of N examples with weights w_i left; made by `per_example_statistics`.

    Attributes:
        mean: Σ w_i g_i [n], the gradient of the objective.
        second_moment: Σ w_i g_i² [n], the diagonal of the empirical Fisher matrix.
        norms: ‖g_i‖ [N], in the order of the data; of all ranks.
        weights: w_i [N], float64; their sum is 1 for a mean.
        layout: Names and shapes behind [n].
        method: What computed them.
        along: g_i · ḡ [N] in float64, of all ranks; estimates where `sketched`, None with collect="sums".
        kept: What was kept of the gradients; None with collect="sums".
    """

    mean: Tensor
    second_moment: Tensor
    norms: Tensor
    weights: Tensor
    layout: Layout
    method: str
    along: Tensor | None = field(default=None, repr=False)
    kept: KeptExamples | None = field(default=None, repr=False)

    @property
    def num_examples(self) -> int:
        return len(self.norms)

    @property
    def sketched(self) -> bool:
        """Whether inner products are estimates, because what they need did not fit the budget."""
        return self.kept is not None and not self.kept.rows.exact

    @property
    def gradients(self) -> Tensor:
        """g_i [N, n], formed at every access; of this rank's examples.

        Raises:
            ValueError: they were not kept, or sketched.
        """
        return self._exact_rows("gradients").rows(slice(None))

    def variance(self) -> Tensor:
        r"""Unbiased variance of a single example's gradient, entry by entry [n]: the diagonal of its covariance.

        (Σ p_i g_i² − ḡ²) / (1 − Σ p_i²) with p_i = w_i / Σ w and ḡ = Σ p_i g_i; for equal weights the sum of squares
        over N − 1. Differences below the rounding of Σ p_i g_i² are not resolved.

        Raises:
            ValueError: there is only one example.
        """
        total = float(self.weights.sum())
        variance = self.second_moment / total - (self.mean / total).square_()
        return variance.clamp_(min=0).div_(1 - self._concentration())

    def covariance_product(self, v: Tensor) -> Tensor:
        r"""Σ v for v [n] or [n, m], with Σ = Σ_i p_i (g_i − ḡ)(g_i − ḡ)ᵀ / (1 − Σ p_i²), whose diagonal is `variance`.

        Raises:
            ValueError: there is only one example, or the gradients were not kept whole; a `v` of another length.
        """
        rows = self._exact_rows("covariance_product")
        concentration = self._concentration()
        if v.ndim not in (1, 2) or len(v) != len(self.mean):
            raise ValueError(f"`v` has shape {list(v.shape)}; give [{len(self.mean)}] or [{len(self.mean)}, m]")
        p, mean = self.weights / self.weights.sum(), self.mean / float(self.weights.sum())
        products = []
        for column in v.to(mean).reshape(len(v), -1).unbind(1):
            along = rows.times(column)
            product = rows.combined(p * (along - float(p @ along)))
            products.append(product.to(mean.device) / (1 - concentration))
        return torch.stack(products, 1).reshape(v.shape)

    def inner_products(self) -> Tensor:
        """g_i · g_j [N, N] in float64, of this rank's examples; estimates where `sketched`, but for the diagonal.

        Raises:
            ValueError: with collect="sums".
        """
        kept = self._kept("inner_products")
        found = kept.rows.inner_products(slice(None), slice(None))
        found.diagonal().copy_(kept.norms.square())
        return found

    @overload
    def snr(  # pyright: ignore[reportOverlappingOverload]
        self, by: Literal["element"], definition: Definition = ...
    ) -> Tensor: ...
    @overload
    def snr(self, by: Literal["whole"] = ..., definition: Definition = ..., *, eps: float = ...) -> float: ...
    @overload
    def snr(
        self,
        by: Blocks | Partition,
        definition: Definition = ...,
        *,
        dims: Sequence[int] | None = ...,
        eps: float = ...,
    ) -> dict[str, float]: ...

    def snr(
        self,
        by: Any = "whole",
        definition: Definition = "ratio",
        *,
        dims: Sequence[int] | None = None,
        eps: float = 1e-8,
    ) -> Tensor | dict[str, float] | float:
        r"""Signal-to-noise ratio of the gradient, in the definitions that are in use.

        ===============  ===============================================================================================
        `definition`     ratio of a block
        ===============  ===============================================================================================
        "ratio"          Σ_j ḡ_j² / Σ_j Var g_j over its entries: the inverse of the noise scale, up to the bias of ḡ²
        "mean"           the mean over its entries of ḡ_j² / Var g_j, without those that no example moves; NaN of none
        "spatial"        ‖ḡ‖ / (std(ḡ) + eps) over its entries, the g-SNR of SGD-SaI; about √size where the mean is 0
        "second_moment"  SNR_K(v) of v = Σ w_i g_i² along the axes K = `dims` (None: all), by="parameter" only; tensors
                         without these axes are left out. As in SlimAdam, see `derive_rules`
        ===============  ===============================================================================================

        "ratio" and "mean" compare examples, with the unbiased variance of a single one: for the mean of B independent
        examples they are B times as large. Where ḡ is 0 they are 0. A variance below the rounding of its second moment
        (relatively N/2 times the machine epsilon, between 8 and 512 epsilons) is not resolved: "ratio" is NaN there,
        with by="element" too, and "mean" leaves such entries out, whose ratios are the largest; NaN if all are such.
        "spatial" and "second_moment" compare entries of one tensor, and need no second example.

        Args:
            by: "element" [n], "whole", or blocks as in `partition`: "parameter", "layer", globs, a mapping, or a
                Partition, such as partition(objective, "head").
            definition: As above.
            dims: K of "second_moment".
            eps: Of "spatial", at least 0.

        Raises:
            ValueError: an option that does not exist or does not go with another; one example where two are needed.

        Source: Liu et al., Understanding Why Neural Networks Generalize Well Through GSNR of Parameters, 2020,
        definition 1 ("mean": its average over parameters); Xu et al., No More Adam, 2024; Kalra et al., When Can You
        Get Away with Low Memory Adam?, 2025.
        """
        return signal_to_noise(self, by, definition, dims, eps)

    def noise_scale(self, curvature: Any = None, *, confidence: float = 0.95) -> NoiseScale:
        r"""Gradient noise scale tr Σ / |G|², in examples: the batch size at which noise and signal are equal.

        Σ is the covariance of single examples' gradients, G the true gradient; both are estimated without bias,
        |G|² = ‖ḡ‖² − Σ_i p_i² tr Σ. Infinite where that is not positive: there are too few examples to tell the
        gradient from 0. tr Σ is at least 0: gradients that are alike up to rounding give 0 or little more. Standard
        error (the jackknife's over examples) and interval (Fieller's, which stays right where |G|² is hardly told from
        0, and never narrower than rounding) need collect="all"; without it they are NaN.

        Args:
            curvature: An operator H with `H @ V`, such as a Hessian or GGN: then tr HΣ / GᵀHG, the critical batch size
                at which a step is half as good as one of the full gradient, to second order. Takes N + 1 products.
                An indefinite H may make it negative.
            confidence: Of the interval.

        Raises:
            ValueError: there is only one example; with `curvature`, gradients that were not kept whole or lie on
                several ranks.

        Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, equations 2.8, 2.9, appendix A.1.
        """
        self._concentration()
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` is {confidence}; give a probability between 0 and 1, such as 0.95")
        mean, eps = self.mean.double() / float(self.weights.sum()), torch.finfo(self.mean.dtype).eps
        if curvature is None:
            squares = self.norms.double().cpu().square()
            return noise_scale_of(self.weights, squares, float(mean @ mean), self.along, confidence, eps=eps)
        shape = getattr(curvature, "shape", None)
        if not hasattr(curvature, "__matmul__") or shape is None or list(shape) != [len(self.mean)] * 2:
            raise ValueError(
                f"`curvature` is {curvature!r}; give an operator [{len(self.mean)}, {len(self.mean)}] of the same "
                "parameters, such as Hessian(objective)"
            )
        rows = self._exact_rows("noise_scale(curvature=...)")
        if rows.num_examples != self.num_examples:
            raise ValueError("`curvature` needs the gradients of all examples on this rank; they lie on several")
        H_mean = (curvature @ self.mean).double() / float(self.weights.sum())
        squares = torch.cat([(V.double() * (curvature @ V).double()).sum(0).cpu() for V in self._columns(rows)])
        along = rows.times(H_mean)
        return noise_scale_of(self.weights, squares, float(mean @ H_mean), along, confidence, eps=eps, definite=False)

    def alignment(self) -> Alignment:
        """How far the examples' gradients agree: mean pairwise cosine, diversity, confusion, share of opposed pairs.

        Of this rank's examples. Exact where the pass kept all that inner products need; else estimates, whose errors
        the result states.

        Raises:
            ValueError: with collect="sums"; fewer than two gradients that are not zero.
        """
        kept = self._kept("alignment")
        self._concentration()
        mean = self.mean.double() / float(self.weights.sum())
        length = float(mean @ mean) if kept.rows.num_examples == self.num_examples else None
        return alignment_of(kept.rows, kept.norms, kept.weights, length)

    def tail_index(self, *, columns: int = SAMPLED_COLUMNS, **options: Any) -> GradientTails:
        r"""Tail index α of the gradient noise g_i − ḡ, with intervals: of each parameter, and of all together.

        Of at most `columns` entries of each parameter, drawn at random when the pass was made; each entry is a column
        of its own, so that scales that differ among entries do not look like heavy tails. This rank's examples.

        A value below 2 is no proof of heavy tails. Units that are off leave many gradients at 0, and log moments take
        this crowd for the middle of a heavy-tailed law: a small ReLU network on 10000 Gaussian inputs, whose gradients
        have all moments, reads 1.1 to 1.7 with sums of 10 to 1000 terms, the same network with tanh 1.9. See whether
        the value rises with `size`, and what method="hill" says of the extremes.

        Args:
            columns: Entries of each parameter.
            options: As for `tail_index` of samples: method, size, confidence, shuffles, seed.

        Raises:
            ValueError: with collect="sums", or fewer than 16 examples.

        Source: Şimşekli, Sagun, Gürbüzbalaban, A Tail-Index Analysis of Stochastic Gradient Noise in Deep Neural
        Networks, 2019; there all entries are one sample, here each has its own scale.
        """
        return gradient_tails(self._kept("tail_index").rows, self.layout, columns, options)

    def _columns(self, rows: GradientRows) -> Iterator[Tensor]:
        """The gradients as columns [n, m], a few at a time."""
        step = max(1, FORMED_ENTRIES // len(self.mean))
        for first in range(0, rows.num_examples, step):
            yield rows.rows(slice(first, first + step)).mT.contiguous()

    def _kept(self, what: str) -> KeptExamples:
        if self.kept is None:
            raise ValueError(f"`{what}` needs the examples' gradients, which collect='sums' leaves out; collect='all'")
        return self.kept

    def _exact_rows(self, what: str) -> GradientRows:
        rows = self._kept(what).rows
        if not rows.exact:
            raise ValueError(
                f"`{what}` needs the gradients themselves, which did not fit and were sketched: keeping them takes "
                f"{rows.needed_bytes} bytes; raise `memory_budget`"
            )
        return rows

    def _concentration(self) -> float:
        """Σ p_i²."""
        if self.num_examples < 2:
            raise ValueError("the scatter of gradients needs at least two examples; there is one")
        return float((self.weights / self.weights.sum()).square().sum())
