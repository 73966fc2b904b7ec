"""PyHessian 0.1. Products are its own `hessian_vector_product` on one batch, `dataloader_hv_product` on several."""

import torch
from pyhessian import hessian
from pyhessian.utils import hessian_vector_product

NAME, DISTRIBUTION = "PyHessian", "pyhessian"


def computer(case):
    # It adds to gradients that it finds.
    case.model.zero_grad()
    if len(case.batches) == 1:
        return hessian(case.model, case.criterion, data=case.batches[0], cuda=False)
    return hessian(case.model, case.criterion, dataloader=case.batches, cuda=False)


def hvp(case, v):
    made, parts = computer(case), case.split(v)
    if made.full_dataset:
        return lambda: made.dataloader_hv_product(parts)[1]
    return lambda: hessian_vector_product(made.gradsH, made.params, parts)


def top(case, k, tol, seed, stopwatch):
    torch.manual_seed(seed)
    values, _ = computer(case).eigenvalues(maxIter=1000, tol=tol, top_n=k)
    return torch.tensor(values, dtype=torch.float64), None
