"""Order, names and shapes of the tensors that a flat vector stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Names and shapes of `n` coordinates, concatenated in order, each tensor row-major.

    Every flat vector in sharpscope follows the layout of its objective: the selected parameters in
    `named_parameters` order.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Layout:
        return cls(tuple(named), tuple(t.shape for t in named.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(shape.numel() for shape in self.shapes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of every tensor in the flat vector, and `n` at the end."""
        offsets = [0]
        for size in self.sizes:
            offsets.append(offsets[-1] + size)
        return tuple(offsets)

    @property
    def num_parameters(self) -> int:
        return self.offsets[-1]

    def split(self, v: Tensor) -> tuple[Tensor, ...]:
        """Views of a flat `v` [n] in the shapes of the tensors."""
        pieces = v.split(self.sizes)
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Views of a flat `v` [n] by name."""
        if v.ndim != 1 or v.shape[0] != self.num_parameters:
            raise ValueError(f"`v` has shape {list(v.shape)}; this layout needs a flat vector [{self.num_parameters}]")
        return dict(zip(self.names, self.split(v.contiguous()), strict=True))

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """One flat vector [n] from tensors by name or in order."""
        if isinstance(tensors, Mapping):
            missing = [name for name in self.names if name not in tensors]
            if missing:
                raise ValueError(
                    f"`tensors` lacks {missing[:5]}; give one tensor for each of {list(self.names)[:5]} ..."
                )
            tensors = [tensors[name] for name in self.names]
        if len(tensors) != len(self.names):
            raise ValueError(f"`tensors` has {len(tensors)} entries; this layout has {len(self.names)} tensors")
        for name, shape, tensor in zip(self.names, self.shapes, tensors, strict=True):
            if tensor.shape != shape:
                raise ValueError(f"`tensors[{name!r}]` has shape {list(tensor.shape)}; the parameter has {list(shape)}")
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
