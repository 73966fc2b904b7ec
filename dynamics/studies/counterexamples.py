"""Small sums on which Adam's two betas decide between convergence and divergence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..optimizers.beta_phases import FiniteSum
from ..optimizers.option_checks import check_number


def adam_counterexample(n: int, a: float | None = None) -> FiniteSum:
    """n pieces, linear on the right and quadratic on the left, with the minimum at −2.

    For x >= −1 the slopes are 1 + (n − 1) a of ℓ_0 and −a of the others, so ℓ' = 1/n; for x < −1 each is multiplied by
    x + 2. Every |ℓ_i'| is proportional to |ℓ'|: Σ|ℓ_i'|² = D1 |ℓ'|² with D0 = 0 and
    D1 = n² ((1 + (n − 1) a)² + (n − 1) a²).

    Args:
        n: At least 3.
        a: Above 0; None takes 1/(n − 1)².

    Source: Zhang, Chen, Shi, Sun, Luo, Adam Can Converge Without Any Modification On Update Rules, NeurIPS 2022,
    the example behind the divergence theorem.
    """
    check_number("n", n, least=3)
    a = 1 / (n - 1) ** 2 if a is None else a
    check_number("a", a, above=0)
    slopes = np.full(n, -a)
    slopes[0] = 1 + (n - 1) * a
    table = torch.as_tensor(slopes)

    def value(x: Tensor, i: Tensor) -> Tensor:
        right, left = x, 0.5 * (x + 2).square() - 1.5
        return (table.to(x.dtype)[i] * torch.where(x >= -1, right, left)).mean()

    return FiniteSum(f"counterexample, n = {n}", n, lambda x, i: slopes[i] * np.minimum(x + 2, 1.0), value, -2.0)


def linear_terms(name: str, slopes: list[float]) -> FiniteSum:
    """ℓ_i(x) = s_i x on [−1, 1], with the minimum at the end that the mean slope points away from."""
    table = np.asarray(slopes, dtype=np.float64)
    tensor = torch.as_tensor(table)
    return FiniteSum(
        name,
        len(slopes),
        lambda x, i: table[i] + 0.0 * x,
        lambda x, i: (tensor.to(x.dtype)[i] * x).mean(),
        -1.0 if table.sum() > 0 else 1.0,
        (-1.0, 1.0),
    )


def reddi(n: int) -> FiniteSum:
    """ℓ_0 = n x, the others −x, on [−1, 1]: the mean slope is 1/n, so the minimum is at −1.

    Source: Reddi, Kale, Kumar, On the Convergence of Adam and Beyond, ICLR 2018, section 3.
    """
    check_number("n", n, least=3)
    return linear_terms(f"Reddi, n = {n}", [float(n)] + [-1.0] * (n - 1))


def reddi_stochastic(large: float = 1010.0, small: float = -10.0, num_small: int = 99) -> FiniteSum:
    """Slope `large` once in num_small + 1 steps, else `small`, on [−1, 1]; as given the mean is 0.2, the minimum −1.

    Source: Reddi, Kale, Kumar, On the Convergence of Adam and Beyond, ICLR 2018, section 5.
    """
    check_number("num_small", num_small, least=1)
    return linear_terms("stochastic Reddi", [large] + [small] * num_small)
