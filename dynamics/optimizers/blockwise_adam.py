"""Adam with one second moment per block of each tensor: what Adam-mini and SlimAdam share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ...landscape.divisions import Division
from ...landscape.reductions import Reduction
from ...landscape.selection import unwrapped
from .base import BaseOptimizer, Group, counted, missing_gradient, step_of, tensor_bytes
from .option_checks import check_betas, check_flag, check_number
from .recurrences import average_threshold


class BlockRow(NamedTuple):
    """A line of `describe()`: how one tensor is divided, and the bytes of its second moment once there is one."""

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    num_blocks: int
    bytes: int


class BlockwiseAdam(BaseOptimizer):
    r"""m ← β1 m + (1 − β1) g, v_b ← β2 v_b + (1 − β2) mean_b(g²), θ ← (1 − ηλ) θ − η (m / (1 − β1^t)) /
    (√v_b / √(1 − β2^t) + ε), with one v_b for each block b of a tensor.

    The state of a parameter: `step`, `exp_avg` of its shape, `block_exp_avg_sq` [number of blocks]. How each tensor is
    divided stands in the group's option "divisions", in the order of its parameters, and so in the state dict: a
    resumed run has the blocks of the run that was saved.

    A subclass says how tensors are divided by `division(p, name)`.
    """

    def __init__(self, params: ParamsT, defaults: Mapping[str, Any], model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` is a {type(model).__name__}; give the module whose parameters are optimized, or None"
            )
        self.model = model
        self._names: dict[Tensor, str] = {}
        self._has_model = model is not None
        if model is not None:
            self._read(model)
        super().__init__(params, defaults)

    def read_structure(self, model: nn.Module) -> None:
        """Takes in the structure of the model; called again when parameters are added that it did not have."""

    def _read(self, model: nn.Module) -> None:
        self._names = {p: name for name, p in unwrapped(model).named_parameters()}
        self.read_structure(model)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the optimizer is none of the model.
        return {**super().__getstate__(), "model": None}

    @abstractmethod
    def division(self, p: Tensor, name: str) -> Division:
        """How a tensor is divided; `name` is that in the model, else as given to the optimizer, else its place."""

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            names = group.get("param_names") or [
                f"{len(self.param_groups) - 1}.{i}" for i in range(len(group["params"]))
            ]
            divisions = [self._division(p, name) for p, name in zip(group["params"], names, strict=True)]
        except Exception:
            self.param_groups.pop()
            raise
        group.setdefault("divisions", [(d.name, d.role, d.rule, d.reduction.plain) for d in divisions])

    def _division(self, p: Tensor, name: str) -> Division:
        if self.model is not None and p not in self._names:
            self._read(self.model)
        if self._has_model and p not in self._names:
            raise ValueError(
                f"parameter {name!r} {list(p.shape)} is none of `model`; give the model that has it, or None"
            )
        division = self.division(p, self._names.get(p, name))
        if division.reduction.shape != tuple(p.shape):
            raise ValueError(
                f"the blocks of {division.name!r} are for shape {list(division.reduction.shape)}, but the parameter "
                f"has {list(p.shape)}; make the partition from this model"
            )
        if division.reduction.labels is not None:
            labels = division.reduction.labels.to(p.device)
            return division._replace(reduction=division.reduction._replace(labels=labels))
        return division

    def check_group(self, group: Group) -> None:
        check_number("lr", group["lr"], least=0)
        check_betas(group["betas"])
        check_number("eps", group["eps"], least=0)
        check_number("weight_decay", group["weight_decay"], least=0)
        check_flag("decay_vectors", group["decay_vectors"])

    def divided(self) -> Iterator[tuple[Tensor, Division]]:
        """Every parameter with its blocks."""
        for group in self.param_groups:
            for p, (name, role, rule, plain) in zip(group["params"], group["divisions"], strict=True):
                yield p, Division(name, role, rule, Reduction.read(plain))

    def table(self) -> list[BlockRow]:
        """How every tensor is divided, one line each."""
        rows = []
        for p, division in self.divided():
            moment = self.state.get(p, {}).get("block_exp_avg_sq")
            held = 0 if moment is None else moment.nbytes
            reduction = division.reduction
            rows.append(
                BlockRow(division.name, tuple(p.shape), division.role, division.rule, reduction.num_blocks, held)
            )
        return rows

    def describe(self) -> str:
        """`table()` as text: tensor, shape, role, rule, number of blocks, bytes of the second moment."""
        rows = self.table()
        total = sum(math.prod(row.shape) for row in rows)
        num_blocks = sum(row.num_blocks for row in rows)
        cells = [("tensor", "shape", "role", "rule", "blocks", "bytes")]
        cells += [(r.name, str(list(r.shape)), r.role, r.rule, str(r.num_blocks), str(r.bytes)) for r in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        saved = 1 - num_blocks / max(total, 1)
        return "\n".join([*lines, f"{num_blocks} second moments for {total} parameters: {saved:.2%} saved"])

    def state_bytes(self) -> int:
        """With the labels of blocks that are no means over dimensions."""
        labels = [division.reduction.labels for _, division in self.divided() if division.reduction.labels is not None]
        return tensor_bytes([list(self.state.values()), labels])

    def update(self, group: Group) -> None:
        lr, eps, weight_decay = (float(group[option]) for option in ("lr", "eps", "weight_decay"))
        beta1, beta2 = group["betas"]
        for p, (_, _, _, plain) in zip(group["params"], group["divisions"], strict=True):
            if p.grad is None or p.numel() == 0:
                continue
            reduction, state = Reduction.read(plain), self.state[p]
            gradient = p.grad if p.dtype == torch.float64 else p.grad.float()
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
                state["block_exp_avg_sq"] = gradient.new_zeros(reduction.num_blocks)
            t = counted(state)
            if weight_decay and (p.ndim >= 2 or group["decay_vectors"]):
                p.mul_(1 - lr * weight_decay)
            state["exp_avg"].lerp_(gradient, 1 - beta1)
            v = state["block_exp_avg_sq"]
            _accumulate(v, gradient, reduction, beta2)
            denominator = reduction.expand((v.sqrt() / math.sqrt(1 - beta2**t)).add_(eps))
            if p.dtype == gradient.dtype:
                p.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**t))
            else:
                p.copy_(p.float().addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**t)))

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """(1 − β1^t) (√v_b / √(1 − β2^t) + ε) in every entry of block b."""
        group, plain = self._place(p)
        reduction, state = Reduction.read(plain), self.state.get(p, {})
        beta1, beta2 = group["betas"]
        v, t = state.get("block_exp_avg_sq"), step_of(state)
        if gradient is not None:
            gradient = gradient.detach() if p.dtype == torch.float64 else gradient.detach().float()
            v = gradient.new_zeros(reduction.num_blocks) if v is None else v.clone()
            _accumulate(v, gradient, reduction, beta2)
            t += 1
        if v is None or t == 0:
            raise missing_gradient(self)
        P = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(float(group["eps"])) * (1 - beta1**t)
        return reduction.expand(P).expand(p.shape).clone()

    def _place(self, p: Tensor) -> tuple[Group, Any]:
        for group in self.param_groups:
            for q, (_, _, _, plain) in zip(group["params"], group["divisions"], strict=True):
                if q is p:
                    return group, plain
        raise ValueError(f"`p` {list(p.shape)} is no parameter of this {type(self).__name__}")

    def threshold_of_group(self, group: Group) -> float | None:
        r"""(2 − ηλ)(1 + β1) / ((1 − β1) η).

        On an eigenvector of P⁻¹H with eigenvalue h, m ← β1 m + (1 − β1) h x and x ← (1 − ηλ) x − η m give
        z² − (1 − ηλ + β1 − (1 − β1) ηh) z + β1 (1 − ηλ) = 0; by Jury's conditions its roots lie inside the unit
        circle for 0 < h below this number. With λ = 0 it is that of Adam in Cohen et al., Adaptive Gradient Methods at
        the Edge of Stability, 2022, section 2. Tensors without decay have the one with λ = 0, which is larger.
        """
        return average_threshold(float(group["lr"]), group["betas"][0], float(group["weight_decay"]))


def _accumulate(v: Tensor, gradient: Tensor, reduction: Reduction, beta2: float) -> None:
    if reduction.is_identity:
        flat = gradient.reshape(-1)
        v.mul_(beta2).addcmul_(flat, flat, value=1 - beta2)
    else:
        v.mul_(beta2).add_(reduction.mean(gradient * gradient), alpha=1 - beta2)
