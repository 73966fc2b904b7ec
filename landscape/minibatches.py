"""Random minibatches of an objective's data, each an objective of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from .batches import Batches, chosen
from .checks import Look, checked_loss
from .objective import Objective


def minibatches(objective: Objective, batch_size: int, num: int, *, seed: int = 0) -> Iterator[Objective]:
    r"""The same loss on `num` random minibatches of `batch_size` examples, without replacement inside each.

    They share the model and are not checked again. Their examples, num · batch_size of them, are gathered in one pass
    over the data. With batch_size = N each is the whole data in its own order.

    Args:
        batch_size: From 1 to the number of examples N.
        num: How many, independent of each other.
        seed: Of the choice.

    Raises:
        ValueError: a closure or data split over ranks, a `batch_size` that does not fit, a loss that does not take
            part of a batch, a minibatch without any term (all labels ignored).
    """
    if objective._batches is None:
        raise ValueError("a closure has no examples; make the objective with Objective or Objective.supervised")
    if objective.group is not None:
        raise ValueError("the data is split over ranks; draw minibatches from an Objective of one rank's data")
    look = objective._first_look()
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= look.num_examples:
        raise ValueError(
            f"`batch_size` is {batch_size!r}; give a number of examples from 1 to {look.num_examples}, all there are"
        )
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise ValueError(f"`num` is {num!r}; draw at least one minibatch")
    random = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(look.num_examples, generator=random)[:batch_size].sort().values for _ in range(num)]
    for flattened in (False, True):
        parts = [_part(objective, pieces) for pieces in _gathered(objective, picks, flattened=flattened)]
        try:
            with parts[0].evaluation() as theta:
                for chunk in parts[0].chunks():
                    checked_loss(parts[0]._evaluate(chunk.batch, theta), 0)
            break
        except (ValueError, RuntimeError, IndexError) as error:
            if flattened:
                raise ValueError(f"the loss does not take {batch_size} examples of a batch: {error}") from error
    yield from parts


def _gathered(objective: Objective, picks: list[torch.Tensor], *, flattened: bool) -> list[list[tuple[Any, int, int]]]:
    """For each minibatch its pieces: examples of one batch, how many, and the batch's number."""
    assert objective._batches is not None
    pieces: list[list[tuple[Any, int, int]]] = [[] for _ in picks]
    first = 0
    for number, (size, batch) in enumerate(zip(objective._first_look().sizes, objective._batches, strict=False)):
        for rows, own in zip(picks, pieces, strict=True):
            inside = rows[(rows >= first) & (rows < first + size)] - first
            if len(inside):
                own.append((chosen(batch, inside, size, flattened=flattened), len(inside), number))
        first += size
    return pieces


def _part(objective: Objective, pieces: list[tuple[Any, int, int]]) -> Objective:
    terms = tuple(objective._terms(batch, number) for batch, _, number in pieces)
    if not sum(terms) > 0:
        raise ValueError("a minibatch has no term that counts: all its labels are ignored; take a larger `batch_size`")
    part = copy.copy(objective)
    part._batches = Batches.in_hand([batch for batch, _, _ in pieces], objective.device)
    part._look = Look(tuple(size for _, size, _ in pieces), terms, float(sum(terms)))
    part.notes, part._fixed_token = [], None
    return part
