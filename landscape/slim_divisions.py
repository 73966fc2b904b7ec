"""Second moments averaged over dimensions of each tensor: rules by role, name or slice, and the blocks they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import NamedTuple

from torch import nn

from .divisions import Averaged, Division, segment_piece
from .reductions import Piece, Reduction
from .selection import near_names
from .structure import ROLES, Segment, TensorRole, structure

# What is averaged over: "inputs" (fan in; one number per output), "outputs" (fan out), "both", dimensions of the
# tensor, or None for nothing.
Rule = Averaged | tuple[int, ...]
Rules = Mapping[str, Rule]

# Kalra et al. 2025, table 1. Inputs of an embedding are its channels: one number per token. "up" and "head" of a
# classifier are marked there as changing from task to task. All other roles are left whole.
TABLE: Rules = {
    "query": "inputs",
    "key": "inputs",
    "value": "outputs",
    "attention output": "outputs",
    "up": "outputs",
    "down": "outputs",
    "token embedding": "inputs",
    "position embedding": "inputs",
    "head": "inputs",
    "input": "inputs",
}


class Slice(NamedTuple):
    """A tensor, or the outputs of one role inside a fused one. `key` is `name` or `name:role`."""

    key: str
    tensor: TensorRole
    segment: Segment | None

    @property
    def role(self) -> str:
        return self.tensor.role if self.segment is None else self.segment.role

    @property
    def subsets(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every non-empty set of dimensions, after its rule: in words where inputs and outputs are known."""
        every = range(len(self.tensor.shape))
        sets = [dims for k in range(1, len(every) + 1) for dims in combinations(every, k)]
        known: tuple[Averaged, ...] = () if self.tensor.axis is None else ("inputs", "outputs", "both")
        words = {self.dims(word): str(word) for word in known}
        return [(words.get(dims, ",".join(map(str, dims))), dims) for dims in sets]

    def dims(self, rule: Rule) -> tuple[int, ...]:
        """The dimensions that a rule averages over.

        Raises:
            ValueError: dimensions that the tensor lacks; inputs or outputs where these are unknown.
        """
        n, axis = len(self.tensor.shape), self.tensor.axis
        if rule is None:
            return ()
        if rule == "both":
            return tuple(range(n))
        if isinstance(rule, str):
            if rule not in ("inputs", "outputs"):
                raise ValueError(
                    f"the rule for {self.key!r} is {rule!r}; it must be inputs, outputs, both, None or dimensions"
                )
            if axis is None:
                raise ValueError(
                    f"the rule for {self.key!r} is {rule!r}, but which axis counts its outputs is unknown; "
                    "pass `model`, or give dimensions such as (1,)"
                )
            return (axis,) if rule == "outputs" else tuple(d for d in range(n) if d != axis)
        dims = tuple(sorted(rule))
        if len(set(dims)) < len(dims) or not all(isinstance(d, int) and 0 <= d < n for d in dims):
            raise ValueError(f"the rule for {self.key!r} is {rule!r}; its {n} dimensions are counted from 0, each once")
        return dims


def slices(role: TensorRole) -> list[Slice]:
    """A tensor as one slice, or as one for each role inside it."""
    if len(role.segments) < 2:
        return [Slice(role.name, role, None)]
    return [Slice(f"{role.name}:{segment.role}", role, segment) for segment in role.segments]


def slim_division(role: TensorRole, rules: Rules) -> Division:
    """The blocks of one tensor under rules; see `slim_divisions`."""
    parts = slices(role)
    if role.name in rules and not any(part.key in rules for part in parts if part.key != role.name):
        parts = [Slice(role.name, role, None)]
    chosen: list[tuple[Slice, Rule]] = [(part, rule_for(part, rules)) for part in parts]
    words = [f"{part.role}: {_words(rule)}" if part.segment else _words(rule) for part, rule in chosen]
    if len(chosen) == 1:
        part, rule = chosen[0]
        return Division(role.name, role.role, words[0], Reduction.over(role.shape, part.dims(rule)))
    assert role.axis is not None
    pieces = []
    for part, rule in chosen:
        assert part.segment is not None
        view = segment_piece(role.shape, role.axis, part.segment, None).view
        pieces.append(Piece(part.segment.start, part.segment.stop, view, part.dims(rule)))
    return Division(role.name, role.role, "; ".join(words), Reduction.joined(role.shape, role.axis, pieces))


def slim_divisions(model: nn.Module, rules: Rules = TABLE) -> dict[str, Division]:
    """The blocks of every parameter.

    Args:
        rules: By slice (`layer.qkv.weight:query`), parameter name, glob of either, or role; the first of these four
            that fits decides. What no rule fits is left whole. A rule under the name of a fused tensor takes it as one;
            all others take its slices one by one.

    Raises:
        ValueError: a rule that fits nothing of the model, or dimensions that a tensor lacks.
    """
    roles = structure(model)
    check_rules(rules, [part for role in roles.values() for part in slices(role)])
    return {name: slim_division(role, rules) for name, role in roles.items()}


def rule_for(part: Slice, rules: Rules) -> Rule:
    """The rule of a slice, None where no key of `rules` fits it."""
    key = next(_fitting(part, rules), None)
    return None if key is None else rules[key]


def check_rules(rules: Rules, parts: Sequence[Slice]) -> None:
    """Raise for a key that is no role and fits none of the slices."""
    used = {key for part in parts for key in _fitting(part, rules)}
    for key in rules:
        if key not in used and key not in ROLES:
            names = [name for part in parts for name in dict.fromkeys((part.key, part.tensor.name))]
            raise ValueError(
                f"`rules` has {key!r}, which fits no parameter; near it: {near_names(key, names)}; "
                f"roles: {', '.join(ROLES)}"
            )


def _fitting(part: Slice, rules: Rules) -> Iterator[str]:
    for name in dict.fromkeys((part.key, part.tensor.name)):
        if name in rules:
            yield name
    for key in rules:
        if any(mark in key for mark in "*?[") and (fnmatchcase(part.key, key) or fnmatchcase(part.tensor.name, key)):
            yield key
    if part.role in rules:
        yield part.role


def _words(rule: Rule) -> str:
    if rule is None or rule == ():
        return "per entry"
    return f"mean over {rule if isinstance(rule, str) else list(rule)}"
