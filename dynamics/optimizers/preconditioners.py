"""The geometry of an optimizer in the coordinates of an objective."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...hessian.operator import DiagonalOperator, LinearOperator
from ...hessian.preconditioned import DiagonalRoot, PreconditionedOperator, Root
from ...landscape.objective import Objective
from ...landscape.sharded import is_sharded
from ...landscape.sharpness import gradient_at, weights_of
from .adapters import CombinedGeometry, adapted
from .base import Group, MissingGradientError, moment_dtype
from .block_diagonal_root import Block, BlockDiagonalRoot
from .sam import SAM
from .torch_geometry import Geometry, NoPreconditionerError
from .wrapper import Wrapper

Which = Literal["next", "current"]
Idle = Literal["exclude", "keep"]

# P is nothing but eps where it exceeds eps by less than this share.
EPS_ONLY = 1e-6


@dataclass(frozen=True)
class Preconditioner:
    """P in the coordinates of an objective [n], in the order of its layout, and what a step with it allows.

    Attributes:
        root: R [k, n] with P⁻¹ = Rᵀ R. Its columns are zero where nothing moves: for parameters that the optimizer does
            not hold, where P is infinite and, with idle="exclude", where P is nothing but eps.
        diagonal: P [n] where it is diagonal, infinite for parameters that the optimizer does not hold; else None.
        zero_share: Share of the n coordinates whose second moment is exactly zero.
        moves: Which coordinates [n] have a column in `root`, bool.
        num_not_held: Number of coordinates that the optimizer does not hold or does not move, the idle ones aside.
        thresholds: Largest stable eigenvalue of P⁻¹ (H + Λ) for each coordinate [n], infinite where nothing moves;
            None where a parameter has none.
        weight_decay: The diagonal Λ [n] of weight decay that is part of the gradient.
        threshold_root: R with the rows of each parameter divided by the root of its threshold, or None.
    """

    root: Root
    diagonal: Tensor | None = field(repr=False)
    zero_share: float
    moves: Tensor = field(repr=False)
    num_not_held: int
    thresholds: Tensor | None = field(repr=False)
    weight_decay: Tensor = field(repr=False)
    threshold_root: Root | None = field(repr=False)

    @property
    def threshold(self) -> float | None:
        """The threshold that all moving coordinates share, or None."""
        if self.thresholds is None:
            return None
        different = self.thresholds[self.thresholds.isfinite()].unique()
        return float(different[0]) if len(different) == 1 else None

    def inverse(self, v: Tensor) -> Tensor:
        """P⁻¹ v for v [n], zero where nothing moves."""
        return self.root.transposed(self.root.apply(v.unsqueeze(1))).squeeze(1)

    def operator(self, op: LinearOperator) -> PreconditionedOperator:
        """R A Rᵀ [k, k] for A [n, n]."""
        return PreconditionedOperator(op, self.root)

    def ratio_operator(self, op: LinearOperator) -> PreconditionedOperator | None:
        """T^-1/2 R (A + Λ) Rᵀ T^-1/2 for the thresholds T: the step is stable while its largest eigenvalue is below 1.

        Exact where all parameters have the same recurrence in units of their thresholds: the same momentum, and the
        same η λ if weight decay is decoupled; learning rates may differ. Otherwise the edge lies near 1 only.
        None where a parameter has no threshold.
        """
        if self.threshold_root is None:
            return None
        decayed = op + DiagonalOperator(self.weight_decay) if bool(self.weight_decay.any()) else op
        return PreconditionedOperator(decayed, self.threshold_root)


def preconditioner_of(
    optimizer: Optimizer,
    objective: Objective,
    *,
    which: Which = "next",
    gradient: Tensor | None = None,
    idle: Idle = "exclude",
) -> Preconditioner:
    """P of an optimizer whose steps are θ ← θ − η P⁻¹ m, as it stands; the optimizer is not changed.

    Args:
        optimizer: Of this package, torch.optim, torchao or bitsandbytes; see `adapted`.
        objective: The loss whose parameters span the coordinates.
        which: "next", P of the step that `gradient` will be used in, or "current", that of the last step.
        gradient: That of the loss at the weights, flat [n]; by default the objective's. Where the optimizer trains on
            other batches, P is that of a step on the objective's own data. Round an adaptive optimizer SAM makes P
            of the gradient at θ + ε, which is then evaluated on the objective, once more.
        idle: A coordinate whose second moment is exactly zero, such as a weight of a dead unit, has P = eps, and a
            curvature of rounding errors divided by eps may exceed all others. It does not move, and "exclude" takes it
            out; "keep" leaves it in.

    Raises:
        NoPreconditionerError: a ValueError; the optimizer has no such P (LBFGS, Rprop), or not any more.
        ValueError: which="current" before the first step; a preconditioner that is not positive; a gradient that is
            not finite.
        TypeError: sharded parameters.

    Source: Cohen et al., Adaptive Gradient Methods at the Edge of Stability, 2022, section 2.
    """
    if which not in ("next", "current"):
        raise ValueError(f"`which` is {which!r}; it must be 'next' or 'current'")
    if idle not in ("exclude", "keep"):
        raise ValueError(f"`idle` is {idle!r}; it must be 'exclude' or 'keep'")
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` is a {type(objective).__name__}; give an Objective of the model in training")
    geometry = adapted(optimizer)
    gradients: dict[str, Tensor | None] = dict.fromkeys(objective.layout.names)
    if which == "next":
        gradient = objective.gradient() if gradient is None else gradient
        if gradient.shape != (objective.num_parameters,):
            raise ValueError(f"`gradient` has shape {list(gradient.shape)}; it must be [{objective.num_parameters}]")
        if not bool(gradient.isfinite().all()):
            raise ValueError("the gradient is not finite, so there is no preconditioner: has the training diverged?")
        gradients |= objective.unflatten(_gradient_of_step(optimizer, objective, gradient))
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {name: held[id(p)] for name, p in objective.parameters.items() if id(p) in held}
    if not found:
        raise ValueError(f"`optimizer`, {type(optimizer).__name__}, holds none of the objective's parameters")
    builder = _Builder(objective, geometry, idle)
    if not builder.add_jointly(found):
        for name, group in found.items():
            builder.add(name, group, gradients[name])
    return builder.result()


class _Builder:
    """Collects the parameters of one preconditioner."""

    def __init__(self, objective: Objective, geometry: Geometry, idle: str) -> None:
        self.objective, self.geometry, self.exclude = objective, geometry, idle == "exclude"
        layout = objective.layout
        self.slices = {
            name: slice(start, start + size)
            for name, start, size in zip(layout.names, layout.offsets, layout.sizes, strict=False)
        }
        options: Any = {"dtype": objective.dtype, "device": objective.device}
        n = layout.num_parameters
        self.diagonal, self.thresholds = (torch.full((n,), torch.inf, **options) for _ in range(2))
        self.weight_decay = torch.zeros(n, **options)
        self.moves = torch.zeros(n, dtype=torch.bool, device=objective.device)
        self.blocks: list[tuple[Block, float | None]] = []
        self.is_diagonal, self.num_idle = True, 0
        self.missing: MissingGradientError | None = None

    def add_jointly(self, groups: dict[str, Group]) -> bool:
        """All parameters at once, where the optimizer has one P for them together."""
        jointly = getattr(self.geometry, "joint_preconditioner", None)
        params = [self._parameter(name) for name in groups]
        root = None if jointly is None else jointly(params)
        if root is None:
            return False
        thresholds = {self.geometry.threshold_of_group(group) for group in groups.values()}
        # Groups that one P couples have no recurrence of their own.
        threshold = thresholds.pop() if len(thresholds) == 1 else None
        for name, group in groups.items():
            self._note(name, group, threshold)
        self.is_diagonal = False
        self.blocks.append((Block([self.slices[name] for name in groups], root, moment_dtype(params[0])), threshold))
        return True

    def add(self, name: str, group: Group, gradient: Tensor | None) -> None:
        """One parameter."""
        p = self._parameter(name)
        try:
            P = self.geometry.preconditioner(p, gradient)
        except MissingGradientError as error:
            self.missing = error  # it has not moved
            return
        if P is None:
            raise NoPreconditionerError(
                f"the optimizer of parameter {name!r} does not step along P⁻¹ m with a P that could be held fixed: "
                "take the plain curvature, as `Sharpness` does"
            )
        threshold = self.geometry.threshold_of_group(group)
        self._note(name, group, threshold)
        where = self.slices[name]
        if isinstance(P, Root):
            self.is_diagonal = False
            self.blocks.append((Block([where], P, moment_dtype(p)), threshold))
            return
        idle = _idle(self.geometry, p, group, P, gradient).reshape(-1)
        self.num_idle += int(idle.count_nonzero())
        P = P.detach().reshape(-1).to(self.diagonal)
        self.moves[where] = ~((idle & self.exclude) | P.isposinf())
        bad = ~(P > 0) & self.moves[where]
        if bool(bad.any()):
            raise ValueError(
                f"the preconditioner of parameter {name!r} is {float(P[bad][0])} at {int(bad.sum())} of {len(P)} "
                "entries; it must be positive: is the training still finite, and eps above 0?"
            )
        self.diagonal[where] = P
        root = DiagonalRoot(torch.where(self.moves[where], P.rsqrt(), 0.0))
        self.blocks.append((Block([where], root, P.dtype), threshold))

    def result(self) -> Preconditioner:
        if not self.blocks:
            assert self.missing is not None
            raise self.missing
        n = len(self.moves)
        has_thresholds = all(threshold is not None for _, threshold in self.blocks)
        threshold_root = None
        if self.is_diagonal:
            scale = torch.where(self.moves, self.diagonal.rsqrt(), 0.0)
            root: Root = DiagonalRoot(scale)
            if has_thresholds:
                threshold_root = DiagonalRoot(scale * self.thresholds.rsqrt())
        else:
            root = BlockDiagonalRoot(n, [block for block, _ in self.blocks])
            if has_thresholds:
                scaled = [replace(block, factor=t**-0.5) for block, t in self.blocks if t is not None]
                threshold_root = BlockDiagonalRoot(n, scaled)
        idle = self.num_idle if self.exclude else 0
        return Preconditioner(
            root=root,
            diagonal=self.diagonal if self.is_diagonal else None,
            zero_share=self.num_idle / n,
            moves=self.moves,
            num_not_held=n - int(self.moves.count_nonzero()) - idle,
            thresholds=self.thresholds if has_thresholds else None,
            weight_decay=self.weight_decay,
            threshold_root=threshold_root,
        )

    def _parameter(self, name: str) -> Tensor:
        p = self.objective.parameters[name]
        if is_sharded(p):
            raise TypeError(
                f"parameter {name!r} is sharded over ranks; preconditioners are made of whole tensors: measure on an "
                "unsharded copy of model and optimizer"
            )
        return p

    def _note(self, name: str, group: Group, threshold: float | None) -> None:
        where = self.slices[name]
        self.moves[where] = True
        self.weight_decay[where] = self.geometry.coupled_weight_decay(group)
        if threshold is not None:
            self.thresholds[where] = threshold


def _gradient_of_step(optimizer: Any, objective: Objective, gradient: Tensor) -> Tensor:
    """What the rule inside sees in the next step, flat [n]: at θ + ε where SAM is round it."""
    while not isinstance(optimizer, SAM):
        inner = _inside(optimizer)
        if inner is None:
            return gradient
        optimizer = inner
    if not optimizer.perturbs:
        return gradient
    named = objective.unflatten(gradient)
    shift = {name: torch.zeros_like(g) for name, g in named.items()}
    names = {p: name for name, p in objective.parameters.items()}
    for p, epsilon in optimizer.perturbation({p: named[name] for p, name in names.items()}):
        shift[names[p]] = epsilon.detach().to(gradient)
    return gradient_at(objective, weights_of(objective) + objective.layout.flatten(shift))


def _inside(optimizer: Any) -> Any:
    """The optimizer that this one hands its step to, or None."""
    return optimizer.base if isinstance(optimizer, Wrapper) else getattr(optimizer, "active", None)


def _idle(geometry: Any, p: Tensor, group: Group, P: Tensor, gradient: Tensor | None) -> Tensor:
    """Where the second moment is exactly zero. An optimizer that does not say has it there where its P is eps, its
    gradient zero, and everything zero that it keeps for each entry."""
    while (inner := _inside(geometry)) is not None:
        geometry = adapted(inner)
    if isinstance(geometry, CombinedGeometry):
        geometry = geometry.part_of(p)
    if hasattr(geometry, "is_idle"):
        return geometry.is_idle(p, gradient)
    eps = group.get("eps")
    if not isinstance(eps, int | float):
        return torch.zeros_like(P, dtype=torch.bool)
    idle = float(eps) * (1 + EPS_ONLY) >= P
    if gradient is not None:
        idle &= gradient == 0
    for value in geometry.state.get(p, {}).values():
        if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
            idle &= value == 0
    return idle
