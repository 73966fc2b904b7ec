"""The known failures of curvature tools as a suite for any of them.

Write an adapter with the methods that the tool has features for, in a file of its own:

    from curvature_traps import Adapter, Eigenvalues, Problem
    from sometool import HessianOperator

    class SomeTool(Adapter):
        name, version, packages = "sometool", "1.0", ("sometool",)

        def hessian(self, problem: Problem, engine=None):
            return HessianOperator(problem.model, problem.criterion, problem.batches)

        def top_eigenvalues(self, operator, num, *, which="LM", tol=1e-3, max_products=None):
            return Eigenvalues(operator.eigenvalues(num, tol))

    adapter = SomeTool()

and run `python -m curvature_traps FILE` with this package on the path. The truth behind every verdict is a dense
float64 matrix computed here by plain autograd loops, or a closed form; no tool is measured by another.
"""

from . import call_traps, data_traps, module_traps, parameter_traps, side_effect_traps, spectrum_traps
from .adapter import Adapter, Eigenvalues, NotOffered, Solved
from .outcome import Outcome, Trap, Verdict
from .problem import Problem

TRAPS: tuple[Trap, ...] = tuple(
    value
    for module in (data_traps, parameter_traps, module_traps, call_traps, side_effect_traps, spectrum_traps)
    for value in vars(module).values()
    if isinstance(value, Trap)
)

__all__ = ["TRAPS", "Adapter", "Eigenvalues", "NotOffered", "Outcome", "Problem", "Solved", "Trap", "Verdict"]
