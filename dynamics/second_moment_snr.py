"""Measurement of how well the second moments of each tensor are replaced by means along its dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from ..landscape.selection import unwrapped
from ..landscape.structure import TensorRole, structure
from .optimizers.option_checks import check_number
from .optimizers.wrapper import Wrapper
from .point import Point
from .row import Row
from .snr_profile import snr_of_slices

# What torch's optimizers call a second moment.
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")


@dataclass(frozen=True)
class SecondMomentSNR:
    """mean_K(v)² / var_K(v) of the second moments v, averaged over the other dimensions, for every set of dimensions K.

    v is the optimizer's own where it keeps one for each entry (Adam, RMSprop, Adagrad); otherwise the exponential
    average of the squared gradient of the objective, with weight 1 − beta2 at each measured point. Of an
    optimizer round another one, such as SAM, the other is read.

    Rows: block `fc.weight over inputs` (`attn.qkv.weight:query over outputs` inside a fused layer), index 0 the mean
    and index 1 the median over the other dimensions; vectors have none. `SNRProfile.of` reads them back. Infinite
    where all slices are constant. A point before the optimizer's first step has no rows.

    Args:
        every: Period in steps.
        beta2: Of the average kept here, in [0, 1), for optimizers without a second moment.

    Source: Kalra et al., When Can You Get Away with Low Memory Adam?, 2025.
    """

    every: int | None = None
    beta2: float = 0.95
    _: KW_ONLY
    name: str = "second_moment_snr"

    def __post_init__(self) -> None:
        check_number("beta2", self.beta2, least=0, below=1)

    def measure(self, point: Point) -> Iterator[Row]:
        tree = getattr(point.objective, "model", None)
        roles: dict[str, TensorRole] = structure(tree) if isinstance(tree, nn.Module) else {}
        moments = self._moments(point, tree)
        for entry in snr_of_slices(moments, roles):
            block = f"{entry.key} over {entry.rule}"
            yield Row(self.name, entry.mean, block=block, index=0)
            yield Row(self.name, entry.median, block=block, index=1)

    def _moments(self, point: Point, tree: object) -> dict[str, Tensor]:
        layout = point.objective.layout
        if point.optimizer is not None and isinstance(tree, nn.Module):
            if point.step == 0 and not innermost(point.optimizer).state:
                return {}
            own = second_moments(point.optimizer, tree)
            if own:
                return {name: v for name, v in own.items() if name in layout.names}
        squared = point.gradient().detach().square()
        average = point.state.get("average")
        average = squared if average is None else average.to(squared).lerp(squared, 1 - self.beta2)
        point.state["average"] = average
        return layout.unflatten(average)


def second_moments(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Second moments, one for each entry, by parameter name; without those that the optimizer does not keep so."""
    optimizer = innermost(optimizer)
    found = {}
    for name, p in unwrapped(model).named_parameters():
        state = optimizer.state.get(p, {})
        for key in SECOND_MOMENTS:
            v = state.get(key)
            if isinstance(v, Tensor) and v.shape == p.shape:
                found[name] = v
                break
    return found


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the step inside wrappers."""
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.base
    return optimizer
