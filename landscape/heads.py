"""Attention heads, found from the structure of the modules: projections, their shapes, the declared head counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .index import Part
from .projections import ParameterNames, Projection, linear_projection, multihead_projections

# What libraries call these things. A name only nominates a layer; its shape and the declared counts decide.
QUERY = ("q_proj", "query", "q_lin", "query_proj", "q_linear", "to_q", "wq", "Wq", "w_q", "W_q", "q_attn", "q")
KEY = ("k_proj", "key", "k_lin", "key_proj", "k_linear", "to_k", "wk", "Wk", "w_k", "W_k", "k")
VALUE = ("v_proj", "value", "v_lin", "value_proj", "v_linear", "to_v", "wv", "Wv", "w_v", "W_v", "v")
QUERY_KEY_VALUE = ("c_attn", "qkv", "qkv_proj", "to_qkv", "Wqkv", "wqkv")
KEY_VALUE = ("c_attn", "kv", "kv_proj", "to_kv", "Wkv", "wkv")
OUTPUT = ("out_proj", "o_proj", "c_proj", "out_lin", "to_out", "wo", "Wo", "w_o", "W_o", "o", "proj", "dense")
# Under this name some models stack [Q; K; V] and others [q; k; v] of head 0, then of head 1 and so on.
UNKNOWN_ORDER = ("query_key_value",)
NUM_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "heads")
NUM_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
HEAD_SIZE = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head", "key_value_proj_dim")


@dataclass(frozen=True)
class Attention:
    """The projections of one attention module by role (q, k, v, o) and its head counts."""

    path: str
    projections: Mapping[str, Projection]
    num_heads: int
    num_key_value_heads: int

    def parts(self) -> list[tuple[str, tuple[Part, ...]]]:
        """One entry per role and head: rows with their biases for q, k and v, columns for o."""
        found = []
        for role, projection in self.projections.items():
            if projection.weight is None:
                continue
            count = self.num_key_value_heads if role in "kv" else self.num_heads
            select = projection.inputs if role == "o" else projection.outputs
            size = (projection.num_inputs if role == "o" else projection.num_outputs) // count
            prefix = f"{self.path}.{role}" if self.path else role
            found += [(f"{prefix}.head{i}", select(i * size, (i + 1) * size)) for i in range(count)]
        return found


def head_parts(
    model: nn.Module, names: ParameterNames, head_count: int | Mapping[str, int] | None = None
) -> list[tuple[str, tuple[Part, ...]]]:
    """One entry per head of every attention module with a selected weight.

    Recognised: torch's `MultiheadAttention`; separate query, key and value layers, also with fewer key and value
    heads; one layer of stacked [Q; K; V] outputs, in either weight layout; a query layer and one of stacked [K; V].
    The output projection is divided where it reads heads x head size inputs, and left alone otherwise.
    """
    counts = head_count if isinstance(head_count, Mapping) else {} if head_count is None else {"*": head_count}
    for pattern, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"`head_count` is {count!r} for {pattern!r}; it must be a positive integer")
    found: list[tuple[str, tuple[Part, ...]]] = []
    used: set[str | None] = set()
    matched: set[str | None] = set()
    for path, module in model.named_modules():
        pattern = next((p for p in counts if fnmatchcase(path, p)), None)
        count = None if pattern is None else counts[pattern]
        if isinstance(module, nn.MultiheadAttention):
            attention = torch_attention(path, module, names, count)
        else:
            attention = other_attention(path, module, model, names, count)
        if attention is None:
            continue
        matched.add(pattern)
        # A tensor that several modules share belongs to the first.
        for name, parts in attention.parts():
            weight = parts[0][0]
            if weight not in used:
                found.append((name, tuple(part for part in parts if part[0] not in used)))
        used |= {tensor for p in attention.projections.values() for tensor in (p.weight, p.bias)}
    if not found:
        raise ValueError(
            "`blocks` is 'head' but no attention with a selected weight was found: looked for MultiheadAttention and "
            f"for linear layers called {', '.join(QUERY[:3] + QUERY_KEY_VALUE[:3])} ...; "
            "use 'layer' or 'neuron', or give your own Blocks"
        )
    if unmatched := sorted(set(counts) - matched):
        raise ValueError(f"`head_count` names {unmatched}, which matches no attention module")
    return found


def torch_attention(
    path: str, module: nn.MultiheadAttention, names: ParameterNames, count: int | None
) -> Attention | None:
    """torch's own module, whose head count is certain."""
    projections = multihead_projections(module, names)
    output = linear_projection(module.out_proj, names)
    if output is not None:
        projections["o"] = output
    if not any_selected(projections):
        return None
    heads = count or module.num_heads
    if module.embed_dim % heads:
        raise unclear(path, f"{heads} heads do not divide the {module.embed_dim} outputs of a projection")
    return Attention(path, projections, heads, heads)


def other_attention(
    path: str, module: nn.Module, model: nn.Module, names: ParameterNames, count: int | None
) -> Attention | None:
    """Any other module with attention projections, or None; raises where its structure leaves the heads open."""
    roles = zip("qkv", (QUERY, KEY, VALUE), strict=True)
    layers = {role: found for role, known in roles if (found := child(module, known, names)) is not None}
    if len(layers) < 3:
        fused = child(module, KEY_VALUE if "q" in layers else QUERY_KEY_VALUE, names)
        if fused is None:
            reject_unknown_order(path, module, names)
            return None
        layers["fused"] = fused
    if not any_selected(layers):
        return None
    reject_unknown_order(path, module, names)
    output = child(module, OUTPUT, names) or sibling_output(path, model, names)
    known = (NUM_HEADS, NUM_KEY_VALUE_HEADS, HEAD_SIZE)
    heads, key_value_heads, head_size = (declared_count(path, module, k, strict=count is None) for k in known)
    if heads is None and count is None:
        raise unclear(path, f"it has attention projections but none of {', '.join(NUM_HEADS[:4])} ...")
    if "fused" in layers:
        layers = divided(path, layers, heads or count or 1, key_value_heads, head_size, output)
    if count is not None:
        heads, key_value_heads, head_size = count, None, None
    assert heads is not None
    key_value_heads = agreed_key_value_heads(path, layers, heads, key_value_heads, head_size)
    value_size = layers["v"].num_outputs // key_value_heads
    if output is not None and (heads == 1 or output.num_inputs == heads * value_size):
        layers = {**layers, "o": output}
    return Attention(path, layers, heads, key_value_heads)


def reject_unknown_order(path: str, module: nn.Module, names: ParameterNames) -> None:
    """Raise where a fused layer may be ordered [Q; K; V] or head by head, and only the forward code tells which."""
    fused = child(module, UNKNOWN_ORDER, names)
    if fused is None and getattr(module, "multi_query", None) is False:
        fused = child(module, QUERY_KEY_VALUE, names)
    if fused is not None and fused.weight is not None:
        raise ValueError(
            f"the outputs of {fused.weight!r} are stacked [Q; K; V] in some models and head by head in others; "
            f"say which belong to a head of {path!r} with your own Blocks, or use 'layer' or 'neuron'"
        )


def any_selected(projections: Mapping[str, Projection]) -> bool:
    return any(projection.weight is not None for projection in projections.values())


def child(module: nn.Module, known: tuple[str, ...], names: ParameterNames) -> Projection | None:
    """The first child of a known name that is a linear layer, also as the first of a sequence."""
    for name in known:
        layer = module._modules.get(name)
        if isinstance(layer, nn.Sequential | nn.ModuleList) and len(layer) > 0:
            layer = layer[0]
        layer = getattr(layer, "base_layer", layer)  # inside an adapter, such as those of low rank
        projection = linear_projection(layer, names) if layer is not None else None
        if projection is not None:
            return projection
    return None


def sibling_output(path: str, model: nn.Module, names: ParameterNames) -> Projection | None:
    """The output projection of BERT and ViT: `attention.output.dense` beside the module that holds the queries."""
    if not path:
        return None
    parent = model.get_submodule(path.rpartition(".")[0])
    sibling = parent._modules.get("output")
    return child(sibling, ("dense",), names) if sibling is not None else None


def declared_count(path: str, module: nn.Module, known: tuple[str, ...], *, strict: bool) -> int | None:
    """The count that the module, or else its config, states under any of the known names; two answers are an error
    where it is `strict`, and none otherwise.
    """
    for place in (module, getattr(module, "config", None)):
        stated = {name: getattr(place, name, None) for name in known}
        counts = {name: v for name, v in stated.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0}
        if len(set(counts.values())) > 1:
            if not strict:
                return None
            raise unclear(path, f"it states different counts: {counts}")
        if counts:
            return next(iter(counts.values()))
    return None


def divided(
    path: str,
    layers: Mapping[str, Projection],
    heads: int,
    key_value_heads: int | None,
    head_size: int | None,
    output: Projection | None,
) -> dict[str, Projection]:
    """A fused layer cut into its stacked parts: [Q; K; V], or [K; V] beside a query layer."""
    fused = layers["fused"]
    rows = fused.num_outputs
    if "q" in layers:
        candidates = [0]
    else:
        shares = heads + 2 * (key_value_heads or heads)
        candidates = [
            heads * (head_size or 0),
            0 if output is None else output.num_inputs,
            0 if rows % shares else rows // shares * heads,
        ]
        candidates = [query for query in candidates if query > 0]
    query = next((query for query in candidates if rows > query and (rows - query) % 2 == 0), None)
    if query is None:
        raise unclear(path, f"its {rows} stacked outputs do not divide into queries and equally many keys and values")
    each = (rows - query) // 2
    return {
        "q": layers["q"] if "q" in layers else fused.within(0, query),
        "k": fused.within(query, query + each),
        "v": fused.within(query + each, query + 2 * each),
    }


def agreed_key_value_heads(
    path: str, layers: Mapping[str, Projection], heads: int, stated: int | None, head_size: int | None
) -> int:
    """The number of key and value heads that all shapes and statements agree on; raises where they contradict."""
    q, k, v = (layers[role].num_outputs for role in "qkv")
    size, rest = divmod(q, heads)
    if rest:
        raise unclear(path, f"{heads} heads do not divide the {q} query outputs")
    if head_size is not None and size != head_size:
        raise unclear(path, f"it states heads of size {head_size}, but {q} query outputs in {heads} heads give {size}")
    # One head is the request for whole projections, whatever the number of key and value heads.
    count, rest = (1, 0) if heads == 1 else divmod(k, size)
    if rest or count < 1:
        raise unclear(path, f"heads of size {size} do not divide the {k} key outputs")
    if stated is not None and count != stated:
        raise unclear(path, f"it states {stated} key and value heads, but {k} key outputs of size {size} give {count}")
    if heads % count or v % count:
        raise unclear(path, f"{count} key heads fit {heads} query heads and {v} value outputs unevenly")
    return count


def unclear(path: str, reason: str) -> ValueError:
    return ValueError(
        f"the heads of the attention module {path or '(root)'!r} are unclear: {reason}; pass head_count=, "
        f"an integer or a mapping such as {{{path!r}: 4}} (1 keeps q, k, v and o whole), or give your own Blocks"
    )
