"""SGD-SaI: what the g-SNR says beyond the size of a tensor, and what scaling by it does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data_order import DataOrder
from ..optimizers.gradient_snr import gsnr
from ..optimizers.sgd_sai import SGDSaI
from ..workloads.digits import digits
from ..workloads.models import digits_mlp
from .character_training import CharacterTraining, curve_line, single_thread, summary, tuned
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study

PAPER = "Xu et al., No More Adam: Learning Rate Scaling at Initialization is All You Need, 2024"
GRID_LRS = (1e-4, 1e-3, 1e-2, 1e-1)
GRID_DECAYS = (0.0, 1e-4, 1e-2, 1e-1)
# The product of scale and learning rate covers the same range for all.
METHODS: Mapping[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "AdamW": ("AdamW", {"weight_decay": 0.0}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "SGD-SaI": ("SGDSaI", {"weight_decay": 0.0}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "SGD-SaI, paper's scale": ("SGDSaI", {"weight_decay": 0.0, "scale": "paper"}, (0.1, 0.3, 1.0, 3.0)),
    "SGD, momentum 0.9": ("SGD", {"momentum": 0.9}, (0.03, 0.1, 0.3, 1.0)),
}


def identities(steps: int) -> dict[str, float | None]:
    """Largest difference of weights in float64 to torch's SGD with lr · S per tensor, and to the authors' package."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (4, 3, 3), (9,), (2, 7)]
    start = [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes] for _ in range(steps)]

    def run(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = make(params)
        for given in gradients:
            for p, g in zip(params, given, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [p.detach() for p in params]

    def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        scales = [g.norm() / (g.std() + 1e-8) for g in gradients[0]]
        groups = [{"params": [p], "lr": 0.01 * float(S)} for p, S in zip(params, scales, strict=True)]
        return torch.optim.SGD(groups, momentum=0.9, dampening=0.9)

    def largest(one: list[Tensor], other: list[Tensor]) -> float:
        return max(float((p - q).abs().max()) for p, q in zip(one, other, strict=True))

    found: dict[str, float | None] = {"SGD": largest(run(lambda params: SGDSaI(params, weight_decay=0.0)), run(sgd))}
    try:
        from sgd_sai import SGD_sai  # type: ignore[import-not-found]

        found["package"] = largest(run(SGDSaI), run(SGD_sai))
    except ImportError:
        found["package"] = None
    return found


def sizes(seeds: Sequence[int]) -> dict[str, list[float]]:
    """G / √d of every weight matrix of the transformer and of the digits network at their starts, by seed."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        run = CharacterTraining(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mlp = digits_mlp()
        data = digits().train
        losses = {
            "transformer": (run.model, run.loss(0)),
            "digits": (mlp, F.cross_entropy(mlp(data.inputs), data.targets)),
        }
        for model_name, (model, loss) in losses.items():
            loss.backward()
            matrices = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.ndim == 2}
            for row in gsnr(matrices):
                found.setdefault(f"{model_name} {row.name}", []).append(row.relative)
    return found


def over_training(lr: float, steps: int) -> dict[str, list[float]]:
    """Size, G at the start and G at the end of every tensor of a transformer that SGD-SaI trains, on one batch."""
    run = CharacterTraining(0)

    def measured() -> list[float]:
        run.model.zero_grad()
        with single_thread():
            run.loss(0).backward()
        return [row.value for row in gsnr({name: _gradient(p) for name, p in run.model.named_parameters()}, eps=0.0)]

    before = measured()
    run.train(SGDSaI(run.model.parameters(), lr=lr, weight_decay=0.0), steps)
    return {"size": [float(p.numel()) for p in run.model.parameters()], "before": before, "after": measured()}


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def grid_accuracies(method: str, seeds: Sequence[int], steps: int) -> list[list[float]]:
    """Held-out accuracy [lr][weight decay] of the digits network, the mean over seeds."""
    data = digits()
    found = []
    for lr in GRID_LRS:
        line = []
        for decay in GRID_DECAYS:
            scores = []
            for seed in seeds:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = digits_mlp()
                if method == "SGD":
                    optimizer: Any = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
                else:
                    optimizer = SGDSaI(model.parameters(), lr=lr, weight_decay=decay)
                order = DataOrder(data.train.num, 64, seed)
                with single_thread():
                    for step in range(steps):
                        batch = data.train.chosen(order.at(step))
                        optimizer.zero_grad()
                        F.cross_entropy(model(batch.inputs), batch.targets).backward()
                        optimizer.step()
                    with torch.no_grad():
                        hits = model(data.held_out.inputs).argmax(1) == data.held_out.targets
                scores.append(float(hits.float().mean()))
            line.append(100 * statistics.fmean(scores))
        found.append(line)
    return found


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the logarithms."""
    return statistics.correlation([math.log(a) for a in x], [math.log(b) for b in y])


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    claims = _identities(lab)
    scales, points = _scales(lab)
    grid, surface = _grid(lab)
    training, curves = _training(lab)
    return [*claims, *scales, *grid, *training], [points, surface, curves]


def _identities(lab: Laboratory) -> list[Claim]:
    found = lab.part("identities", identities, steps=50)
    official = found["package"]
    return [
        Claim(
            "It is torch's SGD with dampening = momentum and the learning rate lr · S of each tensor",
            "derived here",
            "<= 1e-12 after 50 steps, float64",
            f"{found['SGD']:.1e}",
            found["SGD"] <= 1e-12,
        ),
        Claim(
            "With scale='code' it is the authors' package",
            "sgd-sai 1.0.3",
            "<= 1e-12 after 50 steps, float64",
            "package not installed" if official is None else f"{official:.1e}",
            None if official is None else official <= 1e-12,
        ),
    ]


def _scales(lab: Laboratory) -> tuple[list[Claim], Panel]:
    found = lab.part("sizes", sizes, seeds=[0] if lab.quick else [0, 1, 2])
    outside = {
        name: max(v, key=lambda x: abs(x - 1)) for name, v in found.items() if not all(0.95 <= x <= 1.2 for x in v)
    }
    values = [x for line in found.values() for x in line]
    steps = 60 if lab.quick else 400
    trained = lab.part("over training", over_training, lr=3e-3, steps=steps)
    size, before, after = trained["size"], trained["before"], trained["after"]
    roots = [math.sqrt(d) for d in size]
    relative = [[g / r for g, r in zip(G, roots, strict=True)] for G in (before, after)]
    kept, by_size, left = correlation(before, after), correlation(roots, after), correlation(relative[0], relative[1])
    claims = [
        Claim(
            "G is the square root of the number of entries, for all weight matrices at the start",
            "derived here",
            "G/√d in [0.95, 1.2]",
            f"{min(values):.4f} to {max(values):.4f} for {len(found)} matrices",
            not outside,
            "" if not outside else "outside: " + ", ".join(f"{name} {x:.3f}" for name, x in outside.items()),
        ),
        Claim(
            "G keeps its order during training, so that it can be frozen",
            PAPER,
            f"correlation of log G at the start and after {steps} steps >= 0.95",
            f"{kept:.4f}",
            kept >= 0.95,
            f"√d alone, without any gradient, correlates to {by_size:.4f}",
        ),
        Claim(
            "What G says beyond the size also keeps its order",
            "derived here",
            "correlation of log G/√d >= 0.95",
            f"{left:.3f}; G/√d from {min(relative[1]):.3f} to {max(relative[1]):.3f} at the end",
            left >= 0.95,
            "" if left >= 0.95 else "the part that could be information is not kept",
        ),
    ]
    order = sorted(range(len(roots)), key=roots.__getitem__)
    lines = [
        Line(label, [roots[i] for i in order], [G[i] for i in order], marker=True)
        for label, G in (("start", before), (f"after {steps} steps", after))
    ]
    return claims, Panel("Tensors of the transformer", "√d", "G", lines, x_log=True, y_log=True)


def _grid(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds, steps = ([0], 60) if lab.quick else ([0, 1, 2], 400)
    found = {m: lab.part(f"grid {m}", grid_accuracies, method=m, seeds=seeds, steps=steps) for m in ("SGDSaI", "SGD")}
    mean = {m: statistics.fmean(x for line in grid for x in line) for m, grid in found.items()}
    best = {m: max(x for line in grid for x in line) for m, grid in found.items()}
    lead, apart = mean["SGDSaI"] - mean["SGD"], abs(best["SGDSaI"] - best["SGD"])
    lines = {m: [f"{statistics.fmean(line):.1f}" for line in grid] for m, grid in found.items()}
    by_lr = "; ".join(f"{m} by lr: {', '.join(line)}" for m, line in lines.items())
    claims = [
        Claim(
            "Over a grid of learning rates and weight decays its mean accuracy is above SGD's, at equal best accuracy",
            f"{PAPER}, for ImageNet; margins chosen here",
            "mean >= 5 points above, best within 1 point",
            f"mean {mean['SGDSaI']:.1f} against {mean['SGD']:.1f}, best {best['SGDSaI']:.1f} against {best['SGD']:.1f}",
            None if lab.quick else lead >= 5 and apart <= 1,
            f"both on lr {', '.join(f'{lr:g}' for lr in GRID_LRS)}, where its steps are √d times as large; "
            f"SGD's decay is part of the gradient; {by_lr}",
        )
    ]
    curves = [
        Line("SGD-SaI" if m == "SGDSaI" else "SGD", GRID_LRS, [statistics.fmean(line) for line in grid], marker=True)
        for m, grid in found.items()
    ]
    return claims, Panel("Digits, mean over weight decays", "learning rate", "held-out accuracy, %", curves, x_log=True)


def _training(lab: Laboratory) -> tuple[list[Claim], Panel]:
    steps = 60 if lab.quick else 400
    found = {}
    for label, (optimizer, options, lrs) in METHODS.items():
        seeds = [0, 1, 2] if optimizer != "SGD" and "scale" not in options and not lab.quick else [0]
        rates = lrs[1:2] if lab.quick else lrs
        settings = {"optimizer": optimizer, "options": options, "lrs": rates, "seeds": seeds, "steps": steps}
        found[label] = lab.part(f"training {label}", tuned, **settings)
    first = {label: result["losses"][0] for label, result in found.items()}
    pairs = zip(found["SGD-SaI"]["losses"], found["AdamW"]["losses"], strict=True)
    gap = statistics.fmean(a - b for a, b in pairs)
    over_sgd = first["SGD-SaI"] - first["SGD, momentum 0.9"]
    texts = "; ".join(f"{label} {summary(result)}" for label, result in found.items())
    claims = [
        Claim(
            "SGD-SaI reaches AdamW on the character transformer, all tuned over four learning rates",
            PAPER,
            f"gap <= 0 after {steps} steps",
            f"{gap:+.3f} nats: {texts}",
            None if lab.quick else gap <= 0,
            "short run" if lab.quick else "" if gap <= 0 else "the paper's claim concerns long training",
        ),
        Claim(
            "It stays within half a nat of AdamW there",
            "margin chosen here",
            "gap <= 0.5 nats",
            f"{gap:+.3f}",
            None if lab.quick else gap <= 0.5,
            "short run" if lab.quick else "",
        ),
        Claim(
            "Its scales are better than one learning rate for all tensors",
            PAPER,
            "held-out loss below that of SGD with momentum, first seed",
            f"{over_sgd:+.3f} nats",
            None if lab.quick else over_sgd < 0,
            "short run" if lab.quick else "",
        ),
    ]
    lines = [curve_line(label, result) for label, result in found.items()]
    return claims, Panel("Character transformer, tuned", "step", "train loss, nats", lines)


STUDY = Study(
    "sgd-sai",
    "SGD-SaI: learning rates scaled once, at the first gradient",
    PAPER,
    "Transformer of 2 layers and width 48 on characters of real text, 400 steps of 32 windows, lr tuned over four "
    "values on the first seed; digits network of 17,610 weights, 400 steps of 64 examples.",
    investigate,
)
