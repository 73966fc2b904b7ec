"""Optimizers made of another one: they change the gradient or the weights around its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ...hessian.preconditioned import Root
from .base import BaseOptimizer, Group, tensor_bytes


class Wrapper(BaseOptimizer):
    """Parameter groups are those of `base`, the very same list: schedulers may be given either.

    `state` holds what the wrapper itself keeps; `state_dict()` has that of `base` under "base".
    """

    def __init__(self, base: Optimizer, options: Mapping[str, Any]) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(
                f"`base` is a {type(base).__name__}; give an optimizer that is already made, such as "
                "torch.optim.SGD(model.parameters(), lr=0.1)"
            )
        self.base = base
        self.options = dict(options)
        self.is_made = False
        super().__init__(self.param_groups, {**base.defaults, **options})
        self.is_made = True

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """Those of `base`, with the wrapper's own options in each."""
        for group in self.base.param_groups:
            for option, value in self.options.items():
                group.setdefault(option, value)
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:  # type: ignore[override]
        """torch assigns a list of its own; the groups are those of `base`."""

    def update(self, group: Group) -> None:
        raise NotImplementedError("a wrapper steps as a whole")

    def add_param_group(self, param_group: Group) -> None:
        """Adds parameters to `base`, and so to this."""
        if not self.is_made:
            self.check_group(param_group)
            return
        own = {key: param_group.pop(key) for key in self.options if key in param_group}
        self.base.add_param_group(param_group)
        group = self.param_groups[-1]
        group.update(own)
        try:
            self.check_group(group)
        except Exception:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root:
        from .adapters import adapted

        return adapted(self.base).preconditioner(p, gradient)  # type: ignore[return-value]

    def threshold_of_group(self, group: Group) -> float | None:
        from .adapters import adapted

        return adapted(self.base).threshold_of_group(group)

    def coupled_weight_decay(self, group: Group) -> float:
        from .adapters import adapted

        return adapted(self.base).coupled_weight_decay(group)

    def joint_preconditioner(self, params: Sequence[Tensor]) -> Root | None:
        """P of all `params` together, where `base` has one; see `PSGD.joint_preconditioner`."""
        from .adapters import adapted

        jointly = getattr(adapted(self.base), "joint_preconditioner", None)
        return None if jointly is None else jointly(params)

    def state_bytes(self) -> int:
        """Of this and of `base`."""
        return tensor_bytes([list(self.state.values()), list(self.base.state.values())])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        state = dict(state_dict)
        base = state.pop("base", None)
        if base is None:
            raise ValueError(f"`state_dict` has no 'base'; pass what {type(self).__name__}.state_dict() returned")
        super().load_state_dict(state)
        self.base.load_state_dict(base)
