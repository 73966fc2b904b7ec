"""How each parameter tensor is divided into blocks: by the structure of the model, by shape, or as given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .index import Part, assign
from .reductions import Piece, Reduction, indices_of
from .structure import Segment, TensorRole, structure

if TYPE_CHECKING:
    from .blocks import Partition

Vectors = Literal["paper", "entries", "tensor"]
Unmatched = Literal["error", "rows", "tensor"]
# Which dimensions of a layer's weight are averaged over.
Averaged = Literal["inputs", "outputs", "both"] | None


class Division(NamedTuple):
    """The blocks of one tensor, with the role and the rule that gave them, in words."""

    name: str
    role: str
    rule: str
    reduction: Reduction


def adam_mini_divisions(
    model: nn.Module,
    *,
    head_count: int | Mapping[str, int] | None = None,
    vectors: Vectors = "paper",
    unmatched: Unmatched = "error",
) -> dict[str, Division]:
    """Blocks in which the Hessian of a transformer is dense, of every parameter by name.

    Queries and keys: one block per head, key heads counted on their own under grouped queries. Values, attention
    outputs, linear layers, recurrent weights: one per output. Embeddings and output layers: one per token. Fused
    layers: each slice by its own role. Convolutions: one per tensor, as in the paper's partition for other networks.
    Both weight layouts are told apart by the structure.

    Args:
        model: A module; see `structure` for what is recognised.
        head_count: Of query heads where the model does not say it.
        vectors: "paper": biases per entry, norm weights and other vectors one per tensor, as in the authors' code
            (version 1.1.1); "entries" or "tensor" for all of them.
        unmatched: What to do with matrices of unknown role: "error"; "rows": one block per index of the first
            dimension; "tensor": one per tensor.

    Raises:
        ValueError: an unmatched matrix, or an attention whose heads the structure does not tell.

    Source: Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, ICLR 2025.
    """
    roles = structure(model, head_count=head_count)
    return {name: _adam_mini_division(role, vectors, unmatched) for name, role in roles.items()}


def _adam_mini_division(role: TensorRole, vectors: Vectors, unmatched: Unmatched) -> Division:
    shape = role.shape
    if role.axis is not None and not role.is_convolution:
        if role.problem and any(s.role in ("query", "key") for s in role.segments or [Segment("query", 0, 0)]):
            raise ValueError(f"{role.name!r} cannot be divided into heads: {role.problem}")
        pieces = [_by_head(shape, role.axis, s) if s.num_heads and s.role != "value" else None for s in role.segments]
        made = [
            piece or segment_piece(shape, role.axis, s, "inputs")
            for piece, s in zip(pieces, role.segments, strict=True)
        ]
        rules = [f"{_short(s)}per {_unit(s, piece)}" for piece, s in zip(pieces, role.segments, strict=True)]
        if sum(s.stop - s.start for s in role.segments) == shape[role.axis]:
            rule = rules[0].rpartition(": ")[2] if len(rules) == 1 else "; ".join(rules)
            return Division(role.name, role.role, rule, Reduction.joined(shape, role.axis, made))
    if role.is_convolution:
        return Division(role.name, role.role, "per tensor", Reduction.whole(shape))
    if len(shape) < 2:
        per_entry = vectors == "entries" or (vectors == "paper" and role.role == "bias")
        return per_entry_or_tensor(role.name, role.role, shape, per_entry)
    if role.role == "bias":
        return per_entry_or_tensor(role.name, role.role, shape, vectors != "tensor")
    if unmatched == "error":
        raise ValueError(
            f"the role of {role.name!r} {list(shape)} is unknown, so its blocks are; pass unmatched='rows' or "
            "'tensor', or give a partition of your own"
        )
    return (
        by_shape(role.name, shape, role.role)
        if unmatched == "rows"
        else Division(role.name, role.role, "per tensor", Reduction.whole(shape))
    )


def by_shape(name: str, shape: Iterable[int], role: str = "") -> Division:
    """Rows of a matrix, one per index of the first dimension; any other tensor is one block."""
    shape = tuple(shape)
    if len(shape) == 2:
        return Division(name, role, "per row", Reduction.outputs(shape, 0))
    return Division(name, role, "per tensor", Reduction.whole(shape))


def per_entry_or_tensor(name: str, role: str, shape: tuple[int, ...], per_entry: bool) -> Division:
    reduction = Reduction.entries(shape) if per_entry else Reduction.whole(shape)
    return Division(name, role, "per entry" if per_entry else "per tensor", reduction)


def segment_piece(shape: tuple[int, ...], axis: int, segment: Segment, averaged: Averaged) -> Piece:
    """Outputs [start, stop) averaged over their inputs (one number per output), over the outputs, over both, or not."""
    view = tuple(segment.stop - segment.start if d == axis else n for d, n in enumerate(shape))
    every = tuple(range(len(shape)))
    dims = {
        "inputs": tuple(d for d in every if d != axis),
        "outputs": (axis,),
        "both": every,
        None: (),
    }[averaged]
    return Piece(segment.start, segment.stop, view, dims)


def _by_head(shape: tuple[int, ...], axis: int, segment: Segment) -> Piece:
    assert segment.num_heads is not None
    size = (segment.stop - segment.start) // segment.num_heads
    view = (*shape[:axis], segment.num_heads, size, *shape[axis + 1 :])
    return Piece(segment.start, segment.stop, view, tuple(d for d in range(len(view)) if d != axis))


def _short(segment: Segment) -> str:
    return f"{segment.role}: "


def _unit(segment: Segment, by_head: Piece | None) -> str:
    if by_head is not None:
        return "head"
    return {"token embedding": "token", "position embedding": "position"}.get(segment.role, "output")


def divisions_of(partition: Partition) -> dict[str, Division]:
    """The parts of every tensor that lie in the same block, for all tensors of the partition's layout.

    A block that spans several tensors is cut at their borders. Entries outside all blocks are one block per tensor.
    """
    layout = partition.layout
    parts: dict[str, list[tuple[int, Part]]] = {}
    for number, block in enumerate(partition.values()):
        for part in block.parts:
            parts.setdefault(part[0], []).append((number, part))
    made = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        labels = torch.full(shape, -1, dtype=torch.int64)
        for number, (_, index) in parts.get(name, []):
            size = len(index) if isinstance(index, Tensor) else labels[index or ()].numel()
            assign(labels, index, labels.new_full((size,), number))
        numbers = labels.unique(return_inverse=True)[1].reshape(shape)
        # In the order in which the entries meet them: runs along an axis are then recognised.
        flat = numbers.reshape(-1)
        first = torch.full((int(flat.max()) + 1,), flat.numel()).scatter_reduce(
            0, flat, torch.arange(flat.numel()), reduce="amin"
        )
        rank = torch.empty_like(first)
        rank[first.argsort()] = torch.arange(len(first))
        reduction = Reduction.labelled(rank[numbers])
        made[name] = Division(name, "", f"{reduction.num_blocks} given blocks", reduction)
    return made


def division_blocks(divisions: Mapping[str, Division], names: Iterable[str]) -> list[tuple[str, tuple[Part, ...]]]:
    """Every block by name: `wte.weight.block7`, counted from 0; the tensor's own name where there is one block."""
    found: list[tuple[str, tuple[Part, ...]]] = []
    for name in names:
        reduction = divisions[name].reduction
        if reduction.num_blocks == 1:
            found.append((name, ((name, None),)))
            continue
        found += [(f"{name}.block{i}", parts) for i, parts in enumerate(indices_of(reduction, name))]
    return found
