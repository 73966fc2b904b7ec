"""sharpscope, as in its README."""

from sharpscope import GGN, Hessian, Objective, partition, top_eigenvalues

NAME, DISTRIBUTION, OURS = "sharpscope", "sharpscope", True


def objective(case):
    data = case.batches[0] if len(case.batches) == 1 else case.batches
    return Objective.supervised(case.model, case.criterion, data)


def hvp(case, v):
    hessian = Hessian(objective(case))
    return lambda: hessian @ v


def ggn(case, v):
    matrix = GGN(objective(case))
    return lambda: matrix @ v


def blocks(case, v):
    hessian = Hessian(objective(case))
    layout = hessian.objective.layout
    tensors = partition(hessian.objective, "parameter").values()
    parts = [(hessian.block(block), v[block.indices(layout)]) for block in tensors]
    return lambda: [block @ part for block, part in parts]


def top(case, k, tol, seed, stopwatch):
    found = top_eigenvalues(Hessian(objective(case)), k, which="LM", tol=tol, seed=seed)
    return found.values, found.products
