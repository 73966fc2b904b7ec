"""Several ways to multiply by the Hessian, one signature, and the choice among them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..landscape.objective import Objective


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

    def expect(self, products: int) -> None:  # noqa: B027
        """Says that about so many products with whole vectors will be asked for."""

    def gradient(self) -> Tensor:
        """∇L(θ) [n], from what is kept for the products where an engine keeps it."""
        return self.objective.gradient()

    def local_products(self, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        """`local_matmat` of several (V, subset)."""
        return [self.local_matmat(V, subset) for V, subset in parts]

    def matmat(self, V: Tensor, subset: Sequence[int] | None = None) -> Tensor:
        """H V for V [n, m]; with `subset`, the principal block of those parameters alone.

        Raises:
            ValueError: the product is not finite.
        """
        return self.products([(V, range(len(self.objective.layout.names)) if subset is None else subset)])[0]

    def products(self, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        """`matmat` of several (V, subset) at the same weights: the model is entered once for all of them.

        Raises:
            ValueError: a product is not finite.
        """
        if any(V.shape[1] for V, _ in parts) and not self._verified:
            self._verified = True
            self.verify()
        with ExitStack() as stack:
            parts = [(stack.enter_context(normal_tensors(V)), subset) for V, subset in parts]
            wanted = [i for i, (V, _) in enumerate(parts) if V.shape[1]]
            found = dict(zip(wanted, self.local_products([parts[i] for i in wanted]) if wanted else (), strict=True))
            products = [
                self.objective.all_reduce(found[i]) if i in found else V.clone() for i, (V, _) in enumerate(parts)
            ]
        for product, (V, _) in zip(products, parts, strict=True):
            self._check_finite(product, V)
        return products

    def _check_finite(self, product: Tensor, V: Tensor) -> None:
        if product.numel() and not all(math.isfinite(end) for end in torch.aminmax(product)):
            cause = (
                "the vector itself is not finite"
                if not bool(torch.isfinite(V).all())
                else ("the second derivative does not exist here (for example sqrt or norm at 0) or overflows")
            )
            raise ValueError(f"a Hessian-vector product by engine {self.name!r} is not finite: {cause}")

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
