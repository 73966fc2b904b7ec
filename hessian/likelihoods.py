"""Criteria read as negative log-likelihoods: their Fisher information in prediction space, exact or sampled."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..landscape.evaluation import Chunk
from .loss_hessians import Metric, bernoulli, categorical


def likelihood_of(criterion: Any) -> str:
    """ "categorical", "gaussian" or "bernoulli".

    Raises:
        ValueError: the criterion is none of those that are negative log-likelihoods.
    """
    if getattr(criterion, "label_smoothing", 0.0):
        raise ValueError(
            "`criterion` smooths its labels and is no likelihood of them; use Fisher(kind='empirical') or GGN"
        )
    if isinstance(criterion, nn.CrossEntropyLoss) or criterion is F.cross_entropy:
        return "categorical"
    if isinstance(criterion, nn.MSELoss) or criterion is F.mse_loss:
        return "gaussian"
    if isinstance(criterion, nn.BCEWithLogitsLoss) or criterion is F.binary_cross_entropy_with_logits:
        if getattr(criterion, "weight", None) is not None or getattr(criterion, "pos_weight", None) is not None:
            raise ValueError("`criterion` has weights; Fisher knows BCEWithLogitsLoss without: use GGN")
        return "bernoulli"
    name = type(criterion).__name__ if isinstance(criterion, nn.Module) else getattr(criterion, "__name__", criterion)
    raise ValueError(
        f"`criterion` {name} is not known as a negative log-likelihood; Fisher knows CrossEntropyLoss, MSELoss and "
        "BCEWithLogitsLoss: use Fisher(kind='empirical') or GGN for others"
    )


def _row_weights(criterion: Any, targets: Tensor) -> Tensor:
    """Share of every label in the mean (or sum) of cross-entropy, shaped like the labels."""
    if targets.is_floating_point():
        raise ValueError(
            "the targets are class probabilities; Fisher's label distribution is the model's: pass class indices, "
            "or use GGN"
        )
    weights = (targets != getattr(criterion, "ignore_index", -100)).double()
    by_class = getattr(criterion, "weight", None)
    if by_class is not None:
        weights = weights * by_class.double()[torch.where(weights > 0, targets, 0)]
    return weights if getattr(criterion, "reduction", "mean") == "sum" else weights / weights.sum()


def _element_share(criterion: Any, prediction: Tensor) -> float:
    return 1.0 if getattr(criterion, "reduction", "mean") == "sum" else 1.0 / prediction.numel()


def exact_metric(likelihood: str, criterion: Any, prediction: Tensor, targets: Any, memory_budget: int) -> Metric:
    """w -> E_{y~p}[∂ℓ/∂z ∂ℓ/∂zᵀ] w, per prediction and weighted as in the loss of the chunk."""
    if likelihood == "categorical":
        return categorical(prediction, _row_weights(criterion, targets), memory_budget)
    share = _element_share(criterion, prediction)
    # ℓ = share · |z − y|² is −log N(y; z, 1/(2 share)) up to a constant, whose Fisher information is 2 share.
    return (lambda w: 2 * share * w) if likelihood == "gaussian" else bernoulli(prediction, share)


def sampled_metric(
    likelihood: str, criterion: Any, prediction: Tensor, targets: Any, chunk: Chunk, num_samples: int, seed: int
) -> Metric:
    """The mean over samples y~p of s sᵀ with s = ∂ℓ/∂z at label y, one rank per prediction and sample.

    Labels are drawn for the whole batch and cut to the chunk, so that chunking does not change them.
    """
    factors = []
    for sample in range(num_samples):
        key = hashlib.sha256(repr((seed, chunk.number, sample)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        factors.append(_score(likelihood, criterion, prediction, targets, chunk, generator))
    axis = 1 if likelihood == "categorical" and prediction.ndim > 1 else None

    def inner(s: Tensor, w: Tensor) -> Tensor:
        if axis is not None:
            return (s * w).sum(axis, keepdim=True)
        if prediction.ndim == 0:
            return s * w
        return (s * w).reshape(prediction.shape[0], -1).sum(1).reshape(-1, *[1] * (prediction.ndim - 1))

    return lambda w: sum((s * inner(s, w) for s in factors), torch.zeros_like(w)) / num_samples


def _score(
    likelihood: str, criterion: Any, prediction: Tensor, targets: Any, chunk: Chunk, generator: torch.Generator
) -> Tensor:
    """∂ℓ/∂z at a sampled label, scaled so that the mean of s sᵀ is the exact metric."""

    def draw(shape: torch.Size, kind) -> Tensor:
        if not shape or shape[0] % chunk.size:  # rows that are no examples, after masking for example
            return kind(shape, generator=generator, dtype=torch.float64).to(prediction.device, prediction.dtype)
        per_example = shape[0] // chunk.size
        whole = kind((chunk.batch_size * per_example, *shape[1:]), generator=generator, dtype=torch.float64)
        part = whole[chunk.first * per_example : (chunk.first + chunk.size) * per_example]
        return part.to(prediction.device, prediction.dtype)

    if likelihood == "gaussian":
        return draw(prediction.shape, torch.randn) * (2 * _element_share(criterion, prediction)) ** 0.5
    if likelihood == "bernoulli":
        p = prediction.sigmoid()
        return (p - (draw(p.shape, torch.rand) < p).to(p.dtype)) * _element_share(criterion, prediction) ** 0.5
    axis = 1 if prediction.ndim > 1 else 0
    p = prediction.softmax(axis)
    rows = _row_weights(criterion, targets).to(p.dtype)
    uniform = draw(rows.shape, torch.rand).unsqueeze(axis)
    label = (p.cumsum(axis) < uniform).sum(axis, keepdim=True).clamp(max=p.shape[axis] - 1)
    return (p - torch.zeros_like(p).scatter_(axis, label, 1.0)) * rows.sqrt().unsqueeze(axis)
