"""PyHessian 0.1 for the trap suite, used as in its tutorial."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from curvature_traps import Adapter, Eigenvalues, NotOffered, Problem
from pyhessian import hessian
from pyhessian.utils import hessian_vector_product
from torch import Tensor


class PyHessian(Adapter):
    name = "PyHessian"
    version = version("pyhessian")
    packages = ("pyhessian",)

    def hessian(self, problem: Problem, engine: str | None = None) -> Any:
        if not problem.paired:
            raise NotOffered("batches must be (inputs, targets) tensors")
        if problem.mode == "train":
            raise NotOffered("always switches the model to eval mode")
        # The documentation: `data` for one batch, `dataloader` for several.
        if isinstance(problem.batches, list) and len(problem.batches) == 1:
            return hessian(problem.model, problem.criterion, data=problem.batches[0], cuda=False)
        return hessian(problem.model, problem.criterion, dataloader=problem.batches, cuda=False)

    def product(self, operator: Any, v: Tensor) -> Tensor:
        shapes = [p.shape for p in operator.params]
        pieces = [t.view(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
        if operator.full_dataset:
            result = operator.dataloader_hv_product(pieces)[1]
        else:
            result = hessian_vector_product(operator.gradsH, operator.params, pieces)
        return torch.cat([t.reshape(-1) for t in result])

    def top_eigenvalues(
        self, operator: Any, num: int, *, which: str = "LM", tol: float = 1e-3, max_products: int | None = None
    ) -> Eigenvalues:
        if which != "LM":
            raise NotOffered("only the largest eigenvalues by size")
        budget = {} if max_products is None else {"maxIter": max_products}
        return Eigenvalues(operator.eigenvalues(tol=tol, top_n=num, **budget)[0])

    def trace(self, operator: Any, num_products: int) -> float:
        values = operator.trace(maxIter=num_products)
        return float(sum(values) / len(values))

    def density(self, operator: Any, num_steps: int, num_probes: int) -> list[tuple[Tensor, Tensor]]:
        points, weights = operator.density(iter=num_steps, n_v=num_probes)
        return [(torch.tensor(p), torch.tensor(w)) for p, w in zip(points, weights, strict=True)]


adapter = PyHessian()
