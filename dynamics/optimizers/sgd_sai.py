"""SGD-SaI: momentum with one learning rate per tensor, scaled at its first gradient and then kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, group_of, missing_gradient, moment_dtype
from .gradient_snr import gsnr_of, spread_over_size
from .option_checks import check_choice, check_number
from .recurrences import average_threshold

# Within this of the square root of the number of entries, G says nothing beyond the size of the tensor.
SIZE_ONLY = 0.05


class Scale(NamedTuple):
    """What `SGDSaI` has measured of one tensor.

    Attributes:
        name: As given to the optimizer, or the numbers of its group and place.
        size: d, its number of entries.
        gsnr: G, or √d where the floor has replaced it.
        relative: G / √d.
        scale: S, the factor of the learning rate.
        floored: Whether G was replaced: the first gradient was nearly constant.
    """

    name: str
    size: int
    gsnr: float
    relative: float
    scale: float
    floored: bool


class SGDSaI(BaseOptimizer):
    r"""Momentum SGD whose learning rate is scaled, tensor by tensor, by the g-SNR of the first gradient.

    G_i = ‖g_i‖ / std(g_i) at the first gradient of tensor i; then m ← μ m + (1 − μ) g, starting at m = g, and
    θ ← (1 − ηλ) θ − η S_i m. Nothing of S changes any more; it is kept in the state.

    For a gradient of mean nearly zero G is √d, the square root of the number of entries: `scales()` shows G / √d, the
    part that is not size.

    Args:
        params: Parameters, named ones or groups.
        lr: η. It is not transferable between the two scales, which differ by the factor max_k G_k.
        momentum: μ.
        eps: See `scale`.
        weight_decay: λ, decoupled, of every tensor.
        scale: "code": S = G with G = ‖g‖ / (std + eps), sample standard deviation, as in the authors' package
            sgd-sai 1.0.3; the defaults are for this one. "paper": S = G / max_k G_k over the tensors that have a
            gradient in the same step, with G = ‖g‖ / √(var + eps), population variance.
        floor: Where std(g) is below this share of the root mean square of g, as for a single entry, a constant
            gradient or a gate, G is meaningless, and √d takes its place, with a warning. A first gradient of zeros
            counts as none: the tensor is measured at its first other one. None does neither, as the package: a tensor
            with one entry then gets G = |g| / eps, and one whose first gradient is zero never moves.
        late_params: What a tensor gets whose first gradient comes after the first step of the others:
            "own-first-gradient": G of that gradient, over the kept maximum and at most 1 for "paper"; or "error".

    Compute the first gradient as all others: averaged over ranks, unscaled, with the usual batch.

    Source: Xu et al., No More Adam: Learning Rate Scaling at Initialization is All You Need, 2024.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scale: Literal["code", "paper"] = "code",
        floor: float | None = 1e-2,
        late_params: Literal["own-first-gradient", "error"] = "own-first-gradient",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "floor": floor,
            "late_params": late_params,
        }
        super().__init__(params, defaults)

    def check_group(self, group: Group) -> None:
        check_number("lr", group["lr"], least=0)
        check_number("momentum", group["momentum"], least=0, below=1)
        check_number("eps", group["eps"], least=0)
        check_number("weight_decay", group["weight_decay"], least=0)
        check_choice("scale", group["scale"], ("code", "paper"))
        check_choice("late_params", group["late_params"], ("own-first-gradient", "error"))
        if group["floor"] is not None:
            check_number("floor", group["floor"], least=0, below=1)

    def update(self, group: Group) -> None:
        # The maximum of the paper's scale is over all groups, so all are measured before the first one moves.
        for p, measured in self._measured({}).items():
            self.state[p].update(measured)
            self._say(p)
        lr, momentum, weight_decay = (float(group[option]) for option in ("lr", "momentum", "weight_decay"))
        for p in group["params"]:
            if p.grad is None:
                continue
            if weight_decay:
                p.mul_(1 - lr * weight_decay)
            state = self.state.get(p, {})
            if "gsnr" not in state:
                continue
            gradient = p.grad if p.dtype == torch.float64 else p.grad.float()
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = gradient.clone(memory_format=torch.preserve_format)
            elif momentum:
                state["momentum_buffer"].mul_(momentum).add_(gradient, alpha=1 - momentum)
            else:
                state["momentum_buffer"].copy_(gradient)
            p.add_(state["momentum_buffer"].to(p.dtype), alpha=-lr * _scale(group, state))

    def _measured(self, instead: Mapping[Tensor, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """G of the tensors that have a gradient and none yet; `instead` gives gradients to read in place of `.grad`."""
        found: dict[Tensor, dict[str, Tensor]] = {}
        kept = [state["gsnr_max"] for state in self.state.values() if "gsnr_max" in state]
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                gradient = instead.get(p, p.grad)
                if gradient is None or p.numel() == 0 or "gsnr" in self.state.get(p, {}):
                    continue
                floor = group["floor"]
                if floor is not None and not bool(gradient.any()):
                    continue
                if kept and group["late_params"] == "error":
                    raise ValueError(
                        f"parameter {i} of group {number} has its first gradient after other parameters were scaled; "
                        "give all parameters a gradient at the first step, or use late_params='own-first-gradient'"
                    )
                G = gsnr_of(gradient, float(group["eps"]), group["scale"])
                floored = floor is not None and not spread_over_size(gradient) >= floor
                if floored:
                    G = torch.full_like(G, math.sqrt(p.numel()))
                found[p] = {"gsnr": G, "floored": torch.tensor(floored)}
        if found:
            largest = max(kept) if kept else max(measured["gsnr"] for measured in found.values())
            for measured in found.values():
                measured["gsnr_max"] = largest.clone()
        return found

    def _say(self, p: Tensor) -> None:
        if bool(self.state[p]["floored"]):
            warnings.warn(
                f"the first gradient of a parameter {list(p.shape)} is constant up to `floor`, so its g-SNR says "
                f"nothing; the square root of its size, {math.sqrt(p.numel()):.4g}, is used instead",
                stacklevel=4,
            )

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """1 / S in every entry, ∞ where S is 0.

        Before the first step S is that of `gradient`; with scale="paper" it depends on the gradients of all parameters
        then, and is not known.
        """
        group = group_of(self, p)
        state: Mapping[str, Any] = self.state.get(p, {})
        if "gsnr" not in state:
            if gradient is None or group["scale"] == "paper":
                raise missing_gradient(self)
            state = self._measured({p: gradient}).get(p, {"gsnr": torch.ones(()), "gsnr_max": torch.ones(())})
        scale = _scale(group, state)
        return torch.full_like(p, 1 / scale if scale else math.inf, dtype=moment_dtype(p))

    def threshold_of_group(self, group: Group) -> float | None:
        r"""(2 − ηλ)(1 + μ) / ((1 − μ) η).

        With P = 1 / S, an eigenvector of P⁻¹H with eigenvalue h gives m ← μ m + (1 − μ) h x, x ← (1 − ηλ) x − η m:
        z² − (1 − ηλ + μ − (1 − μ) ηh) z + μ (1 − ηλ) = 0, whose roots lie inside the unit circle for 0 < h below
        this number (Jury's conditions). That m starts at g changes where the recurrence starts, not its roots.
        """
        return average_threshold(float(group["lr"]), group["momentum"], float(group["weight_decay"]))

    def scales(self) -> list[Scale]:
        """What has been measured so far, in the order of the parameters."""
        return list(self._scales())

    def _scales(self) -> Iterator[Scale]:
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                state = self.state.get(p, {})
                if "gsnr" in state:
                    G, d = float(state["gsnr"]), p.numel()
                    yield Scale(name, d, G, G / math.sqrt(d), _scale(group, state), bool(state["floored"]))

    def describe(self) -> str:
        """`scales()` as text, and whether the scales are anything but sizes."""
        rows = self.scales()
        cells = [("tensor", "size", "G", "G/sqrt(size)", "scale", "")]
        cells += [
            (
                r.name,
                str(r.size),
                f"{r.gsnr:.4g}",
                f"{r.relative:.4f}",
                f"{r.scale:.4g}",
                "floored" if r.floored else "",
            )
            for r in rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        if rows and all(abs(row.relative - 1) < SIZE_ONLY for row in rows):
            lines.append(f"all within {SIZE_ONLY:.0%} of the square root of the size: the scales are sizes")
        return "\n".join(lines)


def _scale(group: Group, state: Mapping[str, Any]) -> float:
    G = float(state["gsnr"])
    if group["scale"] == "code":
        return G
    largest = float(state["gsnr_max"])
    return min(1.0, G / largest) if largest else 0.0
