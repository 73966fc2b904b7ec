"""The known failures of curvature tools as a suite for any of them.

Write an `Adapter` for a tool (the methods it has features for), bind an instance to the name `adapter` in a file, and
run `python -m curvature_traps FILE` with this package on the path. The truth behind every verdict is a dense float64
matrix computed here by plain autograd loops, or a closed form.
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
