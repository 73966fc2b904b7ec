"""curvlinops; eigenvalues by SciPy's eigsh on its operator, as in its examples. Its check of determinism is off."""

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from scipy.sparse.linalg import eigsh

NAME, DISTRIBUTION = "curvlinops", "curvlinops-for-pytorch"


def operator(kind, case, **options):
    return kind(case.model, case.criterion, case.parameters, case.batches, check_deterministic=False, **options)


def hvp(case, v):
    matrix = operator(HessianLinearOperator, case)
    return lambda: matrix @ v


def ggn(case, v):
    matrix = operator(GGNLinearOperator, case)
    return lambda: matrix @ v


def blocks(case, v):
    matrix = operator(HessianLinearOperator, case, block_sizes=[1] * len(case.parameters))
    return lambda: list((matrix @ v).split([p.numel() for p in case.parameters]))


def top(case, k, tol, seed, stopwatch):
    start = torch.randn(case.num_parameters, generator=torch.Generator().manual_seed(seed))
    matrix = operator(HessianLinearOperator, case).to_scipy()
    values = eigsh(matrix, k=k, which="LM", tol=tol, v0=start.numpy(), return_eigenvectors=False)
    return torch.from_numpy(values), None
