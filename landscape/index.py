"""Where coordinates lie inside one parameter: everywhere, in a box of slices, or at flat positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Index = None | tuple[slice, ...] | Tensor
# A parameter's name and the place inside it.
Part = tuple[str, Index]


def checked_part(block: str, part: Any) -> Part:
    """A part as (name, index), from what a user may write."""
    if isinstance(part, str):
        return part, None
    if not (isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[0], str)):
        raise TypeError(f"block {block!r} holds the part {part!r}; give a parameter name or a pair (name, index)")
    name, index = part
    if index is None:
        return name, None
    if isinstance(index, slice):
        index = (index,)
    if isinstance(index, tuple):
        if not all(isinstance(s, slice) and (s.step is None or s.step > 0) for s in index):
            raise TypeError(
                f"block {block!r}: the index of {name!r} is {index}; "
                "use slices with positive steps, slice(i, i + 1) for a single i"
            )
        return name, index
    positions = torch.as_tensor(index).detach().cpu()
    if positions.shape == (0,):  # an empty list comes out as floating
        return name, positions.long()
    if positions.dtype == torch.bool:
        return name, positions.reshape(-1).nonzero().squeeze(1)
    if positions.ndim != 1 or positions.is_floating_point() or positions.is_complex():
        raise TypeError(
            f"block {block!r}: the index of {name!r} is {positions.dtype} {list(positions.shape)}; "
            "flat positions are a 1-D tensor of integers"
        )
    return name, positions.long()


def checked_size(block: str, name: str, shape: torch.Size, index: Index) -> int:
    """Number of coordinates that an index selects; raises where it selects none or leaves the parameter."""
    if index is None:
        size = shape.numel()
    elif isinstance(index, tuple):
        if len(index) > len(shape):
            raise ValueError(f"block {block!r} gives {len(index)} slices for {name!r}, which has shape {list(shape)}")
        size = torch.Size(len(r) for r in ranges(shape, index)).numel()
    else:
        size = len(index)
        if size and not 0 <= int(index.min()) <= int(index.max()) < shape.numel():
            raise ValueError(
                f"block {block!r} has positions {int(index.min())} to {int(index.max())} in {name!r}, "
                f"which has {shape.numel()} entries counted from 0"
            )
    if size == 0:
        raise ValueError(f"block {block!r} selects nothing of {name!r} with shape {list(shape)}; leave that part out")
    return size


def ranges(shape: torch.Size, index: tuple[slice, ...]) -> list[range]:
    """The positions along every dimension that a box of slices selects."""
    box = index + (slice(None),) * (len(shape) - len(index))
    return [range(*s.indices(length)) for s, length in zip(box, shape, strict=True)]


def flat_positions(shape: torch.Size, index: Index) -> Tensor:
    """Row-major positions inside a parameter, at the cost of the selected coordinates only."""
    if isinstance(index, Tensor):
        return index
    flat = torch.zeros((), dtype=torch.int64)
    stride = shape.numel()
    for positions, length in zip(ranges(shape, index or ()), shape, strict=True):
        stride //= max(length, 1)
        flat = flat.unsqueeze(-1) + stride * torch.arange(positions.start, positions.stop, positions.step)
    return flat.reshape(-1)


def select(tensor: Tensor, index: Index, batch_dims: int = 0) -> Tensor:
    """The selected entries [..., size] of a tensor [..., *shape]; a view where that is possible."""
    if isinstance(index, Tensor):
        return tensor.flatten(batch_dims)[..., index.to(tensor.device)]
    if index is not None:
        tensor = tensor[(slice(None),) * batch_dims + index]
    return tensor.reshape(*tensor.shape[:batch_dims], -1)


def assign(tensor: Tensor, index: Index, values: Tensor) -> None:
    """Write values [..., size] into the selected entries of a contiguous tensor [..., *shape]."""
    batch = values.shape[:-1]
    if isinstance(index, Tensor):
        tensor.view(*batch, -1)[..., index.to(tensor.device)] = values
    else:
        box = tensor[(slice(None),) * len(batch) + (index or ())]
        box.copy_(values.reshape(box.shape))
