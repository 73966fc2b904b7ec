"""The blocks that the authors' code of Adam-mini makes of parameter names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...landscape.divisions import Division
from ...landscape.reductions import Reduction

QUERY_KEY = ("k_proj", "q_proj", "wq", "wk", "query", "key")
ROWS = (
    *("embed", "embd", "wte"),
    *("lm_head", "output", "final_layer"),
    *("v_proj", "wv", "value"),
    *("o_proj", "wo", "attn.proj"),
    *("feed_forward", "linear", "mlp"),
)


def divisions_by_name(
    named_parameters: Iterable[tuple[str, Tensor]], *, width: int = 2048, num_heads: int = 32
) -> dict[str, Division]:
    """The blocks that version 1.1.1 of the authors' code makes of parameter names, for comparison with it.

    The lower-case name decides, in this order: with "bias" one block per entry; query and key names one per
    width² / num_heads entries; names of embeddings, output layers, values, attention outputs and MLPs one per index of
    the first dimension; all others one per tensor.

    Raises:
        ValueError: a query or key whose entries are no multiple of that.
    """
    made = {}
    for name, p in named_parameters:
        shape, lower = tuple(p.shape), name.lower()
        if "bias" in lower:
            made[name] = Division(name, "", "per entry", Reduction.entries(shape))
        elif any(key in lower for key in QUERY_KEY):
            size = width * width // num_heads
            if p.numel() % size:
                raise ValueError(f"{name!r} has {p.numel()} entries, no multiple of width² / num_heads = {size}")
            labels = (torch.arange(p.numel()) // size).reshape(shape)
            made[name] = Division(name, "", f"per {size} entries", Reduction.labelled(labels))
        elif any(key in lower for key in ROWS):
            made[name] = Division(name, "", "per row", Reduction.outputs(shape, 0))
        else:
            made[name] = Division(name, "", "per tensor", Reduction.whole(shape))
    return made
