"""Parts of the study of block heterogeneity that train no network: quadratics, known spectra, sampled against exact."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from ...hessian.block_spectra import block_spectra
from ...hessian.density import w1_distance
from ...hessian.divergence import js_divergence, js_grid_sum, spectral_masses
from ...hessian.lockstep import sample
from ...hessian.operator import DenseOperator
from ...hessian.quadrature import densities
from .character_training import single_thread
from .optimizer_gap import DENSE_LIMIT, network, objective, weight_blocks
from .quadratic_suite import CASES, Descent, quadratic_suite

GOAL = 1e-8


def quadratics(draws: int) -> dict[str, dict[str, Any]]:
    """Steps of gradient descent and of Adam with its first second moment, by case.

    Returns:
        "gd", "adam": steps to 1e-8 of the initial loss, by draw of rotations and start; "r": κ of what Adam descends
        over the largest κ of a block; "curves": [step, loss share of GD, of Adam] of the
            draw with the median steps of Adam.
    """
    found = {}
    for name in CASES:
        record: dict[str, Any] = {"gd": [], "adam": [], "r": []}
        for seed in range(draws):
            gd, adam, block_condition = descents(name, seed)
            record["gd"].append(gd.steps_to(GOAL))
            record["adam"].append(adam.steps_to(GOAL))
            record["r"].append(adam.condition / block_condition)
        gd, adam, _ = descents(name, record["adam"].index(statistics.median_low(record["adam"])))
        steps = sorted({0, *(round(10 ** (k / 12)) for k in range(58))})
        record["curves"] = [[t, gd.loss(t) / gd.loss(0), adam.loss(t) / adam.loss(0)] for t in steps]
        found[name] = record
    return found


def descents(name: str, seed: int) -> tuple[Descent, Descent, float]:
    """Gradient descent and Adam from one Gaussian start, and the largest κ of a block."""
    problem = quadratic_suite(seed)[name]
    # Another stream than that of the rotations.
    start = torch.randn(len(problem.H), generator=torch.Generator().manual_seed(10_000 + seed), dtype=torch.float64)
    return problem.descent(start), problem.descent(start, (problem.H @ start).abs()), problem.block_condition


def limit_cycles(lrs: list[float], *, beta2: float, steps: int, draws: int) -> list[list[float]]:
    """Mean loss over the third and over the last quarter of the steps of Adam (β1 = 0), heterogeneous case, by lr."""
    H = torch.stack([quadratic_suite(seed)["heterogeneous"].H for seed in range(draws)])
    start = torch.randn(draws, H.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    with single_thread():
        for lr in lrs:
            w = nn.Parameter(start.clone())
            optimizer = torch.optim.Adam([w], lr=lr, betas=(0.0, beta2), eps=1e-30)
            losses = []
            for _ in range(steps):
                w.grad = torch.einsum("mij,mj->mi", H, w.detach())
                losses.append(0.5 * float((w.grad * w.detach()).sum()) / draws)
                optimizer.step()
            quarter = steps // 4
            found.append([math.fsum(losses[i : i + quarter]) / quarter for i in (2 * quarter, 3 * quarter)])
    return found


def known_spectrum(seed: int, *, num_steps: int = 100, num_probes: int = 10) -> dict[str, float]:
    """Lanczos quadrature of a rotated matrix of 400 known eigenvalues, 380 in [-1, 1] and 20 from 3 to 100.

    Returns:
        "top": relative error of the largest node, and "copies", the most nodes of one probe within 1e-6 of it; "trace"
        and "frobenius" (squared): errors over their standard errors; "stderr": that of the trace over
        √(2 / num_probes) ‖A‖_F; "integral" of the smoothed density.
    """
    values = torch.cat(
        [torch.linspace(-1, 1, 380, dtype=torch.float64), torch.logspace(math.log10(3), 2, 20, dtype=torch.float64)]
    )
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)).Q
    op = DenseOperator(Q @ torch.diag(values) @ Q.T)
    with single_thread():
        [density] = densities(sample([op], num_steps, num_probes, [seed], lambda _: None))
    mean, square = density.mean(), density.moment(2)
    norm = float(values.norm())
    grid = density.grid(2000)
    near = ((density.nodes / values[-1] - 1).abs() < 1e-6) & (density.weights > 0)
    return {
        "top": abs(float(density.nodes.max() / values[-1]) - 1),
        "copies": int(near.sum(1).max()),
        "trace": (mean.estimate - float(values.mean())) / mean.stderr,
        "frobenius": (square.estimate - norm**2 / n) / square.stderr,
        "stderr": n * mean.stderr / (math.sqrt(2 / num_probes) * norm),
        "integral": float(torch.trapezoid(density.on_grid(grid)[0], grid)),
    }


def sampled_against_exact(model: str, *, seed: int, num: int, text: str | None = None) -> dict[str, Any]:
    """The default sampling of the large blocks of a network beside the exact spectra.

    Returns:
        "w1": Wasserstein-1 distance over the range of the eigenvalues, by sampled block; "top": relative error of the
        largest eigenvalue; "js", "stderr", "exact_js": mean divergence on the log axis, sampled with its standard
        error, and exact; "linear", "exact_linear" on the linear axis; "products" of both.
    """
    net = network(model, seed, text).double()
    with single_thread():
        problem, blocks = objective(net, model, num, text), weight_blocks(net)
        sampled = block_spectra(problem, blocks)
        exact = block_spectra(problem, blocks, dense_limit=DENSE_LIMIT)
    w1, top = {}, {}
    for block, spectrum in sampled.items():
        if spectrum.exact:
            continue
        values, shares = exact[block].atoms()
        w1[block] = w1_distance(*spectrum.atoms(), values, shares) / float(values.max() - values.min())
        top[block] = abs(float(spectrum.top[0]) / float(values.max()) - 1)
    found, true = sampled.heterogeneity(), exact.heterogeneity()
    return {
        "w1": w1,
        "top": top,
        "js": found.js_divergence_mean,
        "stderr": found.js_divergence_stderr,
        "exact_js": true.js_divergence_mean,
        "linear": sampled.heterogeneity(axis="linear").js_divergence_mean,
        "exact_linear": exact.heterogeneity(axis="linear").js_divergence_mean,
        "products": [sampled.products, exact.products],
    }


def grid_sums(points: list[int]) -> dict[str, list[float]]:
    """The same two spectra compared on finer and finer grids, without and with the spacing; σ² = 1e-5.

    Returns:
        "sum": without the spacing, by number of points; "times spacing": that times the spacing; "divergence": ours.
    """
    spectra = _two_spectra()
    nodes = torch.cat([theta for theta, _ in spectra])
    width = float(nodes.max() - nodes.min()) + 2
    sums = [float(js_grid_sum(spectra, num_points=num)[0, 1]) for num in points]
    ours = float(js_divergence(spectral_masses(spectra, axis="linear", sigma=math.sqrt(1e-5))[1])[0, 1])
    return {
        "sum": sums,
        "times spacing": [value * width / (num - 1) for value, num in zip(sums, points, strict=True)],
        "divergence": [ours],
    }


def _two_spectra() -> list[tuple[Tensor, Tensor]]:
    """Fifty eigenvalues each, in [-0.1, 0.4] and in [0, 0.5]."""
    spectra = []
    for i in range(2):
        rng = torch.Generator().manual_seed(i)
        nodes = 0.5 * torch.rand(50, generator=rng, dtype=torch.float64) - (0.1 if i == 0 else 0.0)
        spectra.append((nodes, torch.full_like(nodes, 1 / 50)))
    return spectra
