"""What a user may hand over as data, read as a sequence of batches that can be counted, moved and sliced."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .state import num_bytes

# A loader is kept in memory after its first pass when its batches are smaller than this: products re-read the data.
CACHED_BYTES = 1 << 30


def as_batches(data: Any) -> Iterable[Any]:
    """Batches behind `data`: one batch (tensor, mapping, tuple of tensors), a list of batches, a loader or a dataset.

    Raises:
        TypeError: `data` is a one-shot iterator, or not data at all.
        ValueError: a list of bare tensors, which could be one batch or many.
    """
    if isinstance(data, Tensor | Mapping):
        return [data]
    if isinstance(data, tuple):
        if data and all(isinstance(item, tuple | list | Mapping) for item in data):
            raise ValueError(
                f"`data` is a tuple of {len(data)} {type(data[0]).__name__}s, which may be one nested batch or "
                "several; pass [data] for one batch, or list(data) for several"
            )
        return [data]
    if isinstance(data, list):
        if not data:
            raise ValueError("`data` is an empty list; give at least one batch")
        if all(isinstance(item, Tensor) for item in data):
            raise ValueError(
                f"`data` is a list of {len(data)} tensors, which may be one batch or several; "
                "pass tuple(data) for one batch (inputs, targets), or [(t,) for t in data] for several"
            )
        return list(data)
    if isinstance(data, torch.utils.data.TensorDataset):
        return [data.tensors]
    if isinstance(data, Iterator):
        raise TypeError(
            f"`data` is a {type(data).__name__} that can be read only once; curvature needs many passes: "
            "pass list(data)"
        )
    if isinstance(data, torch.utils.data.Dataset) and not isinstance(data, torch.utils.data.IterableDataset):
        return torch.utils.data.DataLoader(data, batch_size=256)
    if isinstance(data, Iterable):
        return data
    raise TypeError(
        f"`data` is a {type(data).__name__}; pass one batch (a tensor, a dict, a tuple such as (inputs, targets)), "
        "a list of batches, or a DataLoader"
    )


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`batch` with `function` applied to each tensor in its mappings, tuples and lists."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in batch.items()}
        return mapped if type(batch) is dict else _like(batch, mapped)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_tensors(getattr(batch, f.name), function) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def fresh_containers(batch: Any) -> Any:
    """The same tensors in new containers, so that a loss may take items out of its batch."""
    return map_tensors(batch, lambda t: t)


def _like(batch: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    """A mapping of the batch's own class with other values, where the class allows it (BatchEncoding does)."""
    try:
        copied: Any = copy.copy(batch)
        # A copy may share the dictionary behind its items with the original.
        held = getattr(copied, "__dict__", {})
        held.update({name: copy.copy(item) for name, item in held.items() if isinstance(item, dict | list)})
        for key, value in mapped.items():
            copied[key] = value
    except TypeError:
        return mapped
    return copied


def tensors_of(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    found: list[Tensor] = []
    map_tensors(batch, lambda t: found.append(t) or t)
    return found


def leading_size(batch: Any, number: int) -> int:
    """Examples in a batch: the length of its first tensor's first axis."""
    for tensor in tensors_of(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise ValueError(
        f"batch {number} holds no tensor with an example axis (it is a {type(batch).__name__}); "
        "pass count=lambda batch: ... to say how many examples it stands for"
    )


def examples(batch: Any, first: int, last: int, size: int) -> Any:
    """Examples [first, last) of a batch of `size`: tensors with that leading length are sliced, the rest is kept."""

    def narrow(tensor: Tensor) -> Tensor:
        return tensor[first:last] if tensor.ndim > 0 and tensor.shape[0] == size else tensor

    return map_tensors(batch, narrow)


def chosen(batch: Any, rows: Tensor, size: int, *, flattened: bool = False) -> Any:
    """The examples `rows` [k] of a batch of `size`: tensors with that leading length are indexed, the rest is kept.

    With `flattened`, tensors whose leading length is a multiple of `size` hold several rows of each example.
    """

    def pick(tensor: Tensor) -> Tensor:
        length = tensor.shape[0] if tensor.ndim > 0 else 0
        if length == size:
            return tensor[rows.to(tensor.device)]
        if flattened and length > 0 and length % size == 0:
            return tensor.unflatten(0, (size, -1))[rows.to(tensor.device)].flatten(0, 1)
        return tensor

    return map_tensors(batch, pick)


def digest(batch: Any, into: Any = None) -> Any:
    """SHA-256 over the contents of every tensor of a batch (continues `into` when given)."""
    sha = hashlib.sha256() if into is None else into
    for tensor in tensors_of(batch):
        plain = tensor.detach().cpu()
        plain = (plain if plain.layout == torch.strided else plain.to_dense()).contiguous()
        sha.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return sha


class Batches:
    """Re-readable batches on one device; a small loader is read once and kept.

    Args:
        data: Whatever `as_batches` takes.
        device: Where each batch goes.
        dtype: Floating tensors are cast to it; None leaves them.
    """

    def __init__(self, data: Any, device: torch.device, dtype: torch.dtype | None) -> None:
        self._source = as_batches(data)
        self._device, self._dtype = device, dtype
        self._kept: list[Any] | None = None

    @classmethod
    def in_hand(cls, batches: list[Any], device: torch.device) -> Batches:
        """Exactly these batches, which are on their device and in their type already."""
        made = cls((), device, None)
        made._source = batches
        return made

    def _place(self, tensor: Tensor) -> Tensor:
        target = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        placed = tensor.detach().to(self._device, target)
        # A tensor made under inference_mode cannot be saved for a backward pass; its clone can.
        return placed.clone() if placed.is_inference() else placed

    def read(self) -> Iterator[Any]:
        """One pass over the source itself; a loader's own generators are left as found."""
        loader = self._source
        holders = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
        generators = [g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)]
        found = [g.get_state() for g in generators]
        try:
            for batch in self._source:
                yield map_tensors(batch, self._place)
        finally:
            for generator, state in zip(generators, found, strict=True):
                generator.set_state(state)

    def keep(self, batches: list[Any]) -> None:
        """Serve later passes from these batches, when the source is not in memory already and they are small."""
        small = sum(num_bytes(t) for batch in batches for t in tensors_of(batch)) <= CACHED_BYTES
        if small and not isinstance(self._source, list):
            self._kept = batches

    def __iter__(self) -> Iterator[Any]:
        if self._kept is None:
            yield from self.read()
        else:
            # Fresh containers and aliases: what a loss does to its batch stays with it.
            for batch in self._kept:
                yield map_tensors(batch, torch.Tensor.detach)

    def in_memory(self) -> list[Tensor]:
        """The tensors behind batches that are the same ones at every pass; none for a loader that is read anew."""
        source = self._kept if self._kept is not None else self._source if isinstance(self._source, list) else []
        return [tensor for batch in source for tensor in tensors_of(batch)]
