"""sharpscope's compiled product, for long runs: the compilation is not counted."""

from sharpscope import Hessian

from .sharpscope_tool import objective, running

NAME, DISTRIBUTION, OURS = "sharpscope compiled", "sharpscope", True


def hvp(case, v):
    hessian = Hessian(objective(case), engine="compiled")
    hessian.expect(10_000)
    return running(hessian, lambda: hessian @ v)
