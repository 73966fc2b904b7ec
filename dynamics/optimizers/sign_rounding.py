"""SignRound: which way each weight is rounded, learned by signed gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import BaseOptimizer, Group, counted, gradients, missing_gradient
from .option_checks import check_choice, check_flag, check_number
from .packed_codes import QuantizedWeight
from .sign import check_sign_group, gradient_is_gone, magnitude, sign_step
from .weight_grid import SMALLEST_SCALE, Derivative, WeightGrid, as_matrix

PACKED_BITS = (2, 3, 4, 8)


class SignRound(BaseOptimizer):
    r"""Rounds weights to a few bits and then learns the rounding.

    Every parameter with two or more dimensions holds the weights of its grid, W~ (see `WeightGrid`); a bias or norm,
    with one, is left alone. The full weights W, an offset V per element (0 at first) and two factors α, β per group
    (1 at first) are in the state. The backward pass gives dL/dW~; a step takes it through the rounding,
    straight-through and in closed form, and moves

        V ← V − η_k sign(dL/dV),  α ← clip(α − η_k sign(dL/dα), 0, 1),  β likewise,  η_k = η (1 − k/K)

    for k = 0 … K − 1, then writes the new W~. After K of them nothing moves. With η = 1/K, V cannot leave
    ±(K + 1)/(2K), about one half: a weight goes to one of its two neighbours on the grid. No other state, no momentum;
    scaling the loss changes nothing.

    A parameter's first step rounds it to nearest and uses no gradient, since the one at hand was taken at W; call
    `round_to_nearest()` to do this beforehand. A group whose lr is 0 stays rounded to nearest.

    It is made for one layer or block against its own full-precision output (`sign_round` does that), and runs on any
    loss. Embeddings and output layers, which stay in full precision in the paper, are for the caller to leave out.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: Columns of a row that share a scale; -1 is the whole row.
        symmetric: One signed scale, instead of scale and zero point.
        lr: η, in units of a grid step for V; None is 1/iterations.
        iterations: K. The paper's first version takes 400, the later ones 200.
        clip: Whether α and β are learned; the first version of the paper learns V alone.
        scale_dtype: "float16" or "float32".

    There is no stability threshold: the weights move by jumps of a grid step.

    Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023
    (Findings of EMNLP 2024), algorithm 1. In its official code the scale's derivative is itself rounded to float16;
    here the cast is straight-through.
    """

    def __init__(
        self,
        params: ParamsT,
        bits: int = 4,
        group_size: int = 32,
        symmetric: bool = False,
        lr: float | Tensor | None = None,
        iterations: int = 200,
        clip: bool = True,
        scale_dtype: str = "float16",
    ) -> None:
        options = {"lr": lr, "bits": bits, "group_size": group_size, "symmetric": symmetric, "iterations": iterations}
        super().__init__(params, {**options, "clip": clip, "scale_dtype": scale_dtype})

    def check_group(self, group: Group) -> None:
        check_whole("iterations", group["iterations"], least=1)
        if group["lr"] is None:
            group["lr"] = 1 / group["iterations"]
        check_sign_group({**group, "weight_decay": 0.0})
        if group["bits"] not in PACKED_BITS:
            raise ValueError(f"`bits` is {group['bits']!r}; it must be one of {PACKED_BITS}")
        if group["group_size"] != -1:
            check_whole("group_size", group["group_size"], least=1, other="-1 for whole rows")
        check_flag("symmetric", group["symmetric"])
        check_flag("clip", group["clip"])
        check_choice("scale_dtype", group["scale_dtype"], tuple(SMALLEST_SCALE))

    def update(self, group: Group) -> None:
        grid = grid_of(group)
        for p, g in gradients(group):
            if p.ndim < 2:
                continue
            state = self.state[p]
            if counted(state) == 1:
                begin(state, p, grid)
                continue
            k = int(state["step"]) - 2
            lr = float(group["lr"]) * max(0.0, 1 - k / group["iterations"])
            if lr == 0:
                continue
            by = derivative(grid, state, g)
            sign_step(state["offset"], by.offset, lr)
            if group["clip"]:
                for name, d in (("min_scale", by.min_scale), ("max_scale", by.max_scale)):
                    sign_step(state[name], d, lr)
                    state[name].clamp_(0, 1)
            write(state, p, grid)

    @torch.no_grad()
    def round_to_nearest(self) -> None:
        """Rounds every parameter that requires a gradient and has not been rounded yet."""
        for group, p in self._matrices():
            if p.requires_grad and "weights" not in self.state[p]:
                counted(self.state[p])
                begin(self.state[p], p, grid_of(group))

    @torch.no_grad()
    def restore(self, learned: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Puts back earlier "offset", "min_scale" and "max_scale" of parameters, and writes their W~."""
        for group, p in self._matrices():
            if p in learned:
                self.state[p].update(learned[p])
                write(self.state[p], p, grid_of(group))

    @torch.no_grad()
    def quantized(self, p: Tensor) -> QuantizedWeight:
        """Codes, scales and zero points of a parameter; their `dequantize()` is the parameter, bit for bit.

        Raises:
            ValueError: it has fewer than two dimensions, or has not been rounded yet.
        """
        state = self.state.get(p, {})
        if "weights" not in state:
            raise ValueError(
                f"the parameter of shape {list(p.shape)} is not rounded: it has fewer than two dimensions, or made no "
                "step yet (call round_to_nearest())"
            )
        grid = next(grid_of(group) for group, q in self._matrices() if q is p)
        return quantized(grid, state)

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """|g| / |s|, so that −η P⁻¹ g = −η |s| sign(g) is the step of W~ with the rounding straight-through; ∞ where
        nothing moves: g = 0, a clipped code, a parameter that is left alone. The motion of the scales is not in it.

        Args:
            p: A parameter of this optimizer.
            gradient: What the next step will see.

        Raises:
            NoPreconditionerError: a ValueError; `gradient` is None: that of the last step is not kept.
        """
        if p.ndim < 2:
            return torch.full_like(p, torch.inf)
        state = self.state.get(p, {})
        if gradient is None:
            raise gradient_is_gone(self) if p in self.state else missing_gradient(self)
        grid = next(grid_of(group) for group, q in self._matrices() if q is p)
        if "weights" not in state:
            begin(state := {}, p.detach().clone(), grid)
        s = grid.scales(as_matrix(state["weights"]), state["min_scale"], state["max_scale"]).step
        columns = state["offset"].shape[1]
        steps = grid.flat(s.unsqueeze(-1).expand_as(grid.grouped(state["offset"])), columns)
        # dL/dV = s g where the code is not clipped.
        return magnitude(derivative(grid, state, gradient).offset / steps.square()).reshape(p.shape).to(p.dtype)

    def _matrices(self) -> Iterator[tuple[Group, Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim >= 2:
                    yield group, p


def grid_of(group: Group) -> WeightGrid:
    return WeightGrid(group["bits"], group["group_size"], group["symmetric"], group["scale_dtype"])


def begin(state: dict[str, Any], p: Tensor, grid: WeightGrid) -> None:
    """Keeps the full weights and rounds the parameter to nearest."""
    W = as_matrix(p)
    ones = torch.ones(grid.grouped(W).shape[:2], dtype=W.dtype, device=W.device)
    if not bool(torch.isfinite(grid.scales(W, ones, ones).step).all()):
        raise ValueError(
            f"a parameter of shape {list(p.shape)} has weights up to {float(p.abs().max()):.3g}, for which "
            f"`scale_dtype` {grid.scale_dtype!r} is too small: use 'float32', and check that the weights are finite"
        )
    state.update(weights=p.detach().clone(), offset=torch.zeros_like(W), min_scale=ones, max_scale=ones.clone())
    write(state, p, grid)


def write(state: dict[str, Any], p: Tensor, grid: WeightGrid) -> None:
    """W~ of the present offsets and factors, into the parameter."""
    rounded = grid.fake_quantize(as_matrix(state["weights"]), state["offset"], state["min_scale"], state["max_scale"])
    p.copy_(rounded.reshape(p.shape))


def derivative(grid: WeightGrid, state: dict[str, Any], gradient: Tensor) -> Derivative:
    W = as_matrix(state["weights"])
    return grid.derivative(as_matrix(gradient), W, state["offset"], state["min_scale"], state["max_scale"])


def quantized(grid: WeightGrid, state: dict[str, Any]) -> QuantizedWeight:
    weights = state["weights"]
    W = as_matrix(weights)
    scales = grid.scales(W, state["min_scale"], state["max_scale"])
    stored = scales.step.to(getattr(torch, grid.scale_dtype))
    codes = grid.codes(W, state["offset"], scales)
    return QuantizedWeight(grid, codes, stored, scales.zero.to(torch.uint8), weights.shape, weights.dtype)


def check_whole(name: str, value: Any, *, least: int, other: str = "") -> None:
    """Raise unless `value` is a whole number from `least` on."""
    check_number(name, value, least=least)
    if not isinstance(value, int):
        raise TypeError(
            f"`{name}` is {value!r}; it must be a whole number >= {least}" + (f", or {other}" if other else "")
        )
