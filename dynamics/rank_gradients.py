"""The gradient of a whole batch from those of the ranks, of which some may lack some parameters' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Backends that add tensors on the CPU; the others have an accelerator's only.
ON_CPU = ("gloo", "mpi", "ucc", "cpu", "undefined", "fake")
# What ranks must agree on for a parameter, and what a rank without its gradient says of it.
DESCRIPTION = ("entries", "bytes per entry", "kind of device")
NOTHING_KNOWN = -(1 << 40)


def table_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where numbers that every rank has are added up: the same kind of device on all of them."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or any(kind in dist.get_backend(group) for kind in ON_CPU):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def gradient_of_ranks(
    own: Sequence[Tensor | None], share: float, *, device: torch.device, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Σ over ranks of `share` · `own`, flat, without parameters that have no gradient on any rank.

    None counts as zeros. It adds in float32 at least: sums of half-precision gradients overflow.

    Args:
        own: This rank's; on every rank of the same number of parameters.
        share: Of this rank in the whole.
        device: As `table_device` says.

    Raises:
        ValueError: on every rank, where gradients in the same place differ in size, type or kind of device.
    """
    if not own:
        return []
    held = torch.full((len(DESCRIPTION), len(own)), NOTHING_KNOWN, dtype=torch.int64)
    for k, gradient in enumerate(own):
        if gradient is not None:
            kind = _added_in(gradient)
            held[:, k] = torch.tensor([gradient.numel(), kind.itemsize, gradient.device.type != "cpu"])
    most, least = held, torch.where(held == NOTHING_KNOWN, NOTHING_KNOWN, -held)
    extremes = torch.stack([most, least]).to(device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    most, least = extremes.cpu().unbind()
    known = most != NOTHING_KNOWN
    unlike = known & (most != -least)
    if bool(unlike.any()):
        row, k = torch.nonzero(unlike)[0].tolist()
        raise ValueError(
            f"`gradients` differs among ranks: number {k} has {DESCRIPTION[row]} {-int(least[row, k])} on one and "
            f"{int(most[row, k])} on another; give those of the same parameters, in the same order, on every rank"
        )
    whole = []
    for k, gradient in enumerate(own):
        entries, itemsize, accelerated = most[:, k].tolist()
        if entries <= 0:
            continue
        if gradient is None:
            place = _place(own, device, accelerated=bool(accelerated))
            kind = torch.float64 if itemsize > 4 else torch.float32
            whole.append(torch.zeros(entries, dtype=kind, device=place))
        else:
            whole.append(gradient.detach().to(_added_in(gradient), copy=True).reshape(-1).mul_(share))
        dist.all_reduce(whole[-1], group=group)
    return whole


def _added_in(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _place(own: Sequence[Tensor | None], device: torch.device, *, accelerated: bool) -> torch.device:
    """Where zeros of a missing gradient lie."""
    if not accelerated:
        return torch.device("cpu")
    known = [g.device for g in own if g is not None and g.device.type != "cpu"]
    if known:
        return known[0]
    accelerator = torch.accelerator.current_accelerator()
    if device.type != "cpu" or accelerator is None:
        return device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
