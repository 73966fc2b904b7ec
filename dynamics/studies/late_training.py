"""Digits trained by SGD, and by SAM or adversarial training in some of the epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hessian.curvature import Hessian
from ...hessian.tracking import EigenTracker
from ...landscape.interpolation import linear_interpolation
from ...landscape.objective import Objective
from ..data_order import DataOrder
from ..optimizers.sam import SAM
from .adversarial import pgd_attack
from .character_training import single_thread

NUM_TRAIN, BATCH_SIZE, STEPS_PER_EPOCH = 600, 32, 18
LR, RHO, SMOOTHING = 0.1, 0.2, 0.1
# Of the attack, in units of the range of the pixels.
RADIUS, ATTACK_STEP, ATTACK_STEPS = 0.1, 0.05, 10

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_squares(output: Tensor, labels: Tensor) -> Tensor:
    """Squared difference to the one-hot label, a mean over examples and outputs."""
    return F.mse_loss(output, F.one_hot(labels, output.shape[-1]).to(output.dtype))


LOSSES: dict[str, Loss] = {
    "cross-entropy": nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
    "squares": mean_squares,
}


class DigitsTraining:
    """A 64-64-64-10 network with ReLU and biases, batches of 32 without replacement, 18 a epoch, constant rate.

    The base is SGD without momentum, so nothing but the weights passes from one phase to the next.

    Args:
        seed: Of the digits chosen, the weights and the order.
        loss: What is minimised.
        unit_pixels: Pixels in [0, 1]; otherwise each is shifted and scaled to mean 0 and deviation 1.
    """

    def __init__(self, seed: int, loss: Loss, *, unit_pixels: bool = False) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels, targets = torch.as_tensor(images).float(), torch.as_tensor(labels).long()
        # A pixel that is the same in all images stays zero.
        inputs = pixels / 16 if unit_pixels else (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-6)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
        self.inputs, self.targets = inputs[train], targets[train]
        self.test = (inputs[test], targets[test])
        self.loss, self.seed = loss, seed
        self.order = DataOrder(NUM_TRAIN, BATCH_SIZE, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def weights(self) -> dict[str, Tensor]:
        """A copy of them."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """That of a step of the whole training; an epoch leaves out what does not fill a batch."""
        epoch, number = divmod(step, STEPS_PER_EPOCH)
        chosen = self.order.at(epoch * self.order.steps_per_epoch + number)
        return self.inputs[chosen], self.targets[chosen]

    def train(
        self,
        epochs: Iterable[int],
        *,
        sam: bool = False,
        attack: bool = False,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        """The steps of these epochs, by SGD, by SAM on it, or by SGD on attacked inputs.

        `watch(step)` is called before each step.
        """
        optimizer = SAM(torch.optim.SGD(self.model.parameters(), lr=LR), rho=RHO, enabled=sam)
        for epoch in epochs:
            for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH):
                if watch is not None:
                    watch(step)
                inputs, targets = self.batch(step)
                if attack:
                    inputs = self.attacked(inputs, targets, torch.Generator().manual_seed(step))

                def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                    optimizer.zero_grad()
                    loss = self.loss(self.model(inputs), targets)
                    loss.backward()
                    return loss

                optimizer.step(closure)

    def attacked(self, inputs: Tensor, targets: Tensor, random_start: torch.Generator | None = None) -> Tensor:
        """Against the network as it is, with pixels in [0, 1]."""
        return pgd_attack(
            self.model,
            self.loss,
            inputs,
            targets,
            radius=RADIUS,
            step=ATTACK_STEP,
            num_steps=ATTACK_STEPS,
            random_start=random_start,
        )

    def objective(self, loss: Loss | None = None) -> Objective:
        """The loss over all training examples; by default the one that is minimised."""
        return Objective.supervised(self.model, self.loss if loss is None else loss, (self.inputs, self.targets))

    def sharpness(self, loss: Loss | None = None) -> float:
        """Largest eigenvalue of its Hessian."""
        return float(EigenTracker(tol=1e-3).measure(Hessian(self.objective(loss))).values[0])

    @torch.no_grad()
    def error(self, inputs: Tensor, targets: Tensor) -> float:
        """Share of wrong answers, in points."""
        return 100 * float((self.model(inputs).argmax(1) != targets).double().mean())


def late_run(seed: int, loss: str, epochs: int, late: Sequence[int], reverse: int) -> dict[str, Any]:
    """SGD, with SAM in the last epochs: once for each number of them, from the same run of SGD.

    Args:
        loss: "cross-entropy", with label smoothing, or "squares".
        epochs: Of each training.
        late: Numbers of SAM epochs, among them 0.
        reverse: Also SAM in all but these last epochs, which are then SGD.

    Returns:
        By number of SAM epochs as a string, and for "reverse": "sharpness" of the loss that is minimised, "plain" of
        cross-entropy without smoothing; "loss", "switch_loss" over the training examples at the end and at the switch;
        "error" on the other digits; "segment": highest loss on the line from the switch to the end; "across": the same
        on the line between the end of SGD and this one.
    """
    with single_thread():
        run = DigitsTraining(seed, LOSSES[loss])
        start, kept = run.weights(), {}
        for epoch in range(epochs + 1):
            if epochs - epoch in late:
                kept[epochs - epoch] = (run.weights(), run.objective().loss())
            if epoch < epochs:
                run.train([epoch])
        sgd_end = run.weights()
        found = {}
        for num, (weights, switch_loss) in sorted(kept.items()):
            run.model.load_state_dict(weights)
            run.train(range(epochs - num, epochs), sam=True)
            found[str(num)] = _ended(run, weights, switch_loss, sgd_end)
        run.model.load_state_dict(start)
        run.train(range(epochs - reverse), sam=True)
        weights, switch_loss = run.weights(), run.objective().loss()
        run.train(range(epochs - reverse, epochs))
        found["reverse"] = _ended(run, weights, switch_loss, sgd_end)
        return found


def _ended(run: DigitsTraining, switch: dict[str, Tensor], switch_loss: float, sgd_end: dict[str, Tensor]) -> dict:
    objective, end = run.objective(), run.weights()
    return {
        "sharpness": run.sharpness(),
        "plain": run.sharpness(F.cross_entropy),
        "loss": objective.loss(),
        "switch_loss": switch_loss,
        "error": run.error(*run.test),
        "segment": linear_interpolation(objective, switch, end).highest,
        "across": linear_interpolation(objective, sgd_end, end).highest,
    }


def switch_run(seed: int, loss: str, epochs: int, before: int, after: int, every: int = 6) -> dict[str, Any]:
    """Loss and sharpness over all training examples around the switch from SGD to SAM.

    Args:
        epochs: Of SGD before the switch.
        before, after: Epochs to record before and after it.
        every: Steps between two measurements; the loss is measured at each of the first 60 steps after the switch.

    Returns:
        "step" relative to the switch and "loss"; "sharp_step" and "sharpness"; "sgd_loss", "sgd_step": as SGD goes on.
    """
    with single_thread():
        run = DigitsTraining(seed, LOSSES[loss])
        objective = run.objective()
        tracker = EigenTracker(tol=1e-3)
        found: dict[str, list[float]] = {name: [] for name in ("step", "loss", "sharp_step", "sharpness")}
        switch = epochs * STEPS_PER_EPOCH

        def due(t: int) -> bool:
            return 0 <= t <= 60 or t % every == 0

        def watch(step: int) -> None:
            t = step - switch
            if due(t):
                found["step"].append(t)
                found["loss"].append(objective.loss())
            if t % (2 * STEPS_PER_EPOCH) == 0:
                found["sharp_step"].append(t)
                found["sharpness"].append(float(tracker.measure(Hessian(objective)).values[0]))

        run.train(range(epochs - before))
        run.train(range(epochs - before, epochs), watch=watch)
        kept = run.weights()
        run.train(range(epochs, epochs + after), sam=True, watch=watch)
        sgd: dict[str, list[float]] = {"sgd_step": [], "sgd_loss": []}

        def watch_sgd(step: int) -> None:
            if due(step - switch):
                sgd["sgd_step"].append(step - switch)
                sgd["sgd_loss"].append(objective.loss())

        run.model.load_state_dict(kept)
        run.train(range(epochs, epochs + after), watch=watch_sgd)
        return {**found, **sgd}


def adversarial_run(seed: int, epochs: int, late: Sequence[int]) -> dict[str, Any]:
    """SGD with adversarial training in the last epochs; robust and plain error on held-out digits.

    Returns:
        By number of adversarial epochs as a string: "robust": error in points under the attack, "error" without it.
    """
    with single_thread():
        run = DigitsTraining(seed, nn.CrossEntropyLoss(), unit_pixels=True)
        kept = {}
        for epoch in range(epochs + 1):
            if epochs - epoch in late:
                kept[epochs - epoch] = run.weights()
            if epoch < epochs:
                run.train([epoch])
        found = {}
        for num, weights in sorted(kept.items()):
            run.model.load_state_dict(weights)
            run.train(range(epochs - num, epochs), attack=True)
            inputs, targets = run.test
            found[str(num)] = {
                "robust": run.error(run.attacked(inputs, targets), targets),
                "error": run.error(inputs, targets),
            }
        return found
