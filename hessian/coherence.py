"""Coherence of the examples' Hessians, and the learning rates at which stochastic gradient descent diverges."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..landscape.objective import Objective
from ..landscape.selection import near_names
from .batch_moments import BatchMoments
from .example_factors import ExampleGram, gauss_newton_gram, rounding_of_factors
from .example_hessians import positive_hessian_factors
from .mean_square import MeanSquareStability

FACTORS = ("ggn", "hessian_psd")
OUTPUTS = ("all", "sketch")
METHODS = ("auto", "vmap", "loop")


@dataclass(frozen=True)
class StabilityThresholds:
    """Learning rates beyond which plain SGD with batches of size B diverges from the optimum in the mean square.

    exact ≤ condition_d ≤ theorem1 ≤ gradient_descent. The first is necessary and sufficient; the others are sufficient.

    Attributes:
        theorem1: From the coherence σ and λ_1(H) alone. condition_d: From max_i λ_1(H_i).
        exact: Radius of the map on second moments is 1 there; `MeanSquareStability.threshold`.
        gradient_descent: 2 / λ_1(H), that of the full batch.
        batch_size, sampling: As asked.
    """

    theorem1: float
    condition_d: float
    exact: float
    gradient_descent: float
    batch_size: float
    sampling: str


@dataclass(frozen=True)
class Coherence:
    r"""How much the Hessians H_i of the examples' losses share directions, at one point.

    L = (1/n) Σ_i ℓ_i with H = (1/n) Σ_i H_i. Where the examples have unequal weights w_i in the objective (ignored
    labels, class weights, sums), ℓ_i stands for n w_i times the example's loss.

    The theory is that of an optimum at which every ∇ℓ_i is zero: look at `gradient_norms`. With more than one output
    S_ii = ‖H_i‖_F exceeds λ_1(H_i), which can raise σ beyond n, up to n √r for Hessians of rank r. σ alone is no
    stability: a larger one allows a larger λ_1(H). Thresholds say more.

    Attributes:
        S: S_ij = √tr(H_i H_j) [n, n], in float64, on the CPU. lambda1_S: Its largest eigenvalue.
        sigma: λ_1(S) / max_i λ_1(H_i); NaN where every H_i is zero. 1 for Hessians on orthogonal directions.
        example_lambda1: λ_1(H_i) [n]. max_lambda1: The largest of them.
        lambda1: λ_1(H). trace: tr H.
        gradient_norms: ‖∇ℓ_i‖ [n].
        stability: Radius and thresholds in the mean square, with momentum and SAM too.
        factor, outputs: As asked; "all" also where a sketch was asked for and examples have no more outputs.
        cut: ‖H_i⁻‖_F / ‖H_i‖_F [n] of the negative parts that factor="hessian_psd" leaves out; zeros for "ggn".
        method: How the factors were made: "vmap", "loop", or "given".
        seconds: Time taken.

    Source: Dexter et al., A Precise Characterization of SGD Stability Using Loss Surface Geometry, 2024.
    """

    S: Tensor
    sigma: float
    lambda1_S: float
    example_lambda1: Tensor
    lambda1: float
    trace: float
    gradient_norms: Tensor
    stability: MeanSquareStability = field(repr=False)
    factor: str
    outputs: str
    cut: Tensor
    method: str
    seconds: float

    @property
    def num_examples(self) -> int:
        return len(self.S)

    @property
    def max_lambda1(self) -> float:
        return float(self.example_lambda1.max())

    @classmethod
    def from_factors(cls, factors: Tensor, gradient_norms: Tensor | None = None) -> Coherence:
        """From F_i [n, k, r] in any orthonormal coordinates, H_i = F_i F_iᵀ.

        Raises:
            ValueError: `factors` is not [n, k, r] with finite numbers.
        """
        began = time.perf_counter()
        MeanSquareStability.check(factors)
        n, k, r = factors.shape
        norms = torch.zeros(n) if gradient_norms is None else gradient_norms
        if norms.shape != (n,):
            raise ValueError(f"`gradient_norms` is {list(norms.shape)}; give one for each of the {n} examples")
        rounding = max(k * torch.finfo(torch.float64).eps, rounding_of_factors(torch.finfo(factors.dtype).eps, n * r))
        found = ExampleGram(None, factors.double(), norms.double(), rounding, "given")
        return _coherence(found, "given", "all", torch.zeros(len(factors), dtype=torch.float64), began)

    def thresholds(self, batch_size: float, sampling: str = "bernoulli") -> StabilityThresholds:
        r"""Where plain SGD becomes unstable.

        With independent draws ("bernoulli"), divergence is certain beyond η = 2/λ_1(H); beyond
        η = (n/B − 1)^(−1/2) σ / λ_1(H) (theorem 1); and, what that follows from, beyond
        η = (n/B − 1)^(−1/2) n / max_i λ_1(H_i) (condition D). Without replacement the same steps give, with
        s = B (n − 1)² / (n − B), the factor (1 + √(1 + s)) / n in the place of (n/B − 1)^(−1/2). Each threshold is the
        least of those before it in this order.

        Args:
            batch_size: B, in (0, n].
            sampling: "bernoulli" or "without_replacement", as for `BatchMoments`.

        Raises:
            ValueError: unknown sampling, or a batch size out of its range.

        Source: Dexter et al., 2024, theorem 1; without replacement, and condition D: derived here.
        """
        noise = BatchMoments.of(self.num_examples, batch_size, sampling)
        if self.lambda1 == 0.0:
            return StabilityThresholds(math.inf, math.inf, math.inf, math.inf, batch_size, sampling)
        descent = 2 / self.lambda1
        if noise.own == 0.0:
            return StabilityThresholds(descent, descent, descent, descent, batch_size, sampling)
        n = self.num_examples
        bound = 1 / (n * noise.own**0.5)
        if sampling == "without_replacement":
            bound = (1 + math.sqrt(1 + batch_size * (n - 1) ** 2 / (n - batch_size))) / n
        theorem1 = min(descent, bound * self.sigma / self.lambda1)
        condition = min(theorem1, bound * n / self.max_lambda1)
        exact = self.stability.threshold(batch_size, sampling=sampling)
        return StabilityThresholds(theorem1, condition, exact, descent, batch_size, sampling)

    def __str__(self) -> str:
        return (
            f"σ {self.sigma:.4g}, λ₁(S) {self.lambda1_S:.4g}, max λ₁(H_i) {self.max_lambda1:.4g}, λ₁(H) "
            f"{self.lambda1:.4g}, largest gradient of an example {float(self.gradient_norms.max()):.2g} "
            f"({self.num_examples} examples, {self.factor}, {self.outputs} outputs)"
        )


def coherence(
    objective: Objective,
    *,
    factor: str = "ggn",
    outputs: str = "all",
    num_columns: int = 8,
    seed: int = 0,
    memory_budget: int | None = None,
    method: str = "auto",
) -> Coherence:
    r"""Coherence of the examples' Hessians at the model's weights, and what it says of SGD.

    factor="ggn": H_i is the Gauss-Newton matrix J_iᵀ (∇²_z ℓ_i) J_i of an example, positive whatever the weights, and
    equal to its Hessian where the example is fitted by a convex loss; one backward pass per example and output.
    "hessian_psd": the positive part of the true Hessian of each example, written out, so for small models; `cut` says
    how much is negative, and λ_1(H) is that of the mean of the positive parts.

    outputs="sketch" puts `num_columns` random combinations of the outputs in their place. tr(H_i H_j) is then estimated
    without bias for i ≠ j; S_ii, λ_1(H_i) and λ_1(H) come out too large and every threshold too small, by a share of
    the order of (outputs that matter) / num_columns; σ is off either way. `outputs` of the result says so. Of use to
    compare points or examples where each has hundreds of outputs.

    Everything after the inner products of the factors is independent of the number of parameters. Directions in which
    the mean Hessian is not told from rounding are left out, for float32 those below about 1e-13 n r of the largest for
    r outputs; this decides radii close to 1 (how slowly what is stable decays), not thresholds.

    Args:
        objective: For "ggn" of the supervised form. A few hundred examples are enough and affordable.
        factor: "ggn" or "hessian_psd".
        outputs: "all" or "sketch", for "ggn".
        num_columns: Of a sketch.
        seed: Of the sketch.
        memory_budget: Bytes for factors and their inner products; None takes the objective's. Thresholds then take
            some matrices of the rank of the inner products more, and a Lanczos basis of up to 2 GiB.
        method: "auto", "vmap" or "loop" over examples.

    Raises:
        ValueError: unknown factor, outputs or method; no separate prediction; a criterion that is not convex in the
            prediction; batch statistics; a loss that is not the mean of its examples' losses.
        InsufficientMemory: the budget does not hold four examples, or the inner products.

    Source: Dexter et al., A Precise Characterization of SGD Stability Using Loss Surface Geometry, 2024; factors:
    Schraudolph, 2002, and Dangel, Kunstner and Hennig, BackPACK, 2020.
    """
    began = time.perf_counter()
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
    _check_choice("factor", factor, FACTORS)
    _check_choice("outputs", outputs, OUTPUTS)
    _check_choice("method", method, METHODS)
    if not (isinstance(num_columns, int) and num_columns > 0):
        raise ValueError(f"`num_columns` is {num_columns!r}; a sketch has one column or more")
    budget = objective.memory_budget if memory_budget is None else memory_budget
    if factor == "hessian_psd":
        if outputs == "sketch":
            raise ValueError("`outputs` is 'sketch', which true Hessians do not have; use factor='ggn'")
        found, cut = positive_hessian_factors(objective, memory_budget=budget, method=method)
        return _coherence(found, factor, "all", cut, began)
    if objective.criterion is None:
        raise ValueError(
            "Gauss-Newton factors need the prediction apart from the loss; make the objective with "
            "Objective.supervised(model, criterion, data, predict=..., split=...), or for a small model use "
            "factor='hessian_psd', which writes out a matrix [parameters, parameters] for each example"
        )
    columns = num_columns if outputs == "sketch" else None
    found = gauss_newton_gram(objective, num_columns=columns, seed=seed, memory_budget=budget, method=method)
    no_cut = torch.zeros(len(found.gradient_norms), dtype=torch.float64)
    return _coherence(found, factor, "sketch" if found.sketched else "all", no_cut, began)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose among {choices} (near: {near_names(str(value), choices)})")


def _coherence(found: ExampleGram, factor: str, outputs: str, cut: Tensor, began: float) -> Coherence:
    n = len(found.gradient_norms)
    if found.factors is not None:
        factors = found.factors.double()
        _, k, r = factors.shape
        own = torch.linalg.eigvalsh(factors.mT @ factors if r < k else factors @ factors.mT)
        squares = _products(factors)
        stability = MeanSquareStability(factors, rank_tol=found.rounding)
    else:
        assert found.gram is not None
        r = len(found.gram) // n
        blocks = found.gram.reshape(n, r, n, r)
        own = torch.linalg.eigvalsh(torch.stack([blocks[i, :, i] for i in range(n)]))
        squares = blocks.square().sum((1, 3))
        stability = MeanSquareStability.from_gram(found.gram, n, rank_tol=found.rounding)
    S = squares.clamp(min=0.0).sqrt()
    each = own[:, -1].clamp(min=0.0).cpu()
    lambda1_S, largest = float(torch.linalg.eigvalsh(S)[-1]), float(each.max())
    return Coherence(
        S=S.cpu(),
        sigma=lambda1_S / largest if largest > 0 else math.nan,
        lambda1_S=lambda1_S,
        example_lambda1=each,
        lambda1=stability.largest_eigenvalue,
        trace=float(own.clamp(min=0.0).sum()) / n,
        gradient_norms=found.gradient_norms,
        stability=stability,
        factor=factor,
        outputs=outputs,
        cut=cut,
        method=found.method,
        seconds=time.perf_counter() - began,
    )


def _products(factors: Tensor) -> Tensor:
    """tr(H_i H_j) = ‖F_iᵀ F_j‖_F² [n, n], through whichever is smaller of the H_i and all F_iᵀ F_j."""
    n, k, r = factors.shape
    if k * k <= n * r * r:
        hessians = (factors @ factors.mT).reshape(n, k * k)
        return hessians @ hessians.T
    flat = factors.mT.reshape(n * r, k)
    return torch.stack([(flat[i * r : (i + 1) * r] @ flat.T).reshape(r, n, r).square().sum((0, 2)) for i in range(n)])
