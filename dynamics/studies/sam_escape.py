"""A small network leaves a minimum of SGD under SAM: the linear prediction, and where it arrives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ...hessian.mean_square import MeanSquareStability
from ..optimizers.sam import SAM
from .character_training import single_thread
from .digit_problems import digit_examples, fully_connected
from .sam_linear import mean_square_curve

NUM_EXAMPLES, WIDTH = 10, 16
# Of the digits' standardised pixels, so that ‖g_i‖² is a few units.
INPUT_SCALE = 1 / 8
FIT_STEPS, FIT_LOSS = 1000, 1e-28
# Length of the first shift from a minimum: the loss is then about 1e-14, and the linear map holds to about 1e-6.
SIZE = 1e-7
BLOCKS = 10


class Copies(nn.Module):
    """Copies of a network with weights of their own, evaluated together.

    Unnormalised SAM and SGD on the sum of the copies' losses are SAM and SGD on each.

    Args:
        network: What is copied; its own weights stay as they are.
        starts: Flat weights of the copies [R, p].
    """

    def __init__(self, network: nn.Module, starts: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(starts.clone())
        self._output = output_of(network)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [R, b] of inputs [R, b, d], or of the same [b, d] for all copies."""
        return vmap(self._output, in_dims=(0, 0 if inputs.ndim == 3 else None))(self.weights, inputs)


def output_of(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """f(θ, x) [b] of flat weights θ [p] and inputs [b, d], for a network with one output."""
    named = [(name, p.shape, p.numel()) for name, p in network.named_parameters()]

    def output(theta: Tensor, inputs: Tensor) -> Tensor:
        pieces = theta.split([size for _, _, size in named])
        weights = {name: piece.view(shape) for (name, shape, _), piece in zip(named, pieces, strict=True)}
        return functional_call(network, weights, (inputs,)).squeeze(-1)

    return output


class Minimum:
    """A tanh network that fits a few digits of two classes exactly, found by SGD with one example a step.

    Args:
        seed: Of the weights, the digits and the order of the examples.
        lr: η.

    Attributes:
        theta: Weights [p]; the loss is the mean of (f(x_i) − y_i)²/2, zero there but for rounding.
    """

    def __init__(self, seed: int, lr: float) -> None:
        self.seed, self.lr = seed, lr
        inputs, labels = digit_examples(400, seed=seed)
        chosen = torch.nonzero(labels < 2).squeeze(1)[:NUM_EXAMPLES]
        self.inputs, self.targets = INPUT_SCALE * inputs[chosen], 2.0 * labels[chosen].double() - 1
        self.network = fully_connected(2, WIDTH, outputs=1, activation=nn.Tanh, seed=seed)
        self.output = output_of(self.network)
        start = nn.utils.parameters_to_vector(self.network.parameters()).detach().unsqueeze(0)
        copies = Copies(self.network, start)
        self.descend(copies, 0.0, FIT_STEPS)
        self.theta = self._fitted(copies.weights.detach()[0])

    def jacobian(self, theta: Tensor) -> Tensor:
        """g_i = ∇f(x_i) [n, p]."""
        return jacrev(self.output)(theta, self.inputs)

    def losses(self, thetas: Tensor) -> Tensor:
        """Mean loss over all examples [R] at weights [R, p]."""
        found = vmap(self.output, in_dims=(0, None))(thetas, self.inputs)
        return 0.5 * (found - self.targets).square().mean(1)

    def descend(
        self, copies: Copies, rho: float, steps: int, *, full: bool = False, watch: Callable[[int], None] | None = None
    ) -> None:
        """Unnormalised SAM with one example a step, drawn for each copy, or with all of them; ρ = 0 is SGD.

        `watch(step)` is called before the first step and after each.
        """
        random = torch.Generator().manual_seed(self.seed + 1)
        optimizer = SAM(torch.optim.SGD(copies.parameters(), lr=self.lr), rho=rho, normalize=False)
        num = len(copies.weights)
        for step in range(steps + 1):
            if watch is not None:
                watch(step)
            if step == steps:
                return
            chosen = torch.randint(NUM_EXAMPLES, (num, 1), generator=random)
            inputs = self.inputs.expand(num, -1, -1) if full else self.inputs[chosen]
            targets = self.targets.expand(num, -1) if full else self.targets[chosen]

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                optimizer.zero_grad()
                loss = 0.5 * (copies(inputs) - targets).square().mean(1).sum()
                loss.backward()
                return loss

            optimizer.step(closure)

    def _fitted(self, theta: Tensor) -> Tensor:
        """Gauss-Newton steps of least length, halved until the loss falls: the nearest weights without loss."""
        loss = float(self.losses(theta.unsqueeze(0)))
        for _ in range(100):
            left = self.targets - self.output(theta, self.inputs)
            step = torch.linalg.pinv(self.jacobian(theta)) @ left
            for halved in range(30):
                tried = theta + step / 2**halved
                found = float(self.losses(tried.unsqueeze(0)))
                if found < loss:
                    break
            else:
                break
            theta, loss = tried, found
            if loss < FIT_LOSS:
                break
        return theta


def stability(jacobian: Tensor) -> MeanSquareStability:
    """Of SGD and SAM near weights that fit all examples, whose Gauss-Newton factors are g_i [n, p]."""
    return MeanSquareStability.from_gram(jacobian @ jacobian.T, len(jacobian))


def radius(jacobian: Tensor, lr: float, rho: float = 0.0) -> float:
    """Growth of E‖w‖² a step with one example a step."""
    return stability(jacobian).radius(lr, 1, sampling="without_replacement", rho=rho)


def rho_with_threshold(jacobian: Tensor, lr: float) -> float:
    """ρ at which the largest stable learning rate of SAM with one example a step is η.

    Raises:
        ValueError: SGD, which is ρ = 0, is not stable at η.
    """
    found = stability(jacobian)
    largest = found.threshold(1, sampling="without_replacement")
    if largest <= lr:
        raise ValueError(f"`lr` is {lr:.4g}, but SGD is stable only below {largest:.4g}; no `rho` has this threshold")
    low, high = 0.0, 1.0
    while found.threshold(1, sampling="without_replacement", rho=high) > lr:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        above = found.threshold(1, sampling="without_replacement", rho=middle) > lr
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def leading_moment(jacobian: Tensor, lr: float, rho: float) -> Tensor:
    """E[w wᵀ] that grows by the radius from the first step on, of trace one.

    Returns:
        A root R [p, n]: R z with normal z has this second moment.
    """
    basis, factors = torch.linalg.qr(jacobian.T)  # [p, n], [n, n]
    moment = torch.eye(len(factors), dtype=factors.dtype)
    for _ in range(20):
        moment = mean_square_curve(factors.T, lr, rho, 50, moment / moment.trace())[-1]
    values, vectors = torch.linalg.eigh(moment / moment.trace())
    root = vectors * values.clamp(min=0.0).sqrt()
    return basis @ root


def lyapunov_exponent(factors: Tensor, lr: float, rho: float, *, steps: int = 4000, runs: int = 16) -> list[float]:
    """Growth rate a step of log ‖w‖ in the linear process with one example a step, one number for each run.

    Args:
        factors: g_i [n, k].
    """
    random = torch.Generator().manual_seed(0)
    scale = lr * (1 + rho * factors.square().sum(1))
    w = torch.randn(runs, factors.shape[1], generator=random, dtype=torch.float64)
    total = torch.zeros(runs, dtype=torch.float64)
    for step in range(steps + steps // 10):
        chosen = torch.randint(len(factors), (runs,), generator=random)
        g = factors[chosen]
        w = w - (scale[chosen] * (g * w).sum(1)).unsqueeze(1) * g
        length = w.norm(dim=1, keepdim=True)
        w = w / length
        if step >= steps // 10:
            total += length.squeeze(1).log()
    return (total / steps).tolist()


def escape_run(
    seed: int, lr: float, ratio: float, *, copies: int, steps: int, long_copies: int, long_steps: int
) -> dict[str, Any]:
    """SAM with one example a step from next to a minimum of SGD, against the linear prediction; then for long.

    ρ is such that η is `ratio` times the largest learning rate at which SAM is mean-square stable there.

    Args:
        lr: η, of SGD before and of SAM.
        copies, steps: Independent short runs, whose mean loss is compared with the prediction, and their length.
        long_copies, long_steps: Those that go on until they have arrived somewhere.

    Returns:
        "rho"; "sgd", "sam": growth of E‖w‖² a step at the minimum; "loss" [steps + 1, blocks]: mean loss over each of
        ten blocks of short runs; "long_step", "long_loss" [times, runs]; "lyapunov" of the linear process;
        "trace" of H at the minimum, "traces" and "radii" (of SAM) where the long runs end, "segment": highest loss on
        the line from the minimum to each end.
    """
    with single_thread():
        minimum = Minimum(seed, lr)
        jacobian = minimum.jacobian(minimum.theta)
        rho = rho_with_threshold(jacobian, lr / ratio)
        root = leading_moment(jacobian, lr, rho)
        short = Copies(minimum.network, minimum.theta + _shifts(root, copies, seed))
        losses: list[list[float]] = []

        def watch(_: int) -> None:
            losses.append(minimum.losses(short.weights.detach()).view(BLOCKS, -1).mean(1).tolist())

        minimum.descend(short, rho, steps, watch=watch)
        long = Copies(minimum.network, minimum.theta + _shifts(root, long_copies, seed))
        every, when, found = max(1, long_steps // 400), [], []

        def watch_long(step: int) -> None:
            if step % every == 0:
                when.append(step)
                found.append(minimum.losses(long.weights.detach()).tolist())

        minimum.descend(long, rho, long_steps, watch=watch_long)
        ends = long.weights.detach()
        alphas = torch.linspace(0, 1, 21, dtype=torch.float64)
        lines = [minimum.losses(minimum.theta + alphas.unsqueeze(1) * (end - minimum.theta)) for end in ends]
        there = [minimum.jacobian(end) for end in ends]
        return {
            "rho": rho,
            "sgd": radius(jacobian, lr),
            "sam": radius(jacobian, lr, rho),
            "loss": losses,
            "long_step": when,
            "long_loss": found,
            "lyapunov": lyapunov_exponent(torch.linalg.qr(jacobian.T)[1].T, lr, rho),
            "trace": float(jacobian.square().sum() / NUM_EXAMPLES),
            "traces": [float(end.square().sum() / NUM_EXAMPLES) for end in there],
            "radii": [radius(end, lr, rho) for end in there],
            "segment": [float(line.max()) for line in lines],
        }


def _shifts(root: Tensor, copies: int, seed: int) -> Tensor:
    """[copies, p] of the length `SIZE`, root mean square."""
    random = torch.Generator().manual_seed(seed + 2)
    return SIZE * torch.randn(copies, root.shape[1], generator=random, dtype=torch.float64) @ root.T


def full_batch_run(seed: int, lr: float, ratio: float, steps: int) -> dict[str, Any]:
    """Full-batch unnormalised SAM from a minimum, shifted along the top eigenvector of its Hessian.

    ρ is such that h (1 + ρ h) is `ratio` times 2/η for the largest eigenvalue h.

    Returns:
        "growth": of the loss in each step; "predicted": (1 − η h (1 + ρ h))²; "rho", "curvature".
    """
    with single_thread():
        minimum = Minimum(seed, lr)
        jacobian = minimum.jacobian(minimum.theta)
        values, vectors = torch.linalg.eigh(jacobian @ jacobian.T / NUM_EXAMPLES)
        h = float(values[-1])
        rho = (2 * ratio / (lr * h) - 1) / h
        top = jacobian.T @ vectors[:, -1]
        runs = Copies(minimum.network, (minimum.theta + SIZE / 100 * top / top.norm()).unsqueeze(0))
        losses: list[float] = []
        minimum.descend(
            runs, rho, steps, full=True, watch=lambda _: losses.append(float(minimum.losses(runs.weights.detach())))
        )
        return {
            "growth": [b / a for a, b in itertools.pairwise(losses)],
            "predicted": (1 - lr * h * (1 + rho * h)) ** 2,
            "rho": rho,
            "curvature": h,
        }
