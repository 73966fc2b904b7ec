"""Adam-mini: Adam with one second moment per dense block of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ...landscape.blocks import Partition
from ...landscape.blocks import partition as partition_of
from ...landscape.divisions import Division, Unmatched, Vectors, adam_mini_divisions, by_shape, divisions_of
from ...landscape.reductions import Reduction
from ...landscape.selection import near_names
from .blockwise_adam import BlockwiseAdam
from .option_checks import check_choice

# A partition may be given as blocks, by the name of a kind, tensor by tensor, or as a function of name and tensor.
PartitionChoice = (
    str | Partition | Mapping[str, "Division | Reduction"] | Callable[[str, Tensor], "Division | Reduction"]
)


class AdamMini(BlockwiseAdam):
    r"""Adam with a single second moment for each block of weights.

    m ← β1 m + (1 − β1) g, v_b ← β2 v_b + (1 − β2) mean_b(g²),
    θ ← (1 − ηλ) θ − η (m / (1 − β1^t)) / (√v_b / √(1 − β2^t) + ε).

    With one-entry blocks it is AdamW. With all of the parameters in one block and β1 = 0 it is gradient descent
    normalised by the root mean square of the gradient.

    Args:
        params: Parameters, named ones or groups.
        lr: η.
        betas: (β1, β2).
        eps: ε.
        weight_decay: λ, decoupled, of tensors with two or more dimensions; see `decay_vectors`.
        decay_vectors: Whether vectors and scalars decay too. The authors' code leaves out whatever has "norm", "ln" or
            "bias" in its name; here the shape decides, which is the same for the layers of a transformer.
        model: The module that the parameters belong to. Its structure gives the blocks: heads of queries and keys,
            outputs of the other linear layers, tokens of embeddings; see `adam_mini_divisions`.
        partition: Instead: "adam-mini" (the default with a model), "parameter", "head", "neuron" or "layer", kinds of
            `landscape.blocks.partition`; a `Partition`; or a mapping or function that gives a `Reduction` for the
            tensor of a name, such as `adam_mini_names.divisions_by_name`, the rules of the authors' code. A block
            that spans several tensors has one second moment in each.
            None without a model: one block per row of a matrix, one per tensor otherwise.
        vectors: With the structure's blocks: "paper" (biases per entry, norm weights and other vectors one per tensor,
            as in the authors' code), "entries", "tensor".
        unmatched: With the structure's blocks, for matrices of unknown role: "error", "rows", "tensor".
        head_count: Of query heads, where the model does not say it.

    Raises:
        ValueError: an option out of range; a matrix without a known role; heads that the structure does not tell; a
            parameter that is not in the model or the partition.

    Source: Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, ICLR 2025. The blocks
    differ from those of the authors' code (version 1.1.1) where names mislead it, as for torch's MultiheadAttention,
    fused or transposed layers, and heads whose size times count is not the width.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay_vectors: bool = False,
        model: nn.Module | None = None,
        partition: PartitionChoice | None = None,
        vectors: Vectors = "paper",
        unmatched: Unmatched = "error",
        head_count: int | Mapping[str, int] | None = None,
    ) -> None:
        check_choice("vectors", vectors, ("paper", "entries", "tensor"))
        check_choice("unmatched", unmatched, ("error", "rows", "tensor"))
        if model is None and isinstance(partition, str):
            raise ValueError(
                f"`partition` is {partition!r}, which is read from the structure of `model`; give that too"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` is a {type(model).__name__}; give the module whose parameters are optimized, or None"
            )
        self.structural: dict[str, Any] = {"head_count": head_count, "vectors": vectors, "unmatched": unmatched}
        self.partition = partition
        self._given: Mapping[str, Any] | Callable[[str, Tensor], Any] | None = None
        if isinstance(partition, Partition):
            self._given = divisions_of(partition)
        elif not isinstance(partition, str):
            self._given = partition
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay_vectors": decay_vectors,
        }
        super().__init__(params, defaults, model)

    def read_structure(self, model: nn.Module) -> None:
        if self.partition in (None, "adam-mini"):
            self._given = adam_mini_divisions(model, **self.structural)
        elif isinstance(self.partition, str):
            blocks = partition_of(model, self.partition, head_count=self.structural["head_count"])
            self._given = divisions_of(blocks)

    def division(self, p: Tensor, name: str) -> Division:
        if self._given is None:
            return by_shape(name, p.shape)
        if callable(self._given):
            return _named(name, self._given(name, p))
        if name not in self._given:
            raise ValueError(
                f"`partition` has no blocks for {name!r}; near it: {near_names(name, self._given)}. Pass "
                "model.named_parameters(), or `model`, so that parameters have their names"
            )
        return _named(name, self._given[name])


def _named(name: str, given: Any) -> Division:
    if isinstance(given, Division):
        return given
    if not isinstance(given, Reduction):
        raise TypeError(
            f"`partition` gives a {type(given).__name__} for {name!r}; it must give a Reduction or a Division"
        )
    return Division(name, "", f"{given.num_blocks} given blocks", given)
