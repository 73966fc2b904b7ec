"""Sharpness-aware minimization: the gradient is taken a step uphill from the weights that it changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ...kernels.accurate import norm
from .base import BaseOptimizer, Closure, Group, check_gradients, gradients, moment_dtype
from .closures import needs_closure
from .option_checks import check_flag, check_number
from .wrapper import Wrapper

TINY = 1e-12  # added to the norm, as in the authors' code


class SAM(Wrapper):
    r"""θ ← base step with the gradient at θ + ε, both gradients from the same minibatch.

    - normalised: ε = ρ g / (‖g‖ + 1e-12);
    - unnormalised: ε = ρ g;
    - adaptive (ASAM): ε = ρ θ² g / (‖|θ| g‖ + 1e-12), elementwise; unnormalised ε = ρ θ² g.

    The norm is one over the parameters of all groups, also of those that are not perturbed; |θ| g stands in it for
    the adaptive ones. Weight decay acts in the base step only. After the second gradient the weights are put back from
    a copy, bit for bit, which costs the memory of the parameters during a step and none between steps.

    With ρ = 0, or switched off, `step` is the base step bit for bit and evaluates the closure once. To run SAM late in
    training, make it with `enabled=False` and set `sam.enabled = True` at some step: momentum goes on.

    In a loop of one's own::

        loss(model).backward()
        sam.first_step(zero_grad=True)
        loss(model).backward()
        sam.second_step(zero_grad=True)

    With a GradScaler both losses are scaled; `scaler.step(sam)` takes the place of `second_step` and is followed by
    `sam.restore()`, which puts the weights back where the scaler skipped the step. `scaler.unscale_(sam)`, which can be
    called once a step, belongs between the second backward and `scaler.step`, as for clipping; called before
    `first_step`, it would leave the second gradient scaled. So the unnormalised ε does not go with a scaler.
    Where the first gradient overflows, θ + ε is NaN, so that the second does too and the scaler skips the step; `model`
    keeps that out of BatchNorm's running statistics.

    Args:
        base: Any optimizer that steps without a closure. Its groups may have their own `rho`, `adaptive`, `normalize`
            and `enabled`.
        rho: Radius ρ >= 0 of the perturbation, in units of the weights (of |g| where unnormalised).
        adaptive: Scale the perturbation by the weights.
        normalize: Divide by the norm of the gradient.
        model: Its running statistics (BatchNorm) are then those of the first forward pass; the second leaves them.
        enabled: Perturb at all.

    Raises:
        ValueError: `step` without a closure while there is something to perturb and `first_step` was not called.

    Source: Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently Improving Generalization,
    2021, equation 2 and algorithm 1; Kwon, Kim, Park, Choi, ASAM, 2021, with p = 2. ASAM's own code adds 0.01 to |θ|;
    here that is 0, as in Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training,
    2025. The unnormalised form: Andriushchenko, Flammarion, Towards Understanding Sharpness-Aware Minimization, 2022.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        normalize: bool = True,
        *,
        model: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"`model` is a {type(model).__name__}; give the nn.Module that is trained, or None")
        if isinstance(base, Optimizer) and needs_closure(base):
            raise ValueError(
                f"`base` is {type(base).__name__}, which evaluates the loss itself; SAM goes round optimizers whose "
                "step needs no closure"
            )
        super().__init__(base, {"rho": rho, "adaptive": adaptive, "normalize": normalize, "enabled": enabled})
        self.model = model
        self._origin: dict[Tensor, Tensor] | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def check_group(self, group: Group) -> None:
        check_number("rho", group["rho"], least=0)
        for flag in ("adaptive", "normalize", "enabled"):
            check_flag(flag, group[flag])

    @property
    def enabled(self) -> bool:
        """Whether any group is perturbed; setting it switches all of them."""
        return any(group["enabled"] for group in self.param_groups)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        check_flag("enabled", value)
        for group in self.param_groups:
            group["enabled"] = value

    @property
    def perturbs(self) -> bool:
        """Whether the next step needs a second gradient."""
        return any(_radius(group) > 0 for group in self.param_groups)

    @property
    def needs_closure(self) -> bool:
        """Whether a plain `step()` would lack the second gradient now."""
        return self.perturbs and self._origin is None

    @property
    def moves_along_gradients(self) -> bool:
        """Whether the base has P = 1: its steps are sums of gradients with fixed coefficients."""
        return _moves_along_gradients(self.base)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Clears the gradients, evaluates the loss, calls backward, returns the loss. It is called at θ and,
                where there is something to perturb, at θ + ε. None after `first_step`.

        Returns:
            The loss at θ, None without a closure.
        """
        if closure is None:
            if self.needs_closure:
                raise ValueError(
                    "SAM needs two gradients a step: pass `closure`, or call first_step(), backward() and second_step()"
                )
            self.restore()
            self.base.step()
            return None
        self._check_in_place()
        with torch.enable_grad():
            loss = closure()
        if self.perturbs:
            try:
                self.first_step()
                with torch.enable_grad():
                    closure()
            finally:
                self.restore()
        check_gradients(self)
        self.base.step()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """θ ← θ + ε with the gradients at hand; with `zero_grad` these are cleared."""
        self._check_in_place()
        check_gradients(self)
        self._origin = {}
        if self.perturbs:
            found = {p: g for group in self.param_groups for p, g in gradients(group)}
            for p, epsilon in self.perturbation(found):
                self._origin[p] = p.detach().clone()
                p.add_(epsilon)
            if self.model is not None:
                self._statistics = [(buffer, buffer.clone()) for buffer in _running_statistics(self.model)]
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """θ + ε ← θ, then the base step with the gradients at hand."""
        if self._origin is None:
            raise RuntimeError("second_step() without first_step(); call first_step() after the first backward()")
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts weights and running statistics back to where `first_step` found them; nothing where they are there."""
        for p, origin in (self._origin or {}).items():
            p.copy_(origin)
        for buffer, found in self._statistics:
            buffer.copy_(found)
        self._origin, self._statistics = None, []

    def threshold_of_group(self, group: Group) -> float | None:
        r"""With T the threshold of the base and P held fixed:

        - normalised: T. ‖ε‖ <= ρ makes a bounded force on the base's linear recurrence, which diverges when it does
          alone. It does not converge either: on a quadratic it ends in a cycle, of amplitude η h ρ / (2 − η h) for
          gradient descent in one dimension. Where the loss stops falling is another curvature, see `sam_edge`.
        - unnormalised: the gradient along an eigenvector is h (1 + ρ h) x, so h* solves h (1 + ρ h) + λ = T with the
          coupled weight decay λ; returned is h* + λ. Only for P = 1: with another one H and P⁻¹ H do not commute.
        - adaptive: None, for ε grows with the weights and depends on their direction.

        Source: the polynomials of the base, with h (1 + ρ h) in the place of h.
        """
        threshold = super().threshold_of_group(group)
        rho = _radius(group)
        if threshold is None or rho == 0:
            return threshold
        if group["adaptive"]:
            return None
        if group["normalize"]:
            return threshold
        if not self.moves_along_gradients:
            return None
        decay = self.coupled_weight_decay(group)
        return decay + sam_edge(threshold - decay, rho, 1.0) if threshold > decay else threshold

    def state_dict(self) -> dict[str, Any]:
        self._check_in_place()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        self._check_in_place()
        super().load_state_dict(state_dict)

    def _check_in_place(self) -> None:
        if self._origin is not None:
            raise RuntimeError("the weights are at θ + ε after first_step(); call second_step() or restore() first")

    def perturbation(self, gradients: Mapping[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters that are perturbed, with their ε.

        Args:
            gradients: Of the loss at θ, by parameter.
        """
        pairs = [(group, p, gradients[p]) for group in self.param_groups for p in group["params"] if p in gradients]
        length = _length(pairs)
        for group, p, g in pairs:
            if _radius(group) == 0:
                continue
            wide = moment_dtype(p)
            direction = g.to(wide) * p.to(wide).square() if group["adaptive"] else g.to(wide)
            scale = torch.as_tensor(group["rho"], dtype=torch.float64)
            if group["normalize"]:
                scale = group["rho"] / (length + TINY)
            yield p, direction * scale.to(p.device, wide)


def sam_edge(threshold: float, rho: float, gradient_norm: float) -> float:
    r"""Curvature along the gradient at which a step of normalised SAM stops to reduce a quadratic.

    h* = ‖g‖/(2ρ) · (√(1 + 4ρT/‖g‖) − 1), the positive root of h (1 + ρ h / ‖g‖) = T; with T = 2/η that is the edge of
    SAM on gradient descent. It lies below T and tends to 0 with the gradient.

    Args:
        threshold: T > 0 of the base, for example 2/η.
        rho: ρ >= 0.
        gradient_norm: ‖g‖ >= 0 of the loss; 1 gives the threshold of unnormalised SAM.

    Source: Long, Bartlett, Sharpness-Aware Minimization and the Edge of Stability, 2024.
    """
    check_number("threshold", threshold, above=0)
    check_number("rho", rho, least=0)
    check_number("gradient_norm", gradient_norm, least=0)
    if rho == 0:
        return threshold
    if gradient_norm == 0:
        return 0.0
    # The root in the form that keeps its digits where ρ is small.
    return 2 * threshold / (1 + math.sqrt(1 + 4 * rho * threshold / gradient_norm))


def _length(pairs: Sequence[tuple[Group, Tensor, Tensor]]) -> Tensor:
    """‖g‖, or ‖|θ| g‖ on adaptive groups, over all parameters: a float64 scalar."""
    norms: list[Tensor] = []
    for group, p, g in pairs:
        length = norm((g * p if group["adaptive"] else g).reshape(-1))
        norms.append(length.to(norms[0].device) if norms else length)
    return norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)


def _radius(group: Group) -> float:
    return float(group["rho"]) if group["enabled"] else 0.0


def _moves_along_gradients(optimizer: Optimizer) -> bool:
    if isinstance(optimizer, Wrapper):
        return _moves_along_gradients(optimizer.base)
    if isinstance(optimizer, BaseOptimizer):
        return type(optimizer).preconditioner is BaseOptimizer.preconditioner
    return type(optimizer) is torch.optim.SGD


def _running_statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers()]
