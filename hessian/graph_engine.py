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


@dataclass
class Graph:
    """∇ℓ of one chunk with its graph, over the leaves `theta`."""

    weight: float
    theta: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


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

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        total = torch.zeros_like(V)
        for graph in self._graphs:
            theta = [graph.theta[i] for i in subset]
            kept = [(g, j) for j, i in enumerate(subset) if (g := graph.gradients[i]) is not None and g.requires_grad]
            if not kept:
                continue
            for column in range(V.shape[1]):
                pieces = self.objective.split(V[:, column], theta)
                products = torch.autograd.grad(
                    [g for g, _ in kept],
                    theta,
                    [pieces[j] for _, j in kept],
                    retain_graph=True,
                    allow_unused=True,
                )
                total[:, column] += graph.weight * self.objective.join(products, theta)
        return total

    def _build(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Graph:
        loss = self.objective.chunk_loss(chunk, theta)
        gradients = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        return Graph(chunk.weight, theta, gradients)
