"""What every parameter tensor of a model is: its role and which of its axes counts outputs, from the module tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from .heads import QUERY_KEY_VALUE, UNKNOWN_ORDER, Attention, child, other_attention, torch_attention
from .projections import ParameterNames, linear_projection, output_axis
from .selection import unwrapped

ROLES = (
    "query",
    "key",
    "value",
    "attention output",
    "fused qkv",
    "token embedding",
    "position embedding",
    "head",
    "input",
    "up",
    "down",
    "linear",
    "convolution",
    "recurrent",
    "norm",
    "bias",
    "other",
)
NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
_LONG = {"q": "query", "k": "key", "v": "value"}


class Segment(NamedTuple):
    """Outputs [start, stop) of a tensor, all of one role. `num_heads` is None where they are not divided into heads."""

    role: str
    start: int
    stop: int
    num_heads: int | None = None


@dataclass(frozen=True)
class TensorRole:
    """One parameter tensor.

    Attributes:
        name, shape: Of the parameter; tied ones appear once.
        role: One of `ROLES`. "fused qkv" is any layer whose outputs have several of the roles query, key, value.
        axis: Which axis counts outputs (tokens or positions for an embedding); None where that is unknown.
        segments: The outputs by role, in order; a single one unless fused; empty where `axis` is None or the order of
            fused outputs is unknown.
        problem: Why heads could not be told apart, or "".
    """

    name: str
    shape: tuple[int, ...]
    role: str
    axis: int | None = None
    segments: tuple[Segment, ...] = ()
    problem: str = ""

    @property
    def is_convolution(self) -> bool:
        return self.axis is not None and len(self.shape) > 2 and self.role in ("convolution", "input")


def structure(model: nn.Module, *, head_count: int | Mapping[str, int] | None = None) -> dict[str, TensorRole]:
    """The role of every parameter, frozen ones too, by name in `named_parameters` order.

    The structure decides:

    - attention: torch's MultiheadAttention, and modules with query, key and value layers or a fused one whose shapes
      and declared head counts agree, as in `landscape.heads`;
    - "token embedding" and "position embedding": `nn.Embedding` modules, and learned positions that are bare
      parameters. Only positions are told by a name, one with "pos" or "wpe" in it; a weight that an embedding shares
      with the output layer is a token embedding in any case;
    - "head": a linear layer of the shape of the token embedding, or else the last linear layer of the tree unless
      it belongs to an attention or to a pair of up and down;
    - "up" and "down": linear layers d -> h and h -> d with h > d side by side, or in modules that are;
    - "input": the first linear layer or convolution of a model without token embedding;
    - "convolution", "recurrent", "norm", "bias" by the type of the module and what the tensor is in it;
    - "linear": any other linear layer in either weight layout; "other": the rest.

    Args:
        model: A module; wrappers such as DistributedDataParallel are looked through.
        head_count: Of query heads, where the model does not say it; by glob of attention modules if they differ.
    """
    return _Reader(unwrapped(model), head_count).read()


class _Reader:
    def __init__(self, tree: nn.Module, head_count: int | Mapping[str, int] | None) -> None:
        self.tree = tree
        self.parameters = dict(tree.named_parameters())
        self.names = ParameterNames(tree, self.parameters)
        self.head_count = (
            head_count if isinstance(head_count, Mapping) else {} if head_count is None else {"*": head_count}
        )
        self.found: dict[str, TensorRole] = {}

    def read(self) -> dict[str, TensorRole]:
        modules = list(self.tree.named_modules())
        for path, module in modules:
            self._attention(path, module)
        for path, module in modules:
            self._embedding(path, module)
        self._linear_layers(modules)
        for path, module in modules:
            self._small_tensors(path, module)
        rest = {name: TensorRole(name, tuple(p.shape), "other") for name, p in self.parameters.items()}
        return {name: self.found.get(name, rest[name]) for name in self.parameters}

    def _add(
        self, weight: object, role: str, axis: int | None, segments: Sequence[Segment] = (), problem: str = ""
    ) -> None:
        name = self.names.of(weight)
        if name is None or name in self.found:
            return
        shape = tuple(self.parameters[name].shape)
        if axis is not None and not segments and not problem:
            segments = (Segment(role, 0, shape[axis]),)
        self.found[name] = TensorRole(name, shape, role, axis, tuple(segments), problem)

    def _attention(self, path: str, module: nn.Module) -> None:
        count = next((n for pattern, n in self.head_count.items() if fnmatchcase(path, pattern)), None)
        problem = ""
        try:
            attention = self._read_attention(path, module, count)
        except ValueError as error:
            problem = str(error)
            try:
                attention = self._read_attention(path, module, 1)
            except ValueError:
                fused = child(module, (*UNKNOWN_ORDER, *QUERY_KEY_VALUE), self.names)
                if fused is not None and fused.weight is not None:
                    self._add(self.parameters[fused.weight], "fused qkv", fused.axis, problem=problem)
                return
        if attention is None:
            return
        segments: dict[str, list[Segment]] = {}
        axes: dict[str, int] = {}
        for role, projection in attention.projections.items():
            if projection.weight is None or projection.weight in self.found:
                continue
            axes[projection.weight] = projection.axis
            heads = attention.num_heads if role == "q" else attention.num_key_value_heads
            divided = None if problem or role not in _LONG else heads
            segment = Segment(_LONG.get(role, "attention output"), projection.start, projection.stop, divided)
            segments.setdefault(projection.weight, []).append(segment)
        for name, parts in segments.items():
            parts.sort(key=lambda segment: segment.start)
            role = parts[0].role if len(parts) == 1 else "fused qkv"
            self._add(self.parameters[name], role, axes[name], parts, problem)

    def _read_attention(self, path: str, module: nn.Module, count: int | None) -> Attention | None:
        if isinstance(module, nn.MultiheadAttention):
            return torch_attention(path, module, self.names, count)
        return other_attention(path, module, self.tree, self.names, count)

    def _embedding(self, path: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return
        shared = any(
            getattr(other, "weight", None) is module.weight
            for other in self.tree.modules()
            if not isinstance(other, nn.Embedding | nn.EmbeddingBag)
        )
        positions = _says_position(path.rpartition(".")[2]) and not shared
        self._add(module.weight, "position embedding" if positions else "token embedding", 0)

    def _linear_layers(self, modules: list[tuple[str, nn.Module]]) -> None:
        layers: dict[str, tuple[Tensor, int]] = {}
        for path, module in modules:
            axis = output_axis(module)
            weight: Tensor | None = getattr(module, "weight", None)
            name = self.names.of(weight)
            if axis is None or weight is None or name is None or name in self.found:
                continue
            layers.setdefault(path, (weight, axis))
        vocabularies = {r.shape for r in self.found.values() if r.role == "token embedding"}
        flat = {path: (w.shape[a], w.shape[1 - a]) for path, (w, a) in layers.items() if w.ndim == 2}
        heads = {path for path, (outputs, inputs) in flat.items() if (outputs, inputs) in vocabularies}
        pairs = up_and_down({path: shape for path, shape in flat.items() if path not in heads})
        last = next((path for path in reversed([p for p, _ in modules]) if self._is_linear(path)), None)
        first = None if vocabularies else next(iter(layers), None)
        for path, (weight, axis) in layers.items():
            if path in heads or (path == last and path not in pairs and weight.ndim == 2):
                role = "head"
            elif path in pairs:
                role = pairs[path]
            elif path == first:
                role = "input"
            else:
                role = "convolution" if _is_convolution(self.tree.get_submodule(path)) else "linear"
            self._add(weight, role, axis)

    def _is_linear(self, path: str) -> bool:
        return linear_projection(self.tree.get_submodule(path), self.names) is not None

    def _small_tensors(self, path: str, module: nn.Module) -> None:
        is_norm = isinstance(module, NORMS) or "norm" in type(module).__name__.lower()
        for key, p in module._parameters.items():
            if p is None:
                continue
            if "bias" in key:
                self._add(p, "bias", None)
            elif isinstance(module, nn.RNNBase) and p.ndim == 2:
                self._add(p, "recurrent", 0)
            elif is_norm:
                self._add(p, "norm", None)
            elif p.ndim >= 2 and _says_position(key):
                self._add(p, "position embedding", p.ndim - 2)


def up_and_down(layers: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Which of the linear layers, (outputs, inputs) by path, widen d -> h and which bring h -> d back.

    A partner of mirrored shape lies in the same module, or in the same module's children, as in BERT.
    """
    below: dict[str, set[tuple[int, int]]] = {}
    for path, shape in layers.items():
        for place in _nearest(path):
            below.setdefault(place, set()).add(shape)
    roles = {}
    for path, (outputs, inputs) in layers.items():
        if outputs != inputs and any((inputs, outputs) in below[place] for place in _nearest(path)):
            roles[path] = "up" if outputs > inputs else "down"
    return roles


def _nearest(path: str) -> list[str]:
    """Paths of the module that holds it and of the one above."""
    pieces = path.split(".")[:-1] if path else []
    return [".".join(pieces[:i]) for i in range(len(pieces), max(len(pieces) - 2, -1), -1)]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _says_position(name: str) -> bool:
    return any(mark in name.lower() for mark in ("pos", "wpe"))
