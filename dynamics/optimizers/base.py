"""What every optimizer here has in common: torch's conventions, and the facts that the monitor reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ...hessian.preconditioned import Root

Closure = Callable[[], Any]
Group = dict[str, Any]


class BaseOptimizer(Optimizer):
    """An optimizer with a stated geometry, threshold and memory.

    A step is θ ← θ − η P⁻¹ m with a momentum m. A subclass writes `update(group)`, and says what its P is and when
    such a step is stable. Everything that must survive a checkpoint stands in `state[p]` as tensors, or in the
    groups' options as plain values; `load_state_dict` gives every tensor back in the dtype it was saved in.

    Gradients that are None are left out; sparse and complex ones are refused before anything has changed.
    """

    def __init__(self, params: ParamsT, defaults: Mapping[str, Any]) -> None:
        global _untraced
        super().__init__(params, dict(defaults))
        _untraced = _untraced or torch.compiler.disable(_update_all)

    @abstractmethod
    def update(self, group: Group) -> None:
        """One step on the parameters of a group, in place; gradients are off."""

    def check_group(self, group: Group) -> None:
        """Raise where the options of a group cannot be used. Called for every group, also for one added later."""

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root:
        """P of one parameter: its diagonal, of the parameter's shape, or a `Root` R with P⁻¹ = Rᵀ R.

        With bias correction and eps, as the step divides by it. The identity unless a subclass says otherwise.

        Args:
            p: A parameter of this optimizer.
            gradient: What the next step will see; P is then that of the next step. None gives the P of the last step,
                and raises before the first one where P is made of gradients.
        """
        return torch.ones_like(p)

    def threshold_of_group(self, group: Group) -> float | None:
        """Largest eigenvalue of P⁻¹ (H + weight decay, where that is part of the gradient) at which the group's next
        step is stable on a quadratic with P held fixed; None where there is none."""
        return None

    def coupled_weight_decay(self, group: Group) -> float:
        """λ where weight decay is added to the gradient (L2); 0 where it is decoupled from it or absent."""
        return 0.0

    def stability_threshold(self) -> float | None:
        """The threshold that all groups share (see `threshold_of_group`), or None where they have different ones."""
        thresholds = {self.threshold_of_group(group) for group in self.param_groups}
        return thresholds.pop() if len(thresholds) == 1 else None

    def state_bytes(self) -> int:
        """Bytes of the tensors that the optimizer keeps between steps."""
        return tensor_bytes(self.state.values())

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step; a `closure` clears the gradients, evaluates the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (_untraced or _update_all)(self)
        return loss

    def add_param_group(self, param_group: Group) -> None:
        """Adds parameters, with options of their own where they name some."""
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Goes on from `state_dict()`, bit for bit: codes stay uint8, moments keep their precision."""
        for i, group in enumerate(state_dict["param_groups"]):
            if missing := sorted(self.defaults.keys() - group.keys() - {"differentiable"}):
                raise ValueError(
                    f"`state_dict` has no {', '.join(map(repr, missing))} in group {i}, so it is not that of a "
                    f"{type(self).__name__}; pass what its state_dict() returned"
                )
        super().load_state_dict(dict(state_dict))
        restore_exactly(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three attributes only; copies and pickles must not lose those of a subclass.
        # A scheduler puts a `step` on the instance that holds the original: a copy would step that one.
        left_out = ("_optimizer_", "_zero_grad", "step")
        own = {key: value for key, value in self.__dict__.items() if not key.startswith(left_out)}
        return {**own, **super().__getstate__()}


def _update_all(optimizer: BaseOptimizer) -> None:
    check_gradients(optimizer)
    for group in optimizer.param_groups:
        optimizer.update(group)


# `_update_all` as torch.compile passes it over: traced, every count of steps and every parameter would be a graph of
# its own. Made with the first optimizer, for the compiler takes a second to load.
_untraced: Any = None


def gradients(group: Group) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of a group that have a gradient and entries, with it."""
    for p in group["params"]:
        if p.grad is not None and p.numel():
            yield p, p.grad


def check_gradients(optimizer: Optimizer) -> None:
    """Raise for gradients that a dense real step cannot take, before anything has changed."""
    name = type(optimizer).__name__
    for i, group in enumerate(optimizer.param_groups):
        for j, (p, gradient) in enumerate(gradients(group)):
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"the gradient of parameter {j} of group {i} is {gradient.layout}; {name} takes dense gradients: "
                    "use sparse=False in the embedding, or torch.optim.SparseAdam for it"
                )
            if p.is_complex():
                raise TypeError(
                    f"parameter {j} of group {i} is {p.dtype}; {name} takes real parameters: optimize "
                    "torch.view_as_real(p)"
                )


def counted(state: dict[str, Any]) -> int:
    """The number of this step, from 1: adds one to `state["step"]`, a float32 scalar on the CPU as torch keeps it."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    state["step"] += 1
    return int(state["step"])


def step_of(state: Mapping[str, Any]) -> int:
    """How many steps a parameter has made."""
    return int(state["step"]) if "step" in state else 0


def restore_exactly(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Puts the saved tensors back as they were: torch's own loading casts them to the parameter's dtype."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(ids, params, strict=True):
        for key, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                place = "cpu" if key == "step" else p.device
                optimizer.state[p][key] = value.detach().to(place, copy=True)


def group_of(optimizer: Optimizer, p: Tensor) -> Group:
    """The group with the options of a parameter."""
    for group in optimizer.param_groups:
        if any(q is p for q in group["params"]):
            return group
    name = type(optimizer).__name__
    raise ValueError(f"`p`, a tensor {list(p.shape)}, is no parameter of this {name}: pass one of its own")


def moment_dtype(p: Tensor) -> torch.dtype:
    """In what moments of a parameter are kept: its own type, at least float32."""
    return torch.promote_types(p.dtype, torch.float32)


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested containers, memory that several share counted once."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if hasattr(value, "__tensor_flatten__"):  # a wrapper, such as torchao's states: the tensors inside
            visit([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr() or id(storage)] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, str | bytes):
            return
        elif hasattr(value, "__iter__"):
            for item in value:
                visit(item)

    visit(values)
    return sum(seen.values())


class MissingGradientError(ValueError):
    """A preconditioner is asked for before any gradient was seen."""


def missing_gradient(optimizer: Optimizer) -> MissingGradientError:
    """For a preconditioner that is asked for before any gradient was seen."""
    return MissingGradientError(
        f"{type(optimizer).__name__} has not made a step with this parameter yet, so its preconditioner is unknown: "
        "pass `gradient`, that of the next step"
    )
