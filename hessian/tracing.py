"""Directional derivatives as traced programs, cut into what depends on the direction and what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, jvp
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..landscape.memory import storages
from .rewriting import rewrite

ATEN = torch.ops.aten
# They return their argument itself.
NO_OPERATIONS = (ATEN.detach.default, ATEN.alias.default, ATEN.lift_fresh.default)


class TangentProgram:
    r"""d/dε f(θ + ε v) at ε = 0 for a function f of tensors, as two straight-line programs.

    The primal program runs once per θ and gives f(θ) with every intermediate that the linear one needs; the linear
    program maps v to the derivative and costs no more than what depends on v. One trace serves every θ (and every
    value of `others`) of the same shapes.

    A trace holds what happened at the example: Python control flow, numbers read from tensors, random draws and
    tensors that the function captures stay as they were. Whoever uses it at another θ has to compare `Linear.value`
    with the function itself.
    """

    def __init__(self, graph: Graph, root: torch.nn.Module, num_primals: int, num_others: int) -> None:
        self.num_primals, self.num_others = num_primals, num_others
        self._primal, self.linear, self._kept, self._num_values = _cut(graph, root, num_primals, num_others)

    @classmethod
    def trace(
        cls, function: Callable[..., Any], primals: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> TangentProgram:
        """Traces jvp(function) at `primals`.

        Args:
            function: `function(*primals, *others)` -> tensor or tuple of tensors.
            primals: Where tangents enter; their values are examples.
            others: Inputs that stay constant (data, buffers) and may be others at every `linearise`.

        Raises:
            RuntimeError and others of torch's: an operation has no forward derivative, or a number is read out of a
            tensor that depends on the inputs.
        """
        primals = tuple(p.detach() for p in primals)
        others = tuple(t.detach() for t in others)
        n = len(primals)

        def derivative(*inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            given, constant, tangents = inputs[:n], inputs[n : n + len(others)], inputs[n + len(others) :]
            value, tangent = jvp(lambda *p: function(*p, *constant), given, tangents)[:2]
            return (value, tangent) if isinstance(value, tuple) else ((value,), (tangent,))

        # Tracing tells inputs apart by identity and would take a tangent that is its primal for the primal.
        inputs = (*primals, *others, *(torch.zeros_like(p) for p in primals))
        traced = _traced(derivative, inputs)
        _write_in_place_operations_out(traced.graph)
        if any(_mutates(node) for node in traced.graph.nodes):
            traced = _traced(functionalize(derivative, remove="mutations"), inputs)
            _write_in_place_operations_out(traced.graph)
        left = {str(node.target) for node in traced.graph.nodes if _mutates(node)}
        if left:
            raise RuntimeError(f"in-place operations on tensors that live on cannot be traced: {sorted(left)}")
        _simplify(traced.graph)
        rewrite(traced.graph, [node for node in traced.graph.nodes if node.op == "placeholder"][n + len(others) :])
        return cls(traced.graph, traced, n, len(others))

    def linearise(self, primals: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Linear:
        """f and its derivative at `primals`."""
        if (len(primals), len(others)) != (self.num_primals, self.num_others):
            raise ValueError(
                f"`primals` and `others` hold {len(primals)} and {len(others)} tensors; the program was traced with "
                f"{self.num_primals} and {self.num_others}"
            )
        with torch.no_grad():
            results = self._primal(*(t.detach() for t in (*primals, *others)))
        values, kept = results[: self._num_values], results[self._num_values :]
        return Linear(self.linear, values, kept)

    @property
    def operations(self) -> int:
        """Operations of the linear program: what compiling it costs grows with them."""
        return sum(node.op == "call_function" for node in self.linear.graph.nodes)


class Linear:
    """v -> the derivative along v, at the point where a `TangentProgram` was linearised.

    Args:
        program: `program(*kept, *tangents)`.
        value: f(θ), a tuple of tensors.
        kept: Intermediates of the primal program.
    """

    def __init__(self, program: Callable[..., tuple[Tensor, ...]], value: tuple[Tensor, ...], kept: tuple) -> None:
        self.program, self.value, self.kept = program, value, kept

    def __call__(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.program(*self.kept, *tangents)

    def num_bytes(self, without: Sequence[Tensor] = ()) -> int:
        """Memory that the kept intermediates hold, apart from that of the tensors `without`."""
        others = storages(without)
        return sum(held for address, held in storages(self.kept).items() if address not in others)


def _traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The operations of `function`: on shapes alone where they suffice, which takes no memory, else on the tensors."""

    def on_shapes() -> GraphModule:
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)

    try:
        return on_shapes()
    except Exception as error:  # shapes that depend on values, operations without a rule for shapes, picky models
        try:
            on_shapes()
        except Exception:
            return make_fx(function)(*inputs)
        raise error  # it does not come again: the function's own, not the trace's


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _write_in_place_operations_out(graph: Graph) -> None:
    """x.div_(y) becomes a new tensor x / y where nothing else looks at x: a program run twice must not change it."""
    for node in list(graph.nodes):
        if not _mutates(node):
            continue
        schema, base = node.target._schema, node.args[0]
        first = schema.arguments[0].alias_info
        alone = sum(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments) == 1
        if not alone or first is None or not first.is_write or not isinstance(base, Node):
            continue
        packet = getattr(ATEN, schema.name.removeprefix("aten::").removesuffix("_"), None)
        pure = getattr(packet, schema.overload_name or "default", None)
        kinds = {n.meta["val"].dtype for n in (base, *node.all_input_nodes) if isinstance(n.meta.get("val"), Tensor)}
        if pure is None or pure._schema.is_mutable or not _owns_memory(base) or len(kinds) != 1:
            continue
        earlier = _up_to(graph, node)
        if any(_aliases(user) for user in base.users if user is not node and user in earlier):
            continue
        later = set(graph.nodes) - earlier
        node.target = pure
        base.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _up_to(graph: Graph, last: Node) -> set[Node]:
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        if node is last:
            break
    return set(nodes)


def _aliases(node: Node) -> bool:
    """Whether a result shares memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def _owns_memory(node: Node) -> bool:
    return node.op == "call_function" and not _aliases(node)


def _simplify(graph: Graph) -> None:
    """Drops no-operations and whatever no output needs."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in NO_OPERATIONS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _cut(
    graph: Graph, root: torch.nn.Module, num_primals: int, num_others: int
) -> tuple[GraphModule, GraphModule, list[Node], int]:
    """The primal and the linear program of a traced derivative, the nodes handed over, and the number of values."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    tangents = inputs[num_primals + num_others :]
    output = next(node for node in graph.nodes if node.op == "output")
    values, derivatives = output.args[0]
    depends = set(tangents)
    for node in graph.nodes:
        if node is not output and any(argument in depends for argument in node.all_input_nodes):
            depends.add(node)
    wanted = {node for node in derivatives if isinstance(node, Node)}
    # Handed over: tensors that the linear part uses, and derivatives that do not depend on the tangents (zeros).
    kept = [
        node
        for node in graph.nodes
        if node not in depends
        and node.op != "output"
        and (node in wanted or any(user in depends for user in node.users))
    ]
    primal, linear = Graph(), Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node not in depends and node is not output:
            copies[node] = primal.node_copy(node, copies.__getitem__)
    primal.output(tuple(copies[node] for node in (*values, *kept)))
    copies = {}
    for i, node in enumerate(kept):
        copies[node] = linear.placeholder(f"kept_{i}")
    for i, node in enumerate(tangents):
        copies[node] = linear.placeholder(f"tangent_{i}")
    for node in graph.nodes:
        if node in depends and node not in copies:
            copies[node] = linear.node_copy(node, copies.__getitem__)
    linear.output(tuple(copies[node] for node in derivatives))
    primal.eliminate_dead_code()
    linear.eliminate_dead_code()
    return GraphModule(root, primal), GraphModule(torch.nn.Module(), linear), kept, len(values)
