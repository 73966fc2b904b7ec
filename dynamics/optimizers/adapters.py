"""The geometry of any optimizer: one of this package, of torch.optim, of torchao, of bitsandbytes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...hessian.preconditioned import Root
from .base import Group
from .combined import CombinedOptimizer
from .torch_adam import AdamaxGeometry, AdamGeometry, NAdamGeometry, RAdamGeometry
from .torch_adaptive import AdadeltaGeometry, AdafactorGeometry, AdagradGeometry, RMSpropGeometry
from .torch_geometry import ASGDGeometry, Geometry, NoGeometry, SGDGeometry, TorchGeometry
from .torch_muon import MuonGeometry

TORCH: dict[type[Optimizer], type[TorchGeometry]] = {
    torch.optim.SGD: SGDGeometry,
    torch.optim.ASGD: ASGDGeometry,
    torch.optim.Adam: AdamGeometry,
    torch.optim.AdamW: AdamGeometry,
    torch.optim.Adamax: AdamaxGeometry,
    torch.optim.NAdam: NAdamGeometry,
    torch.optim.RAdam: RAdamGeometry,
    torch.optim.Adagrad: AdagradGeometry,
    torch.optim.RMSprop: RMSpropGeometry,
    torch.optim.Adadelta: AdadeltaGeometry,
    torch.optim.Adafactor: AdafactorGeometry,
    torch.optim.Muon: MuonGeometry,
    torch.optim.Rprop: NoGeometry,
    torch.optim.LBFGS: NoGeometry,
    torch.optim.SparseAdam: NoGeometry,
}

_told: set[type] = set()


def adapted(optimizer: Optimizer) -> Geometry:
    """What `optimizer` does to a gradient: `preconditioner(p, gradient)`, `threshold_of_group(group)`,
    `coupled_weight_decay(group)`.

    An optimizer that has these methods answers for itself, as all of this package do. Those of torch.optim, torchao
    and bitsandbytes are read from their state and options. A subclass of one of them may step otherwise, so it counts
    as unknown. An unknown optimizer gets the identity, and no threshold but that of a method `stability_threshold()`
    of its own; one warning says so.
    """
    known = known_geometry(optimizer)
    if known is not None:
        return known
    assert isinstance(optimizer, Optimizer)
    if type(optimizer) not in _told:
        _told.add(type(optimizer))
        warnings.warn(
            f"the geometry of {type(optimizer).__name__} is not known; its steps are taken to be plain gradient steps. "
            "Give it methods preconditioner(p, gradient), threshold_of_group(group) and coupled_weight_decay(group) to "
            "say what it does",
            stacklevel=2,
        )
    return UnknownGeometry(optimizer)


def known_geometry(optimizer: Optimizer) -> Geometry | None:
    """As `adapted`, or None where the optimizer is not known.

    Raises:
        TypeError: it is no optimizer.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"`optimizer` is a {type(optimizer).__name__}; pass the optimizer in training, such as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if isinstance(optimizer, Geometry):
        return optimizer
    if isinstance(optimizer, CombinedOptimizer):
        return CombinedGeometry(optimizer)
    if type(optimizer) in TORCH:
        return TORCH[type(optimizer)](optimizer)
    package = type(optimizer).__module__.split(".")[0]
    if package == "torchao":
        from .torchao_states import adapt

        return adapt(optimizer)
    if package == "bitsandbytes":
        from .bitsandbytes_states import adapt

        return adapt(optimizer)
    return None


class UnknownGeometry(TorchGeometry):
    """The identity."""

    def threshold_of_group(self, group: Group) -> float | None:
        own = getattr(self.optimizer, "stability_threshold", None)
        return None if own is None else own()

    def coupled_weight_decay(self, group: Group) -> float:
        return 0.0


class CombinedGeometry:
    """Of several optimizers on disjoint parameters, each for its own."""

    def __init__(self, optimizer: CombinedOptimizer) -> None:
        self._parts = [(part, adapted(part)) for part in optimizer.optimizers]

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root | None:
        return self.part_of(p).preconditioner(p, gradient)

    def threshold_of_group(self, group: Group) -> float | None:
        return self.part_of(group["params"][0]).threshold_of_group(group)

    def coupled_weight_decay(self, group: Group) -> float:
        return self.part_of(group["params"][0]).coupled_weight_decay(group)

    def part_of(self, p: Tensor) -> Geometry:
        """The geometry of the optimizer that holds p."""
        for part, geometry in self._parts:
            if any(p is q for group in part.param_groups for q in group["params"]):
                return geometry
        raise ValueError(f"the parameter of shape {list(p.shape)} belongs to none of the combined optimizers")
