"""Following λ_max along training: products a point, how often it is right, and what a monitor takes of the time.

    python benchmarks/tracking.py           # six minutes, one thread
    python benchmarks/tracking.py --quick   # one to two minutes, without results

A transformer (1.2M parameters, on the text of Python's standard library) and an MLP (269k, on scikit-learn's digits) at
two learning rates, trained by SGD with momentum 0.9; λ_max of a fixed batch to 1 % every 10 steps, by `EigenTracker`
and by a cold `top_eigenvalues`. The reference is a tight `top_eigenvalues`. The method was chosen on runs with other
seeds, of weights and of batches, than the ones here. It writes `results/tracking.md` and `results/tracking.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sharpscope import __version__
from sharpscope.dynamics.monitor import Monitor
from sharpscope.dynamics.spectra_measurements import Sharpness
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.tracking import EigenTracker
from sharpscope.landscape.objective import Objective
from torch import Tensor, nn

TOL, EVERY, MAX_OVERHEAD = 1e-2, 10, 0.05
RESULTS = Path(__file__).parent / "results"


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(
        self, vocabulary: int = 256, length: int = 64, width: int = 128, depth: int = 6, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, 0.0, 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)  # [examples, vocabulary, length]


def text(num: int, length: int = 64) -> tuple[Tensor, Tensor]:
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))[:60]
    ids = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    first = torch.randint(0, len(ids) - length - 1, (num,), generator=torch.Generator().manual_seed(5))
    pieces = torch.stack([ids[i : i + length + 1] for i in first.tolist()])
    return pieces[:, :-1], pieces[:, 1:]


def digits(num: int, side: int = 28) -> tuple[Tensor, Tensor]:
    """Enlarged digits with noise on the pixels and 5 % of random labels."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(labels), (num,), generator=generator)
    x = images[chosen].float().view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=(side, side), mode="bilinear").flatten(1)
    x = (x - 0.3) / 0.35 + 0.3 * torch.randn(num, side * side, generator=generator)
    y = labels[chosen]
    wrong = torch.rand(num, generator=generator) < 0.05
    y[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    return x, y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))


@dataclass(frozen=True)
class Setting:
    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    lr: float
    steps: int
    batch: int
    measured: int
    seeds: tuple[int, ...]


SETTINGS = (
    Setting("transformer", Transformer, lambda: text(256), 0.01, 150, 16, 16, (11,)),
    Setting("slow MLP", mlp, lambda: digits(2048), 0.005, 500, 128, 512, (11, 12)),
    Setting("jumping MLP", mlp, lambda: digits(2048), 0.05, 500, 128, 512, (11, 12)),
)


def training(
    setting: Setting, seed: int, at_step: Callable[[int, nn.Module, torch.optim.Optimizer], None], steps: int
) -> None:
    torch.manual_seed(seed)
    model, (x, y) = setting.model(), setting.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9)
    generator = torch.Generator().manual_seed(100 + seed)
    for step in range(steps + 1):
        at_step(step, model, optimizer)
        batch = torch.randint(0, len(x), (setting.batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracy(setting: Setting, steps: int) -> dict[str, object]:
    x, y = setting.data()
    part = x[: setting.measured], y[: setting.measured]
    points: list[tuple[float, ...]] = []
    for seed in setting.seeds:
        tracker = EigenTracker(tol=TOL, seed=seed)
        tight: list[Tensor] = []

        def compare(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if step % EVERY:
                return
            objective = Objective.supervised(model, F.cross_entropy, part)
            pairs = tracker.measure(Hessian(objective))  # noqa: B023
            cold = top_eigenvalues(Hessian(objective), tol=TOL, seed=step)
            reference = top_eigenvalues(Hessian(objective), tol=1e-4, seed=step + 1, start=tight[-1] if tight else None)  # noqa: B023
            tight[:] = [reference.vectors]  # noqa: B023
            exact = float(reference.values[0])
            found = (pairs.values[0], cold.values[0])
            errors = [abs(float(value) - exact) / exact for value in found]
            bar, residual = float(pairs.value_bounds[0]) / exact, float(pairs.residuals[0]) / exact
            if step:
                points.append((pairs.products, cold.products, *errors, bar, residual))

        training(setting, seed, compare, steps)
    products, cold, error, cold_error, bar, residual = np.array(points).T
    return {
        "setting": setting.name,
        "seeds": setting.seeds,
        "points": len(error),
        "products": round(float(products.mean()), 2),
        "cold products": round(float(cold.mean()), 2),
        "within 1 %": round(float(np.mean(error <= TOL)), 3),
        "cold within 1 %": round(float(np.mean(cold_error <= TOL)), 3),
        "median error": float(f"{np.median(error):.1e}"),
        "largest error": float(f"{error.max():.1e}"),
        "median error bar": float(f"{np.median(bar):.1e}"),
        "in the error bar": round(float(np.mean(error <= bar)), 3),
        "median residual": float(f"{np.median(residual):.1e}"),
    }


def overhead(setting: Setting, steps: int) -> dict[str, object]:
    x, y = setting.data()
    part = x[: setting.measured], y[: setting.measured]
    monitors: list[Monitor] = []
    sharpness = Sharpness(every=EVERY, tol=TOL)
    with tempfile.TemporaryDirectory() as folder, Trajectory.open(folder) as trajectory:

        def watch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if not monitors:
                objective = Objective.supervised(model, F.cross_entropy, part)
                monitors.append(Monitor(objective, optimizer, [sharpness], trajectory, max_overhead=MAX_OVERHEAD))
            if step < steps:
                monitors[0].step()

        began = time.perf_counter()
        training(setting, setting.seeds[0], watch, steps)
        return {
            "setting": setting.name,
            "steps": steps,
            "seconds": round(time.perf_counter() - began, 1),
            "points": len(trajectory.series("sharpness").steps),
            "last spacing": monitors[0].cadence["sharpness"],
            "share of the time": round(monitors[0].overhead, 4),
        }


def table(rows: list[dict[str, object]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(found: dict[str, list[dict[str, object]]]) -> str:
    return f"""# Following λ_max along training

sharpscope {__version__}, torch {torch.__version__}, Python {platform.python_version()}, 1 thread.
Made by `python benchmarks/tracking.py`.

λ_max to 1 % every {EVERY} steps; means over all points but the first of each run. "Cold" is `top_eigenvalues` without
knowledge of the point before. The seeds are not those that the method was chosen with.

{table(found["accuracy"])}

The time that a monitor with `max_overhead={MAX_OVERHEAD}` takes of a run, its first measurement included:

{table(found["overhead"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the steps, the MLP only for the overhead")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, object]]] = {"accuracy": [], "overhead": []}
    for setting in SETTINGS:
        found["accuracy"].append(accuracy(setting, setting.steps // 3 if quick else setting.steps))
        print(found["accuracy"][-1], flush=True)
    for setting in SETTINGS[1:2] if quick else SETTINGS[:2]:
        found["overhead"].append(overhead(setting, 500 if quick else {"transformer": 600}.get(setting.name, 3000)))
        print(found["overhead"][-1], flush=True)
    if not quick:
        (RESULTS / "tracking.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "tracking.md").write_text(report(found))


if __name__ == "__main__":
    main()
