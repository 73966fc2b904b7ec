"""Hessians of common criteria by the prediction, in closed form: products without autograd and without the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Metric = Callable[[Tensor], Tensor]

# Entries of the prediction worked on at once: bounds temporary memory and stays within a core's cache.
PIECE = 1 << 18
# Share of the memory budget that softmax probabilities may take for as long as the metric is kept.
SHARE_FOR_PROBABILITIES = 1 / 16

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.CrossEntropyLoss: ("weight", "ignore_index", "label_smoothing", "reduction"),
    nn.MSELoss: ("reduction",),
    nn.BCEWithLogitsLoss: ("weight", "pos_weight", "reduction"),
}


def recognised(criterion: Any) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The kind of a criterion and its options, where it is exactly one whose Hessian is known here; else None.

    Known are nn.CrossEntropyLoss, nn.MSELoss and nn.BCEWithLogitsLoss, their functions, and `functools.partial` of
    these with keywords. Subclasses, modules with hooks or another `forward`, and wrapping functions are not.
    """
    keywords: dict[str, Any] = {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        criterion, keywords = criterion.func, dict(criterion.keywords)
    kind = type(criterion)
    if isinstance(criterion, nn.Module) and kind in _OPTIONS and not keywords:
        changed = "forward" in vars(criterion) or criterion._forward_hooks or criterion._forward_pre_hooks
        return None if changed else (kind, {name: getattr(criterion, name) for name in _OPTIONS[kind]})
    found = next((kind for function, kind in _FUNCTIONS.items() if criterion is function), None)
    if found is None or not set(keywords) <= set(_OPTIONS[found]):
        return None
    return found, keywords


def loss_hessian(criterion: Any, prediction: Tensor, targets: Any, memory_budget: int) -> Metric | None:
    """w -> (∂²ℓ/∂z²) w at a prediction z, or None where the closed form is not known.

    Args:
        criterion: Only what `recognised` accepts has a closed form.
        prediction: z, any shape that the criterion takes; the result holds on to it without its graph.
        memory_budget: In bytes; decides whether softmax probabilities are kept or made again for each product.
    """
    found = recognised(criterion)
    if found is None or not isinstance(targets, Tensor) or prediction.ndim == 0 or prediction.numel() == 0:
        return None
    kind, options = found
    prediction = prediction.detach()
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        return None
    if kind is nn.CrossEntropyLoss:
        mass = label_mass(prediction, targets, options)
        return None if mass is None else categorical(prediction, mass, memory_budget)
    if targets.shape != prediction.shape:  # broadcasting has its own count
        return None
    share = 1.0 if reduction == "sum" else 1.0 / prediction.numel()
    if kind is nn.MSELoss:
        return lambda w: (2 * share) * w
    weight, positive = options.get("weight"), options.get("pos_weight")
    scale = torch.tensor(share, dtype=torch.float64, device=prediction.device)
    if positive is not None:
        scale = scale * (1 + (positive - 1) * targets)
    if weight is not None:
        scale = scale * weight
    if torch.broadcast_shapes(scale.shape, prediction.shape) != prediction.shape:
        return None
    return bernoulli(prediction, scale)


def label_mass(prediction: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor | None:
    r"""What every row of logits weighs in cross-entropy: m_i = Σ_c q_ic w_c / D, shaped like the rows.

    The loss is −Σ_i Σ_c q_ic w_c log p_ic / D with labels q (smoothed by ε: (1 − ε) q + ε / C), class weights w and
    D = Σ_i w_{y_i} over the labels kept (class indices), the number of rows (probabilities), or 1 for a sum.
    None for targets of no known form.
    """
    axis = 1 if prediction.ndim > 1 else 0
    classes = prediction.shape[axis]
    rows = prediction.shape[:axis] + prediction.shape[axis + 1 :]
    smoothing = float(options.get("label_smoothing", 0.0))
    by_class = options.get("weight")
    w = torch.ones(classes, dtype=torch.float64, device=prediction.device) if by_class is None else by_class.double()
    mean = options.get("reduction", "mean") == "mean"
    if targets.is_floating_point():
        if targets.shape != prediction.shape:
            return None
        weighted = targets.to(w.dtype).movedim(axis, -1) @ w
        mass = (1 - smoothing) * weighted + smoothing * w.mean()
        return mass / max(1, rows.numel()) if mean else mass
    if targets.shape != rows:
        return None
    kept = targets != options.get("ignore_index", -100)
    of_label = torch.where(kept, w[torch.where(kept, targets, 0)], 0.0)
    mass = (1 - smoothing) * of_label + smoothing * w.mean() * kept
    return mass / of_label.sum() if mean else mass


def categorical(prediction: Tensor, mass: Tensor, memory_budget: int) -> Metric:
    r"""w -> m (diag(p) − p pᵀ) w for every row of logits, p = softmax(z) over axis 1 (axis 0 of a single row).

    Source: Böhning, Multinomial Logistic Regression Algorithm, 1992, equation 2.3.

    Args:
        prediction: z [rows, C, ...] or [C].
        mass: m of every row, [rows, ...] or a scalar tensor.
        memory_budget: Probabilities are kept where they take at most a sixteenth of it; otherwise the logarithms of
            their sums are, and temporary memory is that of `PIECE` entries.
    """
    single = prediction.ndim == 1
    first, classes = (1, prediction.shape[0]) if single else prediction.shape[:2]
    kind = torch.promote_types(prediction.dtype, torch.float32)
    z = prediction.reshape(first, classes, -1)
    m = mass.to(kind).reshape(first, 1, -1)
    inverse = torch.where(m != 0, 1 / m, 0.0)
    kept: Tensor | None = None  # m p
    normaliser: Tensor | None = None
    if z.numel() * kind.itemsize <= memory_budget * SHARE_FOR_PROBABILITIES:
        kept = torch.softmax(z, 1, dtype=kind).mul_(m)
    else:
        normaliser = torch.empty_like(m)
        for part in _pieces(z):
            normaliser[part] = z[part].to(kind).logsumexp(1, keepdim=True)

    def metric(w: Tensor) -> Tensor:
        result = torch.empty(z.shape, dtype=kind, device=w.device)
        vectors = w.reshape(z.shape)
        for part in _pieces(z):
            if kept is not None:
                p = kept[part]
            else:
                assert normaliser is not None
                p = (z[part] - normaliser[part]).exp_().mul_(m[part])
            product = torch.mul(p, vectors[part], out=result[part])
            product.addcmul_(p, product.sum(1, keepdim=True).mul_(inverse[part]), value=-1)
        return result.reshape(w.shape).to(w.dtype)

    return metric


def _pieces(z: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of z [rows, C, positions] of about `PIECE` entries, whole in C."""
    rows, classes, positions = z.shape
    columns = max(1, min(positions, PIECE // classes))
    step = max(1, PIECE // (classes * columns)) if columns == positions else 1
    for row in range(0, rows, step):
        for column in range(0, positions, columns):
            yield slice(row, row + step), slice(None), slice(column, column + columns)


def bernoulli(prediction: Tensor, scale: Tensor | float) -> Metric:
    """w -> scale · p (1 − p) w with p = sigmoid(z), entry by entry."""
    p = torch.sigmoid(prediction.to(torch.promote_types(prediction.dtype, torch.float32)))
    slope = (p * torch.sigmoid(-prediction.to(p.dtype)) * scale).to(prediction.dtype)
    return lambda w: slope * w


def by_double_backward(criterion: Callable[[Any, Any], Tensor], prediction: Tensor, targets: Any) -> Metric:
    """w -> (∂²ℓ/∂z²) w of any criterion, by double backward through the criterion alone."""
    leaf = prediction.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(leaf, targets), leaf, create_graph=True)

    def metric(w: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(w)
        (product,) = torch.autograd.grad(gradient, leaf, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(w) if product is None else product

    return metric
