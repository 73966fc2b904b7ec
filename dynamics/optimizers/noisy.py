"""A base step followed by noise on the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .base import Closure, Group, check_gradients, counted, gradients
from .closures import needs_closure
from .option_checks import check_number
from .streams import tensor_numbers
from .wrapper import Wrapper


class Noisy(Wrapper):
    """θ ← base step + noise, on the parameters that have a gradient.

    The noise of a step follows from the seed, the number of the parameter and the number of its steps alone, so a
    resumed run draws what the uninterrupted one would have drawn. It is drawn in at least float32.
    """

    def __init__(
        self,
        params: ParamsT | Optimizer,
        lr: float | None,
        momentum: float,
        weight_decay: float,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(_base(params, lr, momentum, weight_decay), options)

    @abstractmethod
    def noise(self, p: Tensor, number: int, step: int, group: Group) -> Tensor | None:
        """What is added to a parameter, in its shape; None for nothing."""

    def check_group(self, group: Group) -> None:
        if "lr" not in group:
            raise ValueError(
                f"`base` is {type(self.base).__name__}, whose groups have no 'lr'; the noise is scaled by that"
            )
        check_number("lr", group["lr"], least=0)
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise TypeError(f"`seed` is {group['seed']!r}; give an integer")

    @property
    def needs_closure(self) -> bool:
        """Whether the base must be handed a closure."""
        return needs_closure(self.base)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step; a `closure` is handed to the base.

        Returns:
            What the base returns: the closure's loss, None without one.
        """

        def checked() -> Any:
            assert closure is not None
            loss = closure()
            check_gradients(self)
            return loss

        check_gradients(self)
        loss = self.base.step() if closure is None else self.base.step(checked)
        numbers = tensor_numbers(self)
        for group in self.param_groups:
            for p, _ in gradients(group):
                added = self.noise(p, numbers[p], counted(self.state[p]), group)
                if added is not None:
                    p.add_(added)
        return loss


def _base(params: ParamsT | Optimizer, lr: float | None, momentum: float, weight_decay: float) -> Optimizer:
    if isinstance(params, Optimizer):
        if lr is not None or momentum or weight_decay:
            raise ValueError(
                "`lr`, `momentum` and `weight_decay` belong to the optimizer that was given; set them there and leave "
                "them out here"
            )
        return params
    if lr is None:
        raise ValueError("`lr` is missing; give the learning rate, or an optimizer in place of the parameters")
    check_number("lr", lr, least=0)
    check_number("momentum", momentum, least=0)
    check_number("weight_decay", weight_decay, least=0)
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
