"""sharpscope, as in its README; products as its algorithms make them, in a run at fixed weights."""

from contextlib import ExitStack

from sharpscope import GGN, Hessian, Objective, partition, top_eigenvalues

NAME, DISTRIBUTION, OURS = "sharpscope", "sharpscope", True


def objective(case):
    data = case.batches[0] if len(case.batches) == 1 else case.batches
    return Objective.supervised(case.model, case.criterion, data)


def running(op, product):
    """`product` while the run at fixed weights lasts, which is as long as the function that is returned."""
    run = ExitStack()
    run.enter_context(op.fixed())
    return lambda run=run: product()


def hvp(case, v):
    hessian = Hessian(objective(case))
    return running(hessian, lambda: hessian @ v)


def ggn(case, v):
    matrix = GGN(objective(case))
    matrix.expect(100)
    return running(matrix, lambda: matrix @ v)


def blocks(case, v):
    hessian = Hessian(objective(case))
    layout = hessian.objective.layout
    tensors = partition(hessian.objective, "parameter").values()
    parts = [(hessian.block(block), v[block.indices(layout)]) for block in tensors]
    return running(hessian, lambda: [block @ part for block, part in parts])


def top(case, k, tol, seed, stopwatch):
    found = top_eigenvalues(Hessian(objective(case)), k, which="LM", tol=tol, seed=seed)
    return found.values, found.products
