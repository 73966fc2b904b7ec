"""AdamW with its two moments in four bits an entry."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...kernels.adamw4 import DTYPES, AdamW4State, adamw4_state, adamw4_step
from ...kernels.codec import ROUNDINGS, UNSIGNED_MAPS, Rounding, Scale, check_streams
from ...kernels.codec_tables import VERSION
from .base import BaseOptimizer, Group, counted, gradients, group_of, missing_gradient, moment_dtype, step_of
from .moment_codecs import (
    Factored,
    MomentCodec,
    Parts,
    SignedFourBit,
    Uncompressed,
    UnsignedFourBit,
    packed_from,
    parts_of,
)
from .option_checks import check_betas, check_choice, check_number
from .recurrences import average_threshold
from .streams import tensor_numbers

SECOND_MOMENTS = ("rank1", "block", "factor")
MOMENTS = ("m", "v")


@dataclass
class Batch:
    """Tensors of one device that are at one step."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[AdamW4State] = field(default_factory=list)

    def append(self, p: Tensor, g: Tensor, state: AdamW4State) -> None:
        self.params.append(p)
        self.grads.append((g if g.dtype in DTYPES else g.float()).contiguous().resolve_neg())
        self.states.append(state)

    def step(self, t: int, group: Group) -> None:
        """One call of the kernel, which takes contiguous tensors only."""
        dense = [p.contiguous() for p in self.params]
        adamw4_step(
            dense,
            self.grads,
            self.states,
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            step=t,
            rounding=group["rounding"],
            seed=group["seed"],
        )
        for p, copy in zip(self.params, dense, strict=True):
            if copy is not p:
                p.copy_(copy)


class AdamW4bit(BaseOptimizer):
    r"""AdamW whose moments are decoded, updated and encoded again in every step.

        m = β₁ dec(m) + (1 − β₁) g,  v = β₂ dec(v) + (1 − β₂) g²
        θ ← (1 − ηλ) θ − η/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + ε)
        keep enc(m), enc(v)

    The step itself uses m and v in full precision. On float32 and bfloat16 parameters it is one pass of a kernel, in
    float32; on others the same in torch operations, in float64 for float64 parameters. Codes and scales take some 1.04
    bytes an entry, where AdamW in float32 takes 8.

    m has blocks of 128 with a signed map of dynamic exponents. The map of v has no zero, by which an update would be
    divided. See `sharpscope.kernels` for the format; `state[p]` holds m_codes, m_scales, v_codes, v_scales and, with
    rank-1 scales, v_columns.

    Non-finite gradients: the kernel leaves the weights and moments of a block of 128 entries as they are and counts it
    in `state[p]["skipped"]`; all other paths let NaN through, as AdamW does.

    Args:
        params: Any shapes, also with strides.
        lr, betas, eps, weight_decay: η, (β₁, β₂), ε and λ as in torch.optim.AdamW.
        v: Kind of the second moment of a tensor with two or more dimensions; others have "block". "rank1", one scale
            for each row and each column of the tensor as a matrix [shape[0], rest], of which entry ij takes the
            smaller; it gives way to "block" in thin matrices, where it would take more than half a byte an entry.
            "block", one scale for each 128 entries. "factor", row and column means in full precision over the last two
            dimensions, as in Adafactor, and the step divides by their product; some 0.53 bytes an entry in all for
            wide matrices, but 3.2 for kernels of 3 x 3.
        map: Values of the codes of v: "linear", (k + 1)/16, as in the paper, or "square", ((k + 1)/16)², evenly
            spaced in √v, which has the smaller error of the update.
        rounding: "nearest", as in the paper, or "stochastic" for both moments. With β₂ = 0.999 a code of v hardly ever
            changes under nearest rounding: (1 − β₂) g² has to exceed half the width of a code.
        min_size: A tensor with at most so many entries keeps uncompressed moments; math.inf compresses nothing.
        seed: Of stochastic rounding; with it the random numbers depend on the count of the step and the place of the
            parameter in the optimizer only.
        codec: Takes the place of `v`, `map` and `rounding`: a `MomentCodec` for both moments, or a pair (of m, of v).
            It is no part of `state_dict()`.

    Raises:
        TypeError, ValueError: Options of a wrong kind or out of range; a `state_dict` with codes of another format.

    Source: Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023, algorithms 1 and 3 (whose line for v
    has a misprinted β₁; the official code has β₂) and section 4. Paper and code take one maximum for each index of
    every axis of a tensor with more than two dimensions; here it is read as a matrix. They send a value half way
    between two codes of v to the lower one, here it goes to the even multiple of 1/16.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        v: Literal["rank1", "block", "factor"] = "rank1",
        map: Literal["linear", "square"] = "linear",
        rounding: Rounding = "nearest",
        min_size: float = 4096,
        seed: int = 0,
        codec: MomentCodec | tuple[MomentCodec, MomentCodec] | None = None,
    ) -> None:
        self.codec = _checked_codec(codec)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "v": v, "map": map}
        format = {"format": VERSION}
        super().__init__(params, {**options, "rounding": rounding, "min_size": min_size, "seed": seed, **format})

    def check_group(self, group: Group) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name], least=0)
        check_betas(group["betas"])
        check_choice("v", group["v"], SECOND_MOMENTS)
        check_choice("map", group["map"], UNSIGNED_MAPS)
        check_choice("rounding", group["rounding"], ROUNDINGS)
        if group["min_size"] != math.inf:
            check_number("min_size", group["min_size"], least=0)
        check_streams(group["seed"], 0, 0)

    def update(self, group: Group) -> None:
        # Tracing by torch.compile (2.13) mixes up the payloads of parameters; a kernel has nothing left to be fused.
        eager: Any = torch.compiler.disable(self._update)
        eager(group)

    def _update(self, group: Group) -> None:
        # One call of the kernel for all tensors of a device that are at the same step.
        fused: defaultdict[tuple[torch.device, int], Batch] = defaultdict(Batch)
        ids = tensor_numbers(self)
        for p, g in gradients(group):
            t = counted(self.state[p])
            if self._is_fused(p, group):
                fused[p.device, t].append(p, g, self._kernel_state(p, group, ids[p]))
            else:
                self._step_one(p, g, t, group, ids[p])
        for (_, t), batch in fused.items():
            batch.step(t, group)

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor:
        """(1 − β₁ᵗ) (√(v/(1 − β₂ᵗ)) + ε) of the parameter's shape, float32 or float64.

        Of the next step exactly, where its gradient is given. P of the last step is made of v as it was kept, after
        encoding: the step itself divided by the v before.
        """
        group = group_of(self, p)
        t = step_of(self.state.get(p, {}))
        if gradient is None and t == 0:
            raise missing_gradient(self)
        if gradient is not None:
            t, v = t + 1, self.next_moments(p, gradient)[1]
        else:
            v = self._decoded(p, group)[1]
        return (1 - group["betas"][0] ** t) * self._root(v, t, group)

    def threshold_of_group(self, group: Group) -> float | None:
        """(2 − ηλ)(1 + β₁) / ((1 − β₁) η), see `average_threshold`.

        On an eigenvector of P⁻¹ H with eigenvalue a, m ← β₁ m + (1 − β₁) P a θ and θ ← (1 − ηλ) θ − η P⁻¹ m give
        z² − (1 − ηλ + β₁ − (1 − β₁) η a) z + β₁ (1 − ηλ) = 0; of Jury's conditions the one at z = −1 breaks first.
        Encoding brings the onset forward, by some 3 % at β₁ = 0.9: an entry of m that is the largest of its block
        decodes to 0.8875 of itself at every second step, where it is negative.
        """
        return average_threshold(float(group["lr"]), float(group["betas"][0]), float(group["weight_decay"]))

    def moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """m and v of a parameter as they are kept, decoded, [*p.shape] in float32 or float64; zeros before a step."""
        m, v = self._decoded(p, group_of(self, p))
        return m.clone(), v.clone()

    def next_moments(self, p: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """m and v of the next step with this gradient, as that step uses them, before they are encoded."""
        group = group_of(self, p)
        m, v = self._decoded(p, group)
        b1, b2 = group["betas"]
        g = gradient.detach().to(m.dtype)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if self._codecs(p, group)[1].divides_decoded:
            v = self.decoded(p, self.encoded(p, m, v))[1]
        return m, v

    def direction(self, p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        """What the next step would move p along with moments m and v, for a learning rate of −1, without decay."""
        group, t = group_of(self, p), step_of(self.state.get(p, {})) + 1
        return m / (1 - group["betas"][0] ** t) / self._root(v, t, group)

    def encoded(self, p: Tensor, m: Tensor, v: Tensor) -> tuple[Parts, Parts]:
        """What the next step would keep of m and v [*p.shape]; `decoded` has them back. Nothing is changed."""
        step, id = step_of(self.state.get(p, {})) + 1, tensor_numbers(self)[p]
        first, second = self._codecs(p, group_of(self, p))
        return first.encode(m, step=step, id=id), second.encode(v, step=step, id=id)

    def decoded(self, p: Tensor, parts: tuple[Parts, Parts]) -> tuple[Tensor, Tensor]:
        """m and v [*p.shape] of what `encoded` returned."""
        first, second = self._codecs(p, group_of(self, p))
        return first.decode(parts[0], p.shape, moment_dtype(p)), second.decode(parts[1], p.shape, moment_dtype(p))

    def is_compressed(self, p: Tensor) -> bool:
        """Whether the moments of a parameter are kept in another form than their own."""
        return not all(isinstance(codec, Uncompressed) for codec in self._codecs(p, group_of(self, p)))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            if group.get("format", VERSION) != VERSION:
                raise ValueError(
                    f"`state_dict` holds 4-bit moments of format {group['format']}; this code reads format {VERSION}: "
                    "load it with the release that wrote it, or start without moments"
                )
        super().load_state_dict(state_dict)

    @staticmethod
    def _root(v: Tensor, t: int, group: Group) -> Tensor:
        return (v / (1 - group["betas"][1] ** t)).sqrt() + group["eps"]

    def _is_fused(self, p: Tensor, group: Group) -> bool:
        compressed = self.codec is None and p.numel() > group["min_size"]
        return compressed and p.dtype in DTYPES and not (group["v"] == "factor" and p.ndim > 1)

    def _codecs(self, p: Tensor, group: Group) -> tuple[MomentCodec, MomentCodec]:
        if p.numel() <= group["min_size"] or p.numel() == 0:
            return Uncompressed(), Uncompressed()
        if self.codec is not None:
            return self.codec
        rounding, seed = group["rounding"], group["seed"]
        first = SignedFourBit(rounding, seed)
        if group["v"] == "factor" and p.ndim > 1:
            return first, Factored()
        return first, UnsignedFourBit(group["map"], _scale(group), rounding, seed)

    def _decoded(self, p: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """The moments before a step; those that are kept uncompressed are not copied."""
        decoded = []
        for moment, codec in zip(MOMENTS, self._codecs(p, group), strict=True):
            parts = _parts(self.state.get(p, {}), moment)
            if not parts:
                decoded.append(torch.zeros_like(p, dtype=moment_dtype(p), requires_grad=False))
                continue
            try:
                decoded.append(codec.decode(parts, p.shape, moment_dtype(p)))
            except KeyError as error:
                raise _kept_otherwise(p, parts) from error
        return decoded[0], decoded[1]

    def _step_one(self, p: Tensor, g: Tensor, t: int, group: Group, id: int) -> None:
        first, second = self._codecs(p, group)
        m, v = self._decoded(p, group)
        b1, b2 = group["betas"]
        lr = float(group["lr"])
        g = g.to(m.dtype)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        kept = second.encode(v, step=t, id=id) if second.divides_decoded else None
        if kept is not None:
            v = second.decode(kept, p.shape, v.dtype)
        denominator = (v.sqrt() / math.sqrt(1 - b2**t)).add_(group["eps"])
        new = p if p.dtype == m.dtype else p.to(m.dtype)
        new.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, denominator, value=-lr / (1 - b1**t))
        if new is not p:
            p.copy_(new)
        _keep(self.state[p], "m", first.encode(m, step=t, id=id))
        _keep(self.state[p], "v", second.encode(v, step=t, id=id) if kept is None else kept)

    def _kernel_state(self, p: Tensor, group: Group, id: int) -> AdamW4State:
        """The state as the kernel takes it: the same tensors."""
        state = self.state[p]
        if not _parts(state, "m"):
            new = adamw4_state(p, map=group["map"], scale=_scale(group), id=id)
            _keep(state, "m", parts_of(new.m))
            _keep(state, "v", parts_of(new.v))
            state["skipped"] = new.skipped
            return new
        if not {"m_codes", "v_codes", "skipped"} <= state.keys():
            raise _kept_otherwise(p, _parts(state, "m") | _parts(state, "v"))
        m = packed_from(_parts(state, "m"), p.shape, "de")
        v = packed_from(_parts(state, "v"), p.shape, group["map"])
        return AdamW4State(m, v, state["skipped"], id)


def _scale(group: Group) -> Scale:
    return "rank1" if group["v"] == "rank1" else "block128"


def _parts(state: Mapping[str, Any], moment: str) -> Parts:
    return {key[2:]: value for key, value in state.items() if key.startswith(f"{moment}_")}


def _keep(state: dict[str, Any], moment: str, parts: Parts) -> None:
    for name, value in parts.items():
        state[f"{moment}_{name}"] = value


def _kept_otherwise(p: Tensor, parts: Parts) -> ValueError:
    return ValueError(
        f"the moments of a parameter of shape {list(p.shape)} are kept as {', '.join(sorted(parts))}, which the "
        "settings of now do not read; `v`, `min_size` and `codec` must stay what they were at its first step, also "
        "where a `state_dict` is loaded"
    )


def _checked_codec(codec: Any) -> tuple[MomentCodec, MomentCodec] | None:
    if codec is None:
        return None
    pair = tuple(codec) if isinstance(codec, tuple | list) else (codec, codec)
    known = ("encode", "decode", "divides_decoded")
    if len(pair) != 2 or not all(hasattr(part, name) for part in pair for name in known):
        raise TypeError(f"`codec` is {codec!r}; give a MomentCodec, which has {', '.join(known)}, or a pair of them")
    return pair
