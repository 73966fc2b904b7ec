"""What the study of PSGD measures: fits to known Hessians, descents, invariance, noise, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizers.psgd import KINDS, PSGD
from ..optimizers.psgd_group import BALANCE_PROBABILITY, Coins, Factor, initial_scale
from ..optimizers.psgd_xmat import XMat
from .psgd_problems import absolute_inverse, low_rank_hessian, rosenbrock, square_root, x_shaped_hessian

NO_COINS = Coins(0.0, False, False)


def fitted_to_a_quadratic(
    kind: str,
    hessian: Tensor,
    marks: Sequence[int],
    judge: Callable[[Tensor], float],
    rate: Callable[[int], float] = lambda t: 0.1,
    *,
    seed: int,
    shape: tuple[int, ...] = (-1,),
) -> list[float]:
    """`judge(Q)` after so many pairs (v, H v), as the optimizer fits them while the weights stay; LRA has rank 3."""
    n = len(hessian)
    identity = torch.eye(n, dtype=hessian.dtype)
    draw = torch.Generator().manual_seed(seed)
    p = torch.zeros(n, dtype=hessian.dtype).reshape(shape)
    options = {"rank": 3, "num_coordinates": n, "max_size": 8192, "max_skew": 10.0}
    factor, found = None, []
    for t in range(1, max(marks) + 1):
        v = torch.randn(n, dtype=hessian.dtype, generator=draw)
        h = hessian @ v
        if factor is None:
            state = KINDS[kind].initial(p, initial_scale(h, v), options, draw)
            factor = KINDS[kind].gathered([{"b": torch.zeros_like(p), **state}])
        balance, first = torch.rand(2, generator=draw).tolist()
        coins = Coins(0.0, balance < BALANCE_PROBABILITY, first < 0.5)
        factor = factor.fitted(v, h, rate(t), "2nd", coins)
        if t in marks:
            found.append(judge(factor.apply(identity)))
    return found


def falling(t: int) -> float:
    return 0.1 / math.sqrt(1 + t / 100)


def x_shaped(indefinite: bool, decay: bool, instances: int, marks: list[int]) -> list[list[float]]:
    """XMat on X-shaped Hessians (n = 10, condition number 86), by instance.

    Positive definite: ‖P H − I‖₂. Indefinite, with both signs in every 2 × 2 block: ‖P − |H|⁻¹‖ / ‖|H|⁻¹‖.
    """
    results = []
    for instance in range(instances):
        hessian = x_shaped_hessian(10, 86.0, instance, indefinite=indefinite)
        target = absolute_inverse(hessian)

        def judge(Q: Tensor, hessian: Tensor = hessian, target: Tensor = target) -> float:
            P = Q.T @ Q
            if indefinite:
                return float((P - target).norm() / target.norm())
            return float(torch.linalg.matrix_norm(P @ hessian - torch.eye(len(P), dtype=P.dtype), 2))

        rate = falling if decay else (lambda t: 0.1)
        results.append(fitted_to_a_quadratic("xmat", hessian, marks, judge, rate, seed=instance))
    return results


def low_rank(instances: int, marks: list[int]) -> dict[str, Any]:
    """LRA of rank 3 on diagonal + rank 3 (n = 30): condition number of Q H Qᵀ, by instance."""
    conditions, results = [], []
    for instance in range(instances):
        hessian = low_rank_hessian(30, 3, instance)
        conditions.append(float(torch.linalg.cond(hessian)))

        def judge(Q: Tensor, hessian: Tensor = hessian) -> float:
            return float(torch.linalg.cond(Q @ hessian @ Q.T))

        results.append(fitted_to_a_quadratic("lra", hessian, marks, judge, seed=instance))
    return {"conditions": conditions, "results": results}


def kronecker(instances: int, marks: list[int]) -> list[list[float]]:
    """Kron on ½ tr(Xᵀ A X B), X [4, 5]: ‖P H − I‖₂ with H = A ⊗ B."""
    results = []
    for instance in range(instances):
        draw = torch.Generator().manual_seed(instance)
        A, B = (_positive(size, draw) for size in (4, 5))
        hessian, identity = torch.kron(A, B), torch.eye(20, dtype=torch.float64)

        def judge(Q: Tensor, hessian: Tensor = hessian, identity: Tensor = identity) -> float:
            return float(torch.linalg.matrix_norm(Q.T @ Q @ hessian - identity, 2))

        results.append(fitted_to_a_quadratic("kron", hessian, marks, judge, seed=instance, shape=(4, 5)))
    return results


def rosenbrock_descent(kind: str, steps: int, every: int, seed: int) -> list[list[float]]:
    """[step, loss] of 50 Rosenbrock functions side by side, from 0, learning rate 0.5."""
    x = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = PSGD([x], lr=0.5, kind=kind, curvature="hvp", seed=seed)
    curve = [[0, float(rosenbrock(x).detach())]]
    for step in range(1, steps + 1):
        optimizer.step(lambda: rosenbrock(x))
        if step % every == 0:
            curve.append([step, float(rosenbrock(x).detach())])
    return curve


def equivariance(normalizer: str, steps: int, seeds: int) -> float:
    """Largest |θ − D θ'| of two runs of XMat, in the coordinates θ and θ' = D⁻¹ θ, D diagonal."""
    worst = 0.0
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        theta = 0.1 * torch.randn(20, dtype=torch.float64, generator=draw)
        D = torch.exp(torch.randn(20, dtype=torch.float64, generator=draw))
        scaled = theta / D
        a, b = torch.full_like(theta, 0.1), torch.zeros_like(theta)
        one: Factor = XMat(a, b)
        other: Factor = XMat(a / D, b / D.flip(0))
        for _ in range(steps):
            v = torch.randn(20, dtype=torch.float64, generator=draw)
            theta, one = _step(rosenbrock, theta, one, v, normalizer)
            scaled, other = _step(lambda x, D=D: rosenbrock(D * x), scaled, other, v / D, normalizer)
            worst = max(worst, float((theta - D * scaled).abs().max()))
    return worst


def noise_response(rates: list[float], probes: int, noise: float, instance: int) -> dict[str, Any]:
    """Pairs h = H v + noise w from P* = (H² + noise² I)^(-1/2) on; and BFGS on the same pairs.

    By rate: rms of P − mean P over ‖P*‖, and the largest ‖P − P*‖ / ‖P*‖.
    """
    hessian = x_shaped_hessian(10, 86.0, instance)
    target = absolute_inverse(hessian, noise)
    root = square_root(target)  # X-shaped, as the square root of an X-shaped matrix is
    identity = torch.eye(10, dtype=torch.float64)
    fluctuation, worst = [], []
    for rate in rates:
        draw = torch.Generator().manual_seed(instance)
        factor: Factor = XMat(root.diagonal().clone(), root.flip(1).diagonal().clone())
        seen = []
        for _ in range(probes):
            v, h = _noisy_pair(hessian, noise, draw)
            factor = factor.fitted(v, h, rate, "2nd", NO_COINS)
            Q = factor.apply(identity)
            seen.append(Q.T @ Q)
        stack = torch.stack(seen)
        late = stack[probes // 5 :]
        fluctuation.append(float((late - late.mean(0)).square().sum((1, 2)).mean().sqrt() / target.norm()))
        worst.append(float(torch.linalg.matrix_norm(stack - target).max() / target.norm()))
    secant = _secant_worst(hessian, target, noise, probes, instance)
    return {"fluctuation": fluctuation, "worst": worst, "secant": secant}


def overhead(repeats: int) -> dict[str, float]:
    """Least processor seconds of a full-batch step on the digits network (64-100-100-10, 1500 examples)."""
    from ..workloads.digits import digits

    data = digits(1500).train
    loss_of = nn.CrossEntropyLoss()
    steps: dict[str, Callable[[], Any]] = {}
    for name in ("SGD", "product", "hvp", "difference", "whiten"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
        steps[name] = _timed_step(name, model, lambda model=model: loss_of(model(data.inputs), data.targets))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = process_time()
            step()
            times[name].append(process_time() - start)
    return {name: min(values) for name, values in times.items()}


def _step(
    loss: Callable[[Tensor], Tensor], x: Tensor, factor: Factor, v: Tensor, normalizer: str
) -> tuple[Tensor, Factor]:
    """One step of XMat with a given probe, learning rate 0.1."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (h,) = torch.autograd.grad(gradient, x, v)
    factor = factor.fitted(v, h, 0.1 if normalizer == "2nd" else 0.01, normalizer, NO_COINS)
    return (x - 0.1 * factor.precondition(gradient)).detach(), factor


def _noisy_pair(hessian: Tensor, noise: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    v, w = (torch.randn(len(hessian), dtype=hessian.dtype, generator=draw) for _ in range(2))
    return v, hessian @ v + noise * w


def _secant_worst(hessian: Tensor, target: Tensor, noise: float, probes: int, seed: int) -> float:
    """BFGS of the inverse Hessian (Nocedal and Wright, equation 6.17), from the exact P*, without safeguards."""
    draw = torch.Generator().manual_seed(seed)
    M, identity, worst = target.clone(), torch.eye(len(target), dtype=target.dtype), 0.0
    for _ in range(probes):
        s, y = _noisy_pair(hessian, noise, draw)
        rho = 1 / (y @ s)
        left = identity - rho * torch.outer(s, y)
        M = left @ M @ left.T + rho * torch.outer(s, s)
        error = float((M - target).norm() / target.norm())
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return min(worst, 1e300)  # JSON has no infinity


def _timed_step(name: str, model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    params = list(model.parameters())
    if name == "product":

        def multiply() -> None:
            gradients = torch.autograd.grad(loss(), params, create_graph=True)
            torch.autograd.grad(gradients, params, params)

        return multiply
    if name == "SGD":
        plain = torch.optim.SGD(params, lr=0.01)

        def descend() -> None:
            plain.zero_grad()
            loss().backward()
            plain.step()

        return descend
    mode = "whiten" if name == "whiten" else "newton"
    optimizer = PSGD(params, lr=0.01, mode=mode, curvature="hvp" if name == "hvp" else "difference")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return lambda: optimizer.step(loss if name == "hvp" else closure)


def _positive(size: int, draw: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q
    return basis @ torch.diag(torch.logspace(0, 1, size, dtype=torch.float64)) @ basis.T
