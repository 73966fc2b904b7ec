"""torch.optim.Muon: a momentum whose singular values are brought near 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ...hessian.preconditioned import Root
from .base import missing_gradient
from .torch_geometry import NoPreconditionerError, TorchGeometry, working_dtype


class OneSidedRoot(Root):
    """X ↦ S X for X [A, B] and a symmetric S [A, A], or X ↦ X S for S [B, B], on flattened X.

    Args:
        S: The matrix.
        shape: [A, B].
        left: Which side S stands on.
    """

    def __init__(self, S: Tensor, shape: torch.Size, *, left: bool) -> None:
        self._S, self._shape, self._left = S, shape, left

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self._shape.numel(), self._shape.numel()))

    def apply(self, V: Tensor) -> Tensor:
        X = V.reshape(*self._shape, -1)
        S = self._S.to(V.device, V.dtype)
        return torch.einsum("ij,jbm->ibm" if self._left else "ji,bjm->bim", S, X).reshape(V.shape)

    def transposed(self, V: Tensor) -> Tensor:
        return self.apply(V)


class MuonGeometry(TorchGeometry):
    """P⁻¹ = s q(U Uᵀ) on the shorter side of the momentum U [A, B], where q(σ²) σ is what the Newton-Schulz iteration
    makes of a singular value σ and s the adjustment of the learning rate to the shape.

    In exact arithmetic, where torch computes in bfloat16. Nesterov's U = (1 − μ) g + μ m contains the gradient, so that
    P of the last step is known without it only.

    No threshold: the step keeps its length however small the momentum gets, as those of sign methods do, so that there
    is no quadratic on which it settles.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024, in the form of
    torch.optim.Muon.
    """

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root | None:
        group = self.group_of(p)
        U = self._momentum(p, gradient)
        left = U.shape[0] <= U.shape[1]
        squares, Q = torch.linalg.eigh(U @ U.mT if left else U.mT @ U)
        length = U.norm().clamp(min=float(group["eps"]))
        x = squares.clamp(min=0).sqrt() / length  # singular values on the way
        gain = torch.ones_like(x) / length
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            factor = a + b * x.square() + c * x.pow(4)
            x, gain = x * factor, gain * factor
        if not bool((gain > 0).all()):
            return None  # other coefficients: the iteration turns some direction round
        S = (Q * (gain * _adjustment(group["adjust_lr_fn"], p.shape)).sqrt()) @ Q.mT
        return OneSidedRoot(S, p.shape, left=left)

    def coupled_weight_decay(self, group: dict) -> float:
        return 0.0

    def _momentum(self, p: Tensor, gradient: Tensor | None) -> Tensor:
        group, state = self.group_of(p), self.state_of(p)
        momentum = float(group["momentum"])
        buffer = state.get("momentum_buffer")
        if gradient is None:
            if buffer is None:
                raise missing_gradient(self.optimizer)
            if group["nesterov"]:
                raise NoPreconditionerError(
                    "Muon's preconditioner of the last step depends on the gradient it had, for nesterov=True: pass "
                    "`gradient`, that of the next step"
                )
            return buffer.to(working_dtype(p, None))
        g = self.seen(p, gradient)
        buffer = torch.lerp(torch.zeros_like(g) if buffer is None else buffer.to(g.dtype), g, 1 - momentum)
        return torch.lerp(g, buffer, momentum) if group["nesterov"] else buffer


def _adjustment(rule: str | None, shape: torch.Size) -> float:
    A, B = shape
    return 0.2 * max(A, B) ** 0.5 if rule == "match_rms_adamw" else max(1.0, A / B) ** 0.5
