"""Blocks of coordinates, in terms of (parameter name, index), and partitions of a model into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .divisions import adam_mini_divisions, division_blocks
from .heads import head_parts
from .index import Index, Part, assign, checked_part, checked_size, flat_positions, select
from .layout import Layout
from .projections import ParameterNames, neuron_parts
from .selection import near_names, selected_parameters, unwrapped

KINDS = ("parameter", "layer", "head", "neuron", "adam-mini")
# Name of the block of the model's own tensors, those that belong to no sub-module.
ROOT = "(root)"

Blocks = str | Sequence["str | Block"] | Mapping[str, "str | Sequence[str] | Block"]


@dataclass(frozen=True, eq=False)
class Block:
    """A named set of coordinates: parts of parameters.

    The coordinates are ordered part by part, row-major inside each part.

    Args:
        name: How results refer to it.
        parts: Pairs (parameter name, index). An index is None for the whole parameter, a tuple of slices (one per
            leading dimension, positive steps), or flat row-major positions inside the parameter (a 1-D integer
            tensor; a boolean mask of the parameter's shape is converted). A bare name stands for the whole parameter.

    Example:
        >>> Block("first rows", [("fc.weight", (slice(0, 3),)), "fc.bias"]).parameters
        ('fc.weight', 'fc.bias')
    """

    name: str
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            raise TypeError(f"`parts` is the string {self.parts!r}; give a sequence of names or (name, index) pairs")
        object.__setattr__(self, "parts", tuple(checked_part(self.name, part) for part in self.parts))
        if not self.parts:
            raise ValueError(f"`parts` of block {self.name!r} is empty; a block needs at least one coordinate")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it touches, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.parts))

    def part_sizes(self, layout: Layout) -> list[int]:
        """Number of coordinates of every part; raises on a name or a place that the layout does not have."""
        sizes = []
        for name, index in self.parts:
            if name not in layout.names:
                known = near_names(name, layout.names)
                raise ValueError(f"block {self.name!r} names the unknown parameter {name!r}; near it: {known}")
            sizes.append(checked_size(self.name, name, shape_of(name, layout), index))
        return sizes

    def size(self, layout: Layout) -> int:
        """Number of coordinates."""
        return sum(self.part_sizes(layout))

    def indices(self, layout: Layout) -> Tensor:
        """Positions [size] of its coordinates in the flat vector of a layout (int64, on the CPU)."""
        self.part_sizes(layout)
        indices = torch.cat(
            [
                layout.offsets[layout.names.index(name)] + flat_positions(shape_of(name, layout), index)
                for name, index in self.parts
            ]
        )
        simple = len(self.parameters) == len(self.parts) and not any(isinstance(i, Tensor) for _, i in self.parts)
        if not simple and len(indices.unique()) != len(indices):
            raise ValueError(f"block {self.name!r} holds a coordinate twice; every coordinate may appear once")
        return indices

    def gather(self, tensors: Mapping[str, Tensor], *, batch_dims: int = 0) -> Tensor:
        """The block's coordinates [..., size] of tensors by name, each [..., *shape] with `batch_dims` leading axes."""
        pieces = [select(tensors[name], index, batch_dims) for name, index in self.parts]
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]

    def scatter(self, v: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Tensors [..., *shape] of the block's parameters, holding v [..., size] inside the block and 0 outside."""
        sizes = self.part_sizes(layout)
        if v.ndim < 1 or v.shape[-1] != sum(sizes):
            raise ValueError(f"`v` has shape {list(v.shape)}; block {self.name!r} needs [..., {sum(sizes)}]")
        batch = v.shape[:-1]
        tensors: dict[str, Tensor] = {}
        for (name, index), piece in zip(self.parts, v.split(sizes, dim=-1), strict=True):
            shape = (*batch, *shape_of(name, layout))
            if index is None:
                tensors[name] = piece.reshape(shape)
            else:
                assign(tensors.setdefault(name, v.new_zeros(shape)), index, piece)
        return tensors


class Partition(Mapping[str, Block]):
    """Blocks by name, in order, checked against a layout: every name known, no block empty, none overlapping.

    Args:
        blocks: In the order wanted; names must differ.
        layout: Of the flat vector that the blocks divide.
        overlap: Accept coordinates that lie in several blocks.
    """

    def __init__(self, blocks: Sequence[Block], layout: Layout, *, overlap: bool = False) -> None:
        if not blocks:
            raise ValueError("`blocks` is empty; give at least one block")
        self.layout = layout
        self._blocks: dict[str, Block] = {}
        for block in blocks:
            if block.name in self._blocks:
                raise ValueError(f"`blocks` has two blocks called {block.name!r}; names must differ")
            self._blocks[block.name] = block
        self.sizes = {name: block.size(layout) for name, block in self._blocks.items()}
        self._covered = self._check(overlap)

    def _check(self, overlap: bool) -> dict[str, int]:
        """Number of covered coordinates by parameter; raises on a coordinate claimed twice."""
        claims: dict[str, list[tuple[str, Index]]] = {}
        for block in self._blocks.values():
            for name, index in block.parts:
                claims.setdefault(name, []).append((block.name, index))
        covered = {}
        for name, claimed in claims.items():
            shape = shape_of(name, self.layout)
            if len(claimed) == 1 and claimed[0][1] is None:
                covered[name] = shape.numel()
                continue
            mask = torch.zeros(shape, dtype=torch.bool)
            for owner, index in claimed:
                view = mask.view(-1)[index] if isinstance(index, Tensor) else mask[index or ()]
                twice = isinstance(index, Tensor) and len(index.unique()) != len(index)
                if twice or (not overlap and bool(view.any())):
                    others = [other for other, _ in claimed if other != owner] or [owner]
                    raise ValueError(
                        f"block {owner!r} shares coordinates of {name!r} with {others[0]!r}; "
                        "blocks must be disjoint: change them, or pass overlap=True if the overlap is meant"
                    )
                if isinstance(index, Tensor):
                    mask.view(-1)[index] = True
                else:
                    mask[index or ()] = True
            covered[name] = int(mask.sum())
        return covered

    def __getitem__(self, name: str) -> Block:
        if name not in self._blocks:
            raise KeyError(f"no block {name!r}; near it: {near_names(name, self._blocks)}")
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_covered(self) -> int:
        """Number of coordinates that lie in some block."""
        return sum(self._covered.values())

    @property
    def coverage(self) -> float:
        """Share of the layout's coordinates that lie in some block, 1.0 for a true partition."""
        return self.num_covered / self.layout.num_parameters

    @property
    def uncovered(self) -> dict[str, int]:
        """Number of coordinates outside all blocks, by parameter, where there are any."""
        left = {n: size - self._covered.get(n, 0) for n, size in zip(self.layout.names, self.layout.sizes, strict=True)}
        return {name: count for name, count in left.items() if count}

    def labels(self) -> Tensor:
        """Number of the block of every coordinate [n] (the last one where blocks overlap); -1 outside all blocks."""
        labels = torch.full((self.layout.num_parameters,), -1, dtype=torch.int64)
        for i, block in enumerate(self._blocks.values()):
            labels[block.indices(self.layout)] = i
        return labels

    def __repr__(self) -> str:
        return f"Partition({len(self)} blocks, {self.num_covered} of {self.layout.num_parameters} coordinates)"


def partition(
    model: Any,
    blocks: Blocks = "parameter",
    *,
    head_count: int | Mapping[str, int] | None = None,
    overlap: bool = False,
) -> Partition:
    """Divide the parameters of a model or an Objective into named blocks.

    The names are fixed:

    ===========  =============================================  =====================================================
    `blocks`     block names                                    coordinates
    ===========  =============================================  =====================================================
    "parameter"  the parameter's name, `fc1.weight`             one tensor
    "layer"      the owning module's path, `fc1`; "(root)"      all tensors that one module owns itself
    "head"       `h.0.attn.q.head3`: path of the attention      head 3 of the query (q), key (k) or value (v): its
                 module, role, head                             rows with their bias; of the output projection (o):
                                                                its columns. Key and value heads are counted on their
                                                                own (grouped queries). Other tensors: as "parameter"
    "neuron"     `fc1.neuron7`; `attn.q.neuron7` inside         an output of a linear layer or convolution: its
                 torch's MultiheadAttention                     weights with its bias. Embeddings, also tied ones,
                                                                and other tensors: as "parameter"
    "adam-mini"  `fc1.weight.block7`; the parameter's own name  one tensor, or a part of one: a head of a query or key,
                 where it is one block                          an output of another linear layer, a token of an
                                                                embedding, an entry of a bias; see
                                                                `adam_mini_divisions`
    ===========  =============================================  =====================================================

    Tied parameters appear once, under the name that `named_parameters` gives them. Frozen ones do not appear.

    Args:
        model: An Objective, an operator made from one, or a module (its parameters that require a gradient).
        blocks: A kind from the table; a glob or several, where every outermost module or parameter that matches is
            one block (`"h.*.attn"`, `"*.weight"`; `*` also matches dots); a mapping from block names to names or
            globs of parameters and modules, whose union is the block; or a sequence of `Block`. Only kinds cover
            everything: see `Partition.coverage`.
        head_count: For "head" and "adam-mini": number of query heads, where the model does not say it; by glob of
            attention modules if they differ. 1 gives whole q, k, v, o.
        overlap: Accept blocks that share coordinates.
    """
    layout, parameters, tree = read(model)
    names = None if tree is None else ParameterNames(tree, parameters)
    if head_count is not None and blocks not in ("head", "adam-mini"):
        raise ValueError(f"`head_count` is {head_count!r} but `blocks` is not 'head' or 'adam-mini'; leave it out")
    if isinstance(blocks, str) and blocks in ("head", "neuron", "adam-mini"):
        if tree is None or names is None:
            raise ValueError(
                f"`blocks` is {blocks!r} but there is no module to look into; use 'parameter' or a mapping"
            )
        if blocks == "adam-mini":
            found = division_blocks(adam_mini_divisions(tree, head_count=head_count), layout.names)
        else:
            found = head_parts(tree, names, head_count) if blocks == "head" else neuron_parts(tree, names)
        return with_rest(found, layout)
    if isinstance(blocks, str) and blocks == "parameter":
        return Partition([Block(name, ((name, None),)) for name in layout.names], layout)
    if isinstance(blocks, str) and blocks == "layer":
        layers: dict[str, list[Part]] = {}
        for name in layout.names:
            layers.setdefault(owner_of(name), []).append((name, None))
        return Partition([Block(name, tuple(parts)) for name, parts in layers.items()], layout)
    return Partition(user_blocks(blocks, layout, names.aliases if names else {}), layout, overlap=overlap)


def read(model: Any) -> tuple[Layout, Mapping[str, Tensor], nn.Module | None]:
    """Layout, selected parameters and module tree of a module, an Objective or an operator."""
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        parameters = selected_parameters(model, None)
        return Layout.of(parameters), parameters, model
    model = getattr(model, "objective", model)
    if not isinstance(getattr(model, "layout", None), Layout):
        raise TypeError(
            f"`model` is a {type(model).__name__}; pass an Objective, an operator made from one, or a module"
        )
    tree = getattr(model, "model", None)
    return model.layout, getattr(model, "parameters", {}), None if tree is None else unwrapped(tree)


def with_rest(found: list[tuple[str, tuple[Part, ...]]], layout: Layout) -> Partition:
    """The found blocks, and what they leave of every parameter under its name, in the order of the layout."""
    divided = Partition([Block(name, parts) for name, parts in found], layout) if found else {}
    touched = {name for block in divided.values() for name in block.parameters}
    rest = [Block(name, ((name, None),)) for name in layout.names if name not in touched]
    for name in touched & set(divided.uncovered) if isinstance(divided, Partition) else ():
        free = torch.ones(shape_of(name, layout), dtype=torch.bool)
        for block in divided.values():
            for parameter, index in block.parts:
                if parameter == name:
                    free[index or ()] = False
        rest.append(Block(name, ((name, free),)))
    position = {name: i for i, name in enumerate(layout.names)}
    blocks = sorted([*divided.values(), *rest], key=lambda block: position[block.parameters[0]])
    return Partition(blocks, layout)


def owner_of(parameter: str) -> str:
    """Path of the module that owns a parameter; a parametrised tensor belongs to the module it parametrises."""
    pieces = parameter.split(".")[:-1]
    if "parametrizations" in pieces:
        pieces = pieces[: pieces.index("parametrizations")]
    return ".".join(pieces) or ROOT


def user_blocks(blocks: Any, layout: Layout, aliases: Mapping[str, str]) -> list[Block]:
    """Blocks from globs, from a mapping of names, or as they are."""
    if isinstance(blocks, Mapping):
        return [
            Block(name, spec.parts if isinstance(spec, Block) else union_of(spec, layout, aliases))
            for name, spec in blocks.items()
        ]
    if isinstance(blocks, str | Block):
        blocks = [blocks]
    if not isinstance(blocks, Sequence):
        raise TypeError(f"`blocks` is a {type(blocks).__name__}; give one of {KINDS}, globs, Blocks or a mapping")
    result = []
    for spec in blocks:
        if isinstance(spec, Block):
            result.append(spec)
        elif isinstance(spec, str):
            result += [Block(name, parts) for name, parts in matches(spec, layout, aliases).items()]
        else:
            raise TypeError(
                f"`blocks` holds a {type(spec).__name__}; give Blocks or globs of module and parameter names"
            )
    return result


def union_of(spec: str | Sequence[str], layout: Layout, aliases: Mapping[str, str]) -> tuple[Part, ...]:
    """The parameters, in the order of the layout, that any of the names or globs covers."""
    patterns = [spec] if isinstance(spec, str) else list(spec)
    chosen = {name for p in patterns for parts in matches(p, layout, aliases).values() for name, _ in parts}
    return tuple((name, None) for name in layout.names if name in chosen)


def matches(pattern: str, layout: Layout, aliases: Mapping[str, str]) -> dict[str, tuple[Part, ...]]:
    """Whole parameters under every outermost module or parameter that a glob matches.

    A second name of a tied parameter counts only where the glob matches none of the first names.
    """
    for canonical in ({name: name for name in layout.names}, aliases):
        found: dict[str, dict[str, None]] = {}
        for name, parameter in canonical.items():
            pieces = name.split(".")
            paths = (".".join(pieces[:i]) for i in range(1, len(pieces) + 1))
            match = next((path for path in paths if fnmatchcase(path, pattern)), None)
            if match is not None:
                found.setdefault(match, {})[parameter] = None
        if found:
            return {match: tuple((name, None) for name in names) for match, names in found.items()}
    modules = {".".join(name.split(".")[:i]) for name in layout.names for i in range(1, name.count(".") + 1)}
    raise ValueError(
        f"`blocks`: {pattern!r} is none of {', '.join(KINDS)} and matches no module or parameter; "
        f"near it: {near_names(pattern, [*layout.names, *sorted(modules)])}"
    )


def shape_of(parameter: str, layout: Layout) -> torch.Size:
    return layout.shapes[layout.names.index(parameter)]
