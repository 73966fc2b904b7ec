"""Square roots of the Hessian of a criterion by the prediction: R with R Rᵀ = ∇²_z ℓ, for a single example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .loss_hessians import by_double_backward, label_mass, loss_hessian, recognised

# Outputs of one example up to which the Hessian of an unknown criterion is written out.
DENSE_OUTPUTS = 4096
# Share of the largest eigenvalue that rounding may make negative.
NEGATIVE = 1e-6


@dataclass(frozen=True)
class LossRoot:
    """R [m, width] of one example with m outputs, by its products R Ω for Ω [width, s]."""

    width: int
    times: Callable[[Tensor], Tensor]


def loss_root(criterion: Any, prediction: Tensor, targets: Any) -> LossRoot:
    r"""R with R Rᵀ = ∇²_z ℓ for the mean loss ℓ of one example.

    Squared error and binary cross-entropy: diagonal. Cross-entropy: √m (diag(√p) − p √pᵀ) for each row of logits with
    its mass m, whose square is m (diag(p) − p pᵀ) since Σ p = 1. Other criteria: the eigenvectors of the matrix.

    Args:
        prediction: z of the example, any shape that the criterion takes; outputs are counted in its order.

    Raises:
        ValueError: the criterion is not convex in the prediction here, or unknown with too many outputs.

    Source: Dangel, Kunstner and Hennig, BackPACK, 2020.
    """
    z = prediction.detach()
    found = recognised(criterion)
    metric = loss_hessian(criterion, z, targets, 1 << 40)
    if metric is not None and found is not None:
        kind, options = found
        if kind is not nn.CrossEntropyLoss:
            slope = metric(torch.ones_like(z)).reshape(-1, 1)
            _refuse_negative(float(slope.min()), float(slope.abs().max()))
            return LossRoot(z.numel(), lambda columns: slope.clamp(min=0.0).sqrt() * columns)
        mass = label_mass(z, targets, options)
        assert mass is not None
        return LossRoot(z.numel(), _categorical(z, mass))
    if z.numel() > DENSE_OUTPUTS:
        raise ValueError(
            f"the Hessian of this criterion is not known in closed form and has {z.numel()} rows for an example; use "
            "cross-entropy, squared error or binary cross-entropy as torch defines them"
        )
    return _written_out(metric or by_double_backward(criterion, z, targets), z)


def _categorical(z: Tensor, mass: Tensor) -> Callable[[Tensor], Tensor]:
    axis = 1 if z.ndim > 1 else 0
    kind = torch.promote_types(z.dtype, torch.float32)
    p = torch.softmax(z.to(kind), axis).unsqueeze(-1)
    root, mass = p.sqrt(), mass.to(kind).unsqueeze(axis).unsqueeze(-1).sqrt()

    def times(columns: Tensor) -> Tensor:
        shaped = columns.to(kind).reshape(*z.shape, -1)
        product = mass * (root * shaped - p * (root * shaped).sum(axis, keepdim=True))
        return product.reshape(z.numel(), -1).to(columns.dtype)

    return times


def _written_out(metric: Callable[[Tensor], Tensor], z: Tensor) -> LossRoot:
    rows = [metric(e.reshape(z.shape)).reshape(-1) for e in torch.eye(z.numel(), dtype=z.dtype, device=z.device)]
    matrix = torch.stack(rows).double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    _refuse_negative(float(values[0]), float(values.abs().max()))
    root = (vectors * values.clamp(min=0.0).sqrt()).to(z.dtype)
    return LossRoot(z.numel(), lambda columns: root @ columns)


def _refuse_negative(smallest: float, scale: float) -> None:
    if not smallest >= -NEGATIVE * scale:
        raise ValueError(
            f"the criterion is not convex in the prediction: its Hessian has the eigenvalue {smallest:.3g}, so that "
            "Gauss-Newton matrices are not positive; use factor='hessian_psd'"
        )
