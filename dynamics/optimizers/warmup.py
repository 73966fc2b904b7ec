"""Learning-rate warmup: linear from a chosen start, cosine decay after it, and catapults all the way.

Source: Kalra and Barkeshli, Why Warmup the Learning Rate? Underlying Mechanisms and Improvements, NeurIPS 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .option_checks import check_flag, check_number


class LinearWarmup(LRScheduler):
    r"""Linear warmup to the learning rate of each group, then a constant or a cosine decay.

        η_t = η_init + (η_trgt − η_init) t / T_wrm                                      t <= T_wrm
        η_t = η_min + (η_trgt − η_min) ((1 + cos(π (t − T_wrm) / (T − T_wrm))) / 2)^ρ   afterwards

    with η_trgt the group's own learning rate and t = 1 at the first step, so that T_wrm = 1 is a constant. Like all of
    torch's schedulers it is to be stepped after the optimizer.

    Args:
        optimizer: Its groups hold η_trgt.
        warmup_steps: T_wrm.
        init: η_init of every group, e.g. from `catapult_learning_rate`; capped at η_trgt.
        keep_rate: Rise by η_trgt / T_wrm a step whatever η_init is, so that η_trgt is reached after
            T_wrm (1 − η_init / η_trgt) steps. Otherwise after T_wrm.
        total_steps: T, where the decay ends. Needed when `exponent` is not 0.
        exponent: ρ; 0 keeps η_trgt.
        final: η_min / η_trgt.
        last_epoch: As in torch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        init: float = 0.0,
        *,
        keep_rate: bool = False,
        total_steps: int | None = None,
        exponent: float = 0.0,
        final: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        check_number("warmup_steps", warmup_steps, least=1)
        check_number("init", init, least=0)
        check_flag("keep_rate", keep_rate)
        check_number("exponent", exponent, least=0)
        check_number("final", final, least=0, most=1)
        if exponent and (total_steps is None or total_steps <= warmup_steps):
            raise ValueError(
                f"`total_steps` is {total_steps}; a decay of exponent {exponent:g} needs the number of all steps, "
                f"above `warmup_steps` = {warmup_steps}"
            )
        self.warmup_steps, self.init, self.keep_rate = warmup_steps, init, keep_rate
        self.total_steps, self.exponent, self.final = total_steps, exponent, final
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [self._rate(float(target), self.last_epoch + 1) for target in self.base_lrs]

    def _rate(self, target: float, t: int) -> float:
        if t > self.warmup_steps:
            return target * self._decay(t)
        init = min(self.init, target)
        rise = target if self.keep_rate else target - init
        return min(target, init + rise * t / self.warmup_steps)

    def _decay(self, t: int) -> float:
        if self.exponent == 0 or self.total_steps is None:
            return 1.0
        share = min(1.0, (t - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * (0.5 * (1 + math.cos(math.pi * share))) ** self.exponent


class CatapultWarmup:
    """Warmup by persistent catapults: whenever the loss has come down again, the rate jumps to the new threshold.

    The first `step(loss)` sets η = estimate() and remembers the loss. Whenever the loss is below the remembered one,
    η is set to a new estimate, and that loss is remembered; until η_trgt is reached. So each rise of the rate throws
    the weights to where the loss is flatter, and the next one waits until that has paid.

    Args:
        optimizer: Groups keep the ratios of their rates; the largest is what is set.
        target: η_trgt of the largest.
        estimate: The learning rate at which the next step begins to raise the loss, at the present weights: usually
            `lambda: catapult_learning_rate(objective, optimizer, target=target, delta=0.01).lr`. Late in training
            `delta` must be small.
        allow_decrease: Follow an estimate that is below the present rate; otherwise the rate never falls.
    """

    def __init__(
        self, optimizer: Optimizer, target: float, estimate: Callable[[], float], *, allow_decrease: bool = True
    ) -> None:
        check_number("target", target, above=0)
        check_flag("allow_decrease", allow_decrease)
        self.optimizer, self.target = optimizer, float(target)
        self._estimate, self._allow_decrease = estimate, allow_decrease
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if max(rates) <= 0:
            raise ValueError(
                "the learning rates of `optimizer` are all 0; give the groups rates in the ratio they should have"
            )
        self._ratios = [rate / max(rates) for rate in rates]
        self.reference: float | None = None
        self.num_estimates = 0
        self.lr = 0.0

    @property
    def finished(self) -> bool:
        """Whether the target has been reached."""
        return self.lr >= self.target

    def step(self, loss: float) -> float:
        """Takes the loss at the present weights, before the optimizer's step; returns the rate that is now set."""
        loss = float(loss)
        if self.finished or (self.reference is not None and not loss < self.reference):
            return self.lr
        self.reference = loss
        rate = min(float(self._estimate()), self.target)
        self.num_estimates += 1
        self.lr = rate if self._allow_decrease else max(rate, self.lr)
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr * ratio)
            else:
                group["lr"] = self.lr * ratio
        return self.lr

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "num_estimates": self.num_estimates, "lr": self.lr, "ratios": self._ratios}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference, self.num_estimates, self.lr = state["reference"], state["num_estimates"], state["lr"]
        self._ratios = list(state["ratios"])
