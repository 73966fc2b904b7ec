"""Generalised Gauss-Newton, Fisher information and the covariance of gradients."""

from __future__ import annotations

from torch import Tensor

from ..landscape.evaluation import Chunk
from ..landscape.objective import Objective
from ..landscape.selection import near_names
from .factors import Factor, FactorOperator
from .likelihoods import exact_metric, likelihood_of, sampled_metric
from .loss_hessians import by_double_backward, loss_hessian

FISHER_KINDS = ("exact", "monte-carlo", "empirical")


def _require_predictions(objective: Objective, name: str) -> None:
    if isinstance(objective, Objective) and objective.criterion is None:
        raise ValueError(
            f"{name} needs the prediction apart from the loss; make the objective with "
            "Objective.supervised(model, criterion, data)"
        )


class GGN(FactorOperator):
    r"""Generalised Gauss-Newton matrix Σ_b w_b J_bᵀ (∇²_z ℓ) J_b of a supervised objective [n, n].

    J is the Jacobian of the prediction z, ∇²_z ℓ the Hessian of the criterion by it. Positive semidefinite when the
    criterion is convex in the prediction; equal to the Hessian where the prediction is linear in the weights.

    Raises:
        ValueError: the objective does not separate prediction and criterion.

    Source: Schraudolph, Fast Curvature Matrix-Vector Products, 2002, equation 3.
    """

    def __init__(self, objective: Objective) -> None:
        _require_predictions(objective, "GGN")
        super().__init__(objective, predicts=True)

    def factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        prediction, targets = self.objective.prediction(chunk)
        criterion = self.objective.criterion
        assert criterion is not None
        metric = loss_hessian(criterion, prediction, targets, self.objective.memory_budget)
        if metric is None:
            metric = by_double_backward(criterion, prediction, targets)
        return Factor(chunk, chunk.weight, theta, prediction, metric)


class Fisher(FactorOperator):
    r"""Fisher information matrix of a supervised objective [n, n].

    kind="exact": Σ w E_{y~p(y|z)}[∇ℓ ∇ℓᵀ] in closed form, for cross-entropy, mean-squared and binary cross-entropy
    criteria, read as negative log-likelihoods (squared error: a Gaussian whose variance makes the loss its negative
    log-likelihood). kind="monte-carlo": the same with `num_samples` labels drawn per prediction, fixed by `seed`, so
    that the operator is one matrix. kind="empirical": Σ_i w_i ∇ℓ_i ∇ℓ_iᵀ with the data's own labels, any criterion.

    Raises:
        ValueError: unknown kind; no prediction; a criterion that is no likelihood (exact and monte-carlo).

    Source: Martens, New Insights and Perspectives on the Natural Gradient Method, 2020, sections 5, 9 and 11;
    Kunstner et al., Limitations of the Empirical Fisher Approximation, 2019.
    """

    def __init__(self, objective: Objective, kind: str = "exact", *, num_samples: int = 1, seed: int = 0) -> None:
        if kind not in FISHER_KINDS:
            raise ValueError(
                f"`kind` is {kind!r}; choose among {FISHER_KINDS} (near: {near_names(str(kind), FISHER_KINDS)})"
            )
        if num_samples < 1:
            raise ValueError(f"`num_samples` is {num_samples}; draw at least one label per prediction")
        if kind != "empirical":
            _require_predictions(objective, f"Fisher(kind={kind!r})")
        super().__init__(objective, predicts=kind != "empirical")
        self.kind = kind
        self._likelihood = None if kind == "empirical" else likelihood_of(objective.criterion)
        self._num_samples, self._seed = num_samples, seed

    def factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        if self._likelihood is None:
            return _example_factor(self.objective, chunk, theta)
        prediction, targets = self.objective.prediction(chunk)
        at = prediction.detach()
        if self.kind == "exact":
            budget = self.objective.memory_budget
            metric = exact_metric(self._likelihood, self.objective.criterion, at, targets, budget)
        else:
            metric = sampled_metric(
                self._likelihood, self.objective.criterion, at, targets, chunk, self._num_samples, self._seed
            )
        return Factor(chunk, chunk.weight, theta, prediction, metric)


class GradientCovariance(FactorOperator):
    r"""Covariance of per-example gradients Σ_i w_i (g_i − ḡ)(g_i − ḡ)ᵀ with ḡ = Σ_i w_i g_i / Σ_i w_i [n, n].

    The noise of a stochastic gradient of batch size 1. Uncentred, it is the empirical Fisher matrix.

    Source: Jastrzębski et al., Three Factors Influencing Minima in SGD, 2017, section 2.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective, predicts=False)
        self._mean: Tensor | None = None

    def factor(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
        return _example_factor(self.objective, chunk, theta)

    def weights_changed(self) -> None:
        self._mean = None

    def matmat(self, V: Tensor) -> Tensor:
        product = super().matmat(V)
        if self._mean is None:
            self._mean = self.objective.gradient()
        mean = self._mean.double()
        share = 1.0 / self.objective.total_weight
        return product - (share * mean.unsqueeze(1) * (mean @ V.double())).to(V.dtype)


def _example_factor(objective: Objective, chunk: Chunk, theta: tuple[Tensor, ...]) -> Factor:
    """The examples' losses as outputs, their weights as a diagonal metric."""
    losses, weights = objective.example_losses(chunk, theta)
    return Factor(chunk, 1.0, theta, losses, lambda w: weights * w)
