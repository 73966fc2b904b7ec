"""Traced programs of derivatives made cheaper without a change of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

ATEN = torch.ops.aten
# Zeros without memory that forward mode hands around, and the sums that they leave as they are.
ZEROS = ATEN._efficientzerotensor.default
SUMS = (ATEN.add.Tensor, ATEN.sub.Tensor)
# Derivatives f'(x) · t as torch writes them: (t, x, ...) -> t times something that only x decides, and costs more.
SCALED_BY_DERIVATIVE = (
    ATEN.gelu_backward.default,
    ATEN.silu_backward.default,
    ATEN.mish_backward.default,
    ATEN.softplus_backward.default,
    ATEN.hardswish_backward.default,
)


def rewrite(graph: Graph, tangents: Iterable[Node]) -> None:
    """Rewrites a graph in place: the same numbers up to rounding, in fewer operations that depend on `tangents`.

    Copies that change neither type nor values go, and zeros that are added; equal operations are done once, and the
    derivatives of activations are taken where they do not depend on `tangents`. The graph must be free of in-place
    operations.
    """
    _drop_copies(graph)
    _drop_zeros(graph)
    _share(graph)
    _hoist(graph, tangents)
    graph.eliminate_dead_code()


def _calls(graph: Graph, keep: Callable[[Node], bool]) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and keep(node)]


def _drop_copies(graph: Graph) -> None:
    for node in _calls(graph, lambda node: node.target is ATEN._to_copy.default):
        before, after = (n.meta.get("val") for n in (node.args[0], node))  # type: ignore[union-attr]
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        if (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


def _drop_zeros(graph: Graph) -> None:
    """x + 0 and x − 0 are x; zeros that are left get memory, without which they could not be kept or compiled."""
    for zeros in _calls(graph, lambda node: node.target is ZEROS):
        for node in list(zeros.users):
            x = next((a for a in node.args if isinstance(a, Node) and a is not zeros), None)
            unchanged = node.target in SUMS and (node.target is SUMS[0] or node.args[1] is zeros) and not node.kwargs
            if unchanged and x is not None and _same(x, node):
                node.replace_all_uses_with(x)
                graph.erase_node(node)
        zeros.target = ATEN.zeros.default


def _share(graph: Graph) -> None:
    """Operations with equal arguments are done once."""
    seen: dict[Any, Node] = {}
    for node in _calls(graph, _is_deterministic):
        key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_deterministic(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    drawn = torch.Tag.nondeterministic_seeded in node.target.tags
    return not drawn and not node.target._schema.is_mutable and not node.target.name().startswith("aten::empty")


def _hoist(graph: Graph, tangents: Iterable[Node]) -> None:
    """f'(x) · t as a product with f'(x), which is then constant for all t."""
    depends = set(tangents)
    for node in graph.nodes:
        if any(argument in depends for argument in node.all_input_nodes):
            depends.add(node)
    for node in _calls(graph, lambda node: node.target in SCALED_BY_DERIVATIVE):
        tangent, point = node.args[:2]
        if tangent not in depends or point in depends or not isinstance(point, Node):
            continue
        with graph.inserting_before(node):
            ones = graph.call_function(ATEN.ones_like.default, (point,))
            slope = graph.call_function(node.target, (ones, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
            product = graph.call_function(ATEN.mul.Tensor, (tangent, slope))
        node.replace_all_uses_with(product)
        graph.erase_node(node)


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes have one shape and type; unknown counts as no."""
    kinds = [(getattr(n.meta.get("val"), "shape", None), getattr(n.meta.get("val"), "dtype", None)) for n in (a, b)]
    return kinds[0][0] is not None and kinds[0] == kinds[1]
