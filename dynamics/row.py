"""One line of the trajectory table."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One measured number, its error, and what it cost.

    Attributes:
        quantity: What was measured, e.g. "sharpness".
        value: The number, kept to the last bit (NaN and infinities too).
        error: Standard error, residual or bound in the units of `value`; NaN where there is none.
        block: Which part of the parameters; "" is the whole model.
        index: Which of several, e.g. 2 for the third eigenvalue.
        converged: False when the budget ended first and `value` is the best answer so far.
        products: Operator products spent.
        seconds: Wall-clock time spent.
        arrays: Tensors that belong to the number (nodes and weights of a density, eigenvectors).
    """

    quantity: str
    value: float
    error: float = math.nan
    block: str = ""
    index: int = 0
    converged: bool = True
    products: int = 0
    seconds: float = 0.0
    arrays: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.quantity, str) or not self.quantity:
            raise TypeError(f"`quantity` is {self.quantity!r}; name what was measured with a non-empty string")
        if not isinstance(self.block, str):
            raise TypeError(f'`block` is {self.block!r}; give the name of a block, or "" for the whole model')
        # 0-d tensors and numpy scalars are what measurements have at hand; the row keeps plain numbers.
        for name, convert in _PLAIN.items():
            given = getattr(self, name)
            try:
                plain = convert(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"`{name}` of {self.quantity!r} is {given!r}, not one number: {error}") from error
            object.__setattr__(self, name, plain)
        for name, tensor in (self.arrays or {}).items():
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"`arrays[{name!r}]` of {self.quantity!r} is a {kind}; convert it with torch.as_tensor")


_PLAIN = {
    "value": float,
    "error": float,
    "index": operator.index,
    "converged": bool,
    "products": operator.index,
    "seconds": float,
}
