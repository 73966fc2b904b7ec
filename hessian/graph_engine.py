"""Double backward: the gradient's graph is built once and differentiated again for every vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..landscape.evaluation import Chunk
from ..landscape.objective import Objective
from .engines import Engine
from .kept import KeptChunks
from .second_derivatives import ShortSecondDerivatives


@dataclass
class Graph:
    """∇ℓ of one chunk with its graph, over the leaves `theta`."""

    weight: float
    theta: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    needs_model: bool


class DoubleBackward(Engine):
    """H v = ∇_θ (∇L · v), reverse over reverse (Pearlmutter 1994).

    Graphs of as many chunks as the objective's memory budget holds are kept between products and dropped when the
    weights change; the others are rebuilt for every product. A kept product costs about 2 gradients, a rebuilt one
    3.5. A product with some parameters' block runs only through the part of the graph above them.
    """

    name = "double-backward"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._graphs = KeptChunks(objective, self._build)

    def gradient(self) -> Tensor:
        """∇L(θ) [n]: the roots of the graphs that the products need anyway."""
        total = torch.zeros(self.objective.num_parameters, dtype=self.objective.dtype, device=self.objective.device)
        for graph in self._graphs:
            gradients = [None if g is None else g.detach() for g in graph.gradients]
            total += graph.weight * self.objective.join(gradients, graph.theta)
        return self.objective.all_reduce(total)

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        return self.local_products([(V, subset)])[0]

    def local_products(self, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        """All products with one graph before the next graph, so that one that is not kept is rebuilt once for all."""
        totals: list[list[Tensor]] = [[] for _ in parts]
        for graph in self._graphs:
            for columns, (V, subset) in zip(totals, parts, strict=True):
                self._add_product(columns, graph, V, subset)
        return [
            torch.zeros_like(V) if not columns else _side_by_side(columns)
            for columns, (V, _) in zip(totals, parts, strict=True)
        ]

    def _add_product(self, columns: list[Tensor], graph: Graph, V: Tensor, subset: Sequence[int]) -> None:
        """Adds one graph's share to the columns of the product, of which there are none before the first share."""
        theta = [graph.theta[i] for i in subset]
        kept = [(g, j) for j, i in enumerate(subset) if (g := graph.gradients[i]) is not None and g.requires_grad]
        if not kept:
            return
        first = not columns
        for column in range(V.shape[1]):
            pieces = self.objective.split(V[:, column], theta)
            products = torch.autograd.grad(
                [g for g, _ in kept],
                theta,
                [pieces[j] for _, j in kept],
                retain_graph=True,
                allow_unused=True,
            )
            share = self.objective.join(products, theta)
            if first:
                columns.append(share if graph.weight == 1.0 else share.mul_(graph.weight))
            else:
                columns[column].add_(share, alpha=graph.weight)

    def _build(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Graph:
        with ShortSecondDerivatives(not self.objective.differentiates_inside) as short:
            loss = self.objective.chunk_loss(chunk, theta)
            gradients = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        return Graph(
            chunk.weight, theta, gradients, needs_model=short.needs_model or bool(self.objective.custom_functions)
        )


def _side_by_side(columns: list[Tensor]) -> Tensor:
    """[k, m] from m columns [k]; a single one is not copied."""
    return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)
