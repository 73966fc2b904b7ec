"""BackPACK's products by autograd alone, which build their graph anew."""

from backpack.hessianfree.ggnvp import ggn_vector_product
from backpack.hessianfree.hvp import hessian_vector_product

NAME, DISTRIBUTION = "BackPACK", "backpack-for-pytorch"


def _summed(case, product):
    def run():
        total = None
        for x, y in case.batches:
            output = case.model(x)
            found = product(case.criterion(output, y) / len(case.batches), output)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return total

    return run


def hvp(case, v):
    parts = case.split(v)
    return _summed(case, lambda loss, output: hessian_vector_product(loss, case.parameters, parts))


def ggn(case, v):
    parts = case.split(v)
    return _summed(case, lambda loss, output: ggn_vector_product(loss, output, case.model, parts))
