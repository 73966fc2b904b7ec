"""The linear maps inside a model as (parameter name, index) parts: their outputs, inputs and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .index import Part

TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OUTPUTS_FIRST = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ParameterNames:
    """Names of the selected parameters by tensor identity, so that tied and wrapped ones are found too.

    Args:
        model: The module tree.
        parameters: The selected tensors by name. Copies of the model's own are recognised by their names.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._by_id = {id(tensor): name for name, tensor in parameters.items()}
        self.aliases: dict[str, str] = {}
        tree = list(model.named_parameters(remove_duplicate=False))
        for name, tensor in tree:
            if name in parameters:
                self._by_id.setdefault(id(tensor), name)
        for name, tensor in tree:
            if id(tensor) in self._by_id:
                self.aliases[name] = self._by_id[id(tensor)]

    def of(self, tensor: object) -> str | None:
        """The name of a tensor, or None when it is not a selected parameter."""
        return self._by_id.get(id(tensor))


@dataclass(frozen=True)
class Projection:
    """Outputs [start, stop) of a linear map.

    `weight` has its outputs along `axis` and `num_inputs` inputs along the other; output i has the entry
    `bias_start + i - start` of `bias`. Either is None where there is none among the selected parameters.
    """

    weight: str | None
    axis: int
    start: int
    stop: int
    num_inputs: int
    bias: str | None = None
    bias_start: int = 0

    @property
    def num_outputs(self) -> int:
        return self.stop - self.start

    def outputs(self, first: int, last: int) -> tuple[Part, ...]:
        """Weights and biases of the outputs [first, last), counted from `start`."""
        parts: list[Part] = []
        if self.weight is not None:
            rows = slice(self.start + first, self.start + last)
            parts.append((self.weight, (slice(None),) * self.axis + (rows,)))
        if self.bias is not None:
            parts.append((self.bias, (slice(self.bias_start + first, self.bias_start + last),)))
        return tuple(parts)

    def inputs(self, first: int, last: int) -> tuple[Part, ...]:
        """Weights that read the inputs [first, last)."""
        if self.weight is None:
            return ()
        box = [slice(self.start, self.stop)] * 2
        box[1 - self.axis] = slice(first, last)
        return ((self.weight, tuple(box)),)

    def within(self, first: int, last: int) -> Projection:
        """The outputs [first, last) alone, counted from `start`."""
        return replace(self, start=self.start + first, stop=self.start + last, bias_start=self.bias_start + first)


def output_axis(module: nn.Module) -> int | None:
    """The axis of `module.weight` that counts outputs, or None where that is not known from the structure.

    Besides torch's own layers: anything whose `in_features` and `out_features` agree with the weight's shape, and
    the transposed `Conv1D` of GPT-2, known by its `nf`.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(module, OUTPUTS_FIRST):
        # A subclass may have its weight the other way.
        turned = tuple(weight.shape) == features[::-1] != features
        return 1 if turned and isinstance(module, nn.Linear) else 0
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return 1
    if weight.ndim != 2:
        return None
    if weight.shape[1] == getattr(module, "nf", None):
        return 1
    if tuple(weight.shape) == features:
        return 0
    return 1 if tuple(weight.shape) == features[::-1] else None


def linear_projection(module: nn.Module, names: ParameterNames) -> Projection | None:
    """All outputs of a linear layer with a two-dimensional weight, or None for any other module."""
    axis = output_axis(module)
    weight: Tensor | None = getattr(module, "weight", None)
    if axis is None or weight is None or weight.ndim != 2:
        return None
    bias = names.of(getattr(module, "bias", None))
    return Projection(names.of(weight), axis, 0, weight.shape[axis], weight.shape[1 - axis], bias)


def multihead_projections(module: nn.MultiheadAttention, names: ParameterNames) -> dict[str, Projection]:
    """q, k and v inside torch's own attention, whose weights may be fused."""
    projections = {}
    outputs = module.embed_dim
    bias = names.of(module.in_proj_bias)
    fused: Tensor | None = module.in_proj_weight
    for i, role in enumerate("qkv"):
        weight: Tensor = getattr(module, f"{role}_proj_weight") if fused is None else fused
        start = 0 if fused is None else i * outputs
        projections[role] = Projection(names.of(weight), 0, start, start + outputs, weight.shape[1], bias, i * outputs)
    return projections


def neuron_parts(model: nn.Module, names: ParameterNames) -> list[tuple[str, tuple[Part, ...]]]:
    """One entry per output of every linear layer and convolution: its weights with its bias.

    Embeddings, also those tied to a linear layer, and all other tensors are not listed; neither is a layer whose
    weight is not selected. A tensor that two layers share belongs to the first.
    """
    used = {names.of(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    found: list[tuple[str, tuple[Part, ...]]] = []
    for path, module in model.named_modules():
        owned_elsewhere = frozenset(used)
        for where, neurons in outputs_of(path, module, names):
            weight = neurons[0][0][0]
            if weight in owned_elsewhere:
                continue
            for i, parts in enumerate(neurons):
                kept = tuple(part for part in parts if part[0] not in owned_elsewhere)
                found.append((f"{where}.neuron{i}" if where else f"neuron{i}", kept))
                used.update(name for name, _ in kept)
    return found


def outputs_of(path: str, module: nn.Module, names: ParameterNames) -> Iterator[tuple[str, list[tuple[Part, ...]]]]:
    """(path, parts of every output, weight first) of the layers with a selected weight in one module."""
    if isinstance(module, nn.MultiheadAttention):
        for role, projection in multihead_projections(module, names).items():
            if projection.weight is not None:
                where = f"{path}.{role}" if path else role
                yield where, [projection.outputs(i, i + 1) for i in range(projection.num_outputs)]
        return
    axis = output_axis(module)
    weight: Tensor | None = getattr(module, "weight", None)
    name = names.of(weight)
    if axis is None or weight is None or name is None:
        return
    bias = names.of(getattr(module, "bias", None))
    # A transposed convolution holds [inputs, outputs / groups, ...]: group g reads its own slice of inputs.
    groups = int(module.groups) if isinstance(module, TRANSPOSED_CONVOLUTIONS) else 1
    neurons: list[tuple[Part, ...]] = []
    for i in range(groups * weight.shape[axis]):
        group, j = divmod(i, weight.shape[axis])
        box: tuple[slice, ...] = (slice(j, j + 1),)
        if axis == 1:
            inputs = weight.shape[0] // groups
            box = (slice(group * inputs, (group + 1) * inputs), *box)
        parts: tuple[Part, ...] = ((name, box),)
        neurons.append(parts if bias is None else (*parts, (bias, (slice(i, i + 1),))))
    if neurons:
        yield path, neurons
