"""Several ways to multiply by the Hessian, one signature, and the choice among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..landscape.objective import Objective
from ..landscape.selection import near_names


class NotTwiceDifferentiable(RuntimeError):
    """An engine cannot take, or would get wrong, a second derivative."""


class Engine(ABC):
    """A way to compute H V at the objective's current weights.

    Subclasses write `local_matmat`, the sum over this rank's data; `matmat` adds the ranks and checks the result.
    """

    name: str
    reason: str = "asked for"

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._verified = False

    @property
    def relative_error(self) -> float:
        """Stated bound on ‖computed H v − H v‖ / (‖H‖ ‖v‖)."""
        return 64 * self.objective.coarsest_eps

    def relative_error_of(self, subset: Sequence[int]) -> float:
        """The same for the principal block of some parameters, relative to the block's norm."""
        return self.relative_error

    @abstractmethod
    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        """H[subset, subset] V for V [k, m], where k counts the coordinates of the parameters numbered in `subset`."""

    def matmat(self, V: Tensor, subset: Sequence[int] | None = None) -> Tensor:
        """H V for V [n, m]; with `subset`, the principal block of those parameters alone.

        Raises:
            ValueError: the product is not finite.
        """
        if V.shape[1] == 0:
            return V.clone()
        subset = range(len(self.objective.layout.names)) if subset is None else subset
        if not self._verified:
            self._verified = True
            self.verify()
        with normal_tensors(V) as V:
            product = self.objective.all_reduce(self.local_matmat(V, subset))
        if not bool(torch.isfinite(product).all()):
            cause = (
                "the vector itself is not finite"
                if not bool(torch.isfinite(V).all())
                else ("the second derivative does not exist here (for example sqrt or norm at 0) or overflows")
            )
            raise ValueError(f"a Hessian-vector product by engine {self.name!r} is not finite: {cause}")
        return product

    def verify(self) -> None:
        """Compares one product with differences of gradients when the loss runs through custom autograd functions.

        Raises:
            NotTwiceDifferentiable: they disagree beyond the stated errors.
        """
        custom = self.objective.custom_functions
        if not custom or self.objective.captures_tensors:
            return
        from .difference_engine import FiniteDifference

        differences = FiniteDifference(self.objective)
        probe = self.objective.gradient().unsqueeze(1)
        expected, product = differences.matmat(probe), self.matmat(probe)
        error = float((product - expected).double().norm())
        allowed = (differences.relative_error + self.relative_error) * float(expected.double().norm())
        if error > 2 * allowed:
            raise NotTwiceDifferentiable(
                f"engine {self.name!r} and differences of gradients disagree by {error:.2g} (allowed "
                f"{2 * allowed:.2g}) through the custom autograd functions {list(custom)}: "
                "their backward cannot be differentiated; "
                "use engine='finite-difference'"
            )


@contextmanager
def normal_tensors(V: Tensor) -> Iterator[Tensor]:
    """Leaves inference mode, whose tensors can neither be differentiated nor updated outside it."""
    with torch.inference_mode(False):
        yield V.clone() if V.is_inference() else V


def make_engine(objective: Objective, engine: str) -> Engine:
    """The engine of that name; "auto" takes the first of double backward, forward over reverse and differences that
    can differentiate this objective, and says why in `.reason`."""
    from .difference_engine import FiniteDifference
    from .graph_engine import DoubleBackward
    from .tangent_engine import ForwardOverReverse

    engines: dict[str, type[Engine]] = {
        kind.name: kind for kind in (DoubleBackward, ForwardOverReverse, FiniteDifference)
    }
    if engine != "auto":
        if engine not in engines:
            names = ["auto", *engines]
            raise ValueError(f"`engine` is {engine!r}; choose among {names} (near: {near_names(engine, names)})")
        if objective.captures_tensors and engine != DoubleBackward.name:
            raise ValueError(
                f"`engine` is {engine!r}, but the closure takes no arguments, so nothing can be put in its tensors' "
                f"place; write closure(*tensors), or use engine={DoubleBackward.name!r}"
            )
        return engines[engine](objective)
    failures: list[str] = []
    for kind in engines.values():
        if objective.captures_tensors and kind is not DoubleBackward:
            continue
        candidate = kind(objective)
        try:
            candidate.matmat(_probe(objective))
        except (RuntimeError, NotImplementedError) as error:
            if not isinstance(error, NotTwiceDifferentiable) and not _undifferentiable(error):
                raise
            failures.append(f"{kind.name}: {str(error).splitlines()[0][:160]}")
            continue
        if not failures:
            candidate.reason = "exact, and the fastest: its graph is kept between products"
        else:
            candidate.reason = "the engines before it cannot differentiate this loss (" + "; ".join(failures) + ")"
        return candidate
    raise RuntimeError("no engine can differentiate this objective twice: " + "; ".join(failures))


def _probe(objective: Objective) -> Tensor:
    n = objective.num_parameters
    return torch.full((n, 1), n**-0.5, dtype=objective.dtype, device=objective.device)


def _undifferentiable(error: Exception) -> bool:
    """Whether an error says that an operation has no (second) derivative, as against a mistake of the user's."""
    text = str(error).lower()
    signs = (
        "derivative for",
        "not implemented",
        "once_differentiable",
        "differentiate twice",
        "forward ad",
        "forward-mode ad",
        "double backward",
        "does not support",
        "setup_context",
        "functorch",
        "vmap",
        "custom_function",
        "generate_vmap_rule",
        "trying to backward through",
        "zerotensors",
        "create_graph",
    )
    return any(sign in text for sign in signs)
