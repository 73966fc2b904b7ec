"""Adam-mini: how much of Adam's second moment is needed, and the Hessian facts behind it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...hessian.curvature import Hessian
from ...landscape.objective import Objective
from ...landscape.reductions import Reduction
from ..optimizers.adam_mini import AdamMini
from ..optimizers.adam_mini_names import divisions_by_name
from ..workloads.models import CharTransformer
from .character_training import CharacterTraining, curve_line, single_thread, summary, trained, tuned
from .laboratory import Laboratory
from .result import Claim, Line, Panel
from .study import Study

PAPER = "Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, ICLR 2025"
LRS = (1e-3, 3e-3, 1e-2)
COMMON = {"weight_decay": 0.0}
LABELS = {"AdamW": "AdamW", "AdamMini": "Adam-mini", "whole": "one block per tensor", "SGD": "SGD, momentum 0.9"}


def one_entry_blocks(steps: int) -> float:
    """Largest difference of the weights to torch's AdamW, float64, character model."""

    def entries(name: str, p: Tensor) -> Reduction:
        return Reduction.entries(p.shape)

    def make(model: nn.Module) -> AdamMini:
        return AdamMini(model.parameters(), partition=entries, decay_vectors=True, weight_decay=0.1)

    return _difference(make, lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0.1), steps)


def package(steps: int) -> float | None:
    """Likewise to the authors' package with its own name rules; None where it is not installed."""
    try:
        from adam_mini import Adam_mini  # type: ignore[import-not-found]
    except ImportError:
        return None

    def make(model: nn.Module) -> AdamMini:
        named = [(f"mlp.{name}" if p.ndim == 2 else name, p) for name, p in model.named_parameters()]
        return AdamMini(named, weight_decay=0.1, partition=divisions_by_name(named))

    def oracle(model: nn.Module) -> Any:
        named = [(f"mlp.{name}" if p.ndim == 2 else name, p) for name, p in model.named_parameters()]
        return Adam_mini(named, weight_decay=0.1, verbose=False)

    return _difference(make, oracle, steps)


def _difference(make: Any, oracle: Any, steps: int) -> float:
    runs = [CharacterTraining(0, batch_size=4), CharacterTraining(0, batch_size=4)]
    for run, maker in zip(runs, (make, oracle), strict=True):
        run.model.double()
        run.train(maker(run.model), steps)
    pairs = zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def memory(widths: Sequence[int]) -> list[list[float]]:
    """[width, blocks over parameters, state bytes over AdamW's] of a 4-head transformer with biases."""
    found = []
    for width in widths:
        model = CharTransformer(64, width=width)
        ours, theirs = AdamMini(model.parameters(), model=model), torch.optim.AdamW(model.parameters())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        ours.step()
        theirs.step()
        blocks = sum(row.num_blocks for row in ours.table()) / sum(p.numel() for p in model.parameters())
        kept = sum(v.nbytes for state in theirs.state.values() for v in state.values() if isinstance(v, Tensor))
        found.append([width, blocks, ours.state_bytes() / kept])
    return found


def row_block_ratio(classes: int, seeds: Sequence[int]) -> list[float]:
    """Mean Frobenius norm of the row blocks of H_ww on the diagonal over that off it; one hidden layer at its start."""
    ratios = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, classes)).double()
            x, y = torch.randn(300, 30, dtype=torch.float64), torch.randint(classes, (300,))
        with single_thread():
            objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), params=["0.weight"])
            norms = torch.as_tensor(Hessian(objective).dense()).view(8, 30, 8, 30).square().sum((1, 3)).sqrt()
        diagonal = torch.eye(8, dtype=torch.bool)
        ratios.append(float(norms[diagonal].mean() / norms[~diagonal].mean()))
    return ratios


def condition_numbers(draws: int, blocks: int) -> list[float]:
    """κ(D^-1/2 H D^-1/2) / κ(H) for D = diag |g0|, g0 = H w0, random H with κ = 1000 and 20 rows.

    `blocks` = 1: a dense H with log-spaced eigenvalues. More: block-diagonal, one such eigenvalue for each block.
    """
    gen = torch.Generator().manual_seed(0)
    eigenvalues = torch.logspace(0, 3, blocks if blocks > 1 else 20, dtype=torch.float64)
    size = 20 // blocks
    found = []
    for _ in range(draws):
        if blocks == 1:
            Q = torch.linalg.qr(torch.randn(20, 20, generator=gen, dtype=torch.float64))[0]
            H = Q @ torch.diag(eigenvalues) @ Q.T
        else:
            H = torch.block_diag(*(value * torch.eye(size, dtype=torch.float64) for value in eigenvalues))
        g = H @ torch.randn(20, generator=gen, dtype=torch.float64)
        root = g.abs().rsqrt()
        scaled = root[:, None] * H * root
        found.append(float(torch.linalg.cond(scaled) / torch.linalg.cond(H)))
    return found


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    claims = _identities(lab)
    training, panel = _training(lab)
    hessian, curves = _hessian(lab)
    return [*claims, *training, *hessian], [panel, curves]


def _identities(lab: Laboratory) -> list[Claim]:
    same = lab.part("one-entry blocks", one_entry_blocks, steps=20)
    official = lab.part("package", package, steps=20)
    counts = lab.part("memory", memory, widths=[64, 128, 256])
    text = ", ".join(f"{share:.2%} at width {width:.0f}" for width, _, share in counts)
    return [
        Claim(
            "With one-entry blocks Adam-mini is AdamW",
            "derived here",
            "<= 1e-12 after 20 steps, float64",
            f"{same:.1e}",
            same <= 1e-12,
        ),
        Claim(
            "With the blocks of its name rules it is the authors' package",
            "adam-mini 1.1.1",
            "<= 1e-12 after 20 steps, float64",
            "package not installed" if official is None else f"{official:.1e}",
            None if official is None else official <= 1e-12,
        ),
        Claim(
            "Its state has half the bytes of AdamW's from width 64 on",
            PAPER,
            "<= 50.5 %",
            text,
            all(share <= 0.505 for _, _, share in counts),
            "each linear layer here has a bias, and biases keep one second moment per entry",
        ),
    ]


def _training(lab: Laboratory) -> tuple[list[Claim], Panel]:
    seeds = [0] if lab.quick else [0, 1, 2, 3, 4]
    steps = 60 if lab.quick else 400
    lrs = LRS[1:2] if lab.quick else LRS

    def part(label: str, optimizer: str, options: dict[str, Any], lrs: Sequence[float], seeds: Sequence[int]) -> Any:
        return lab.part(
            f"training {label}", tuned, optimizer=optimizer, options=options, lrs=lrs, seeds=seeds, steps=steps
        )

    found = {
        "AdamW": part("AdamW", "AdamW", COMMON, lrs, seeds[:3]),
        "AdamMini": part("AdamMini", "AdamMini", COMMON, lrs, seeds),
        "whole": part("whole", "AdamMini", {**COMMON, "partition": "parameter"}, lrs, seeds),
        "SGD": part("SGD", "SGD", {"momentum": 0.9}, (0.1,) if lab.quick else (0.1, 0.3, 1.0), seeds[:1]),
    }
    num = len(found["AdamW"]["losses"])
    gaps = [a - b for a, b in zip(found["AdamMini"]["losses"][:num], found["AdamW"]["losses"], strict=True)]
    gap = statistics.fmean(gaps)
    better = sum(a <= b for a, b in zip(found["AdamMini"]["losses"], found["whole"]["losses"], strict=True))
    lead = statistics.fmean(found["whole"]["losses"]) - statistics.fmean(found["AdamMini"]["losses"])
    first = {key: result["losses"][0] for key, result in found.items()}
    claims = [
        Claim(
            "Adam-mini trains the character model nearly as well as AdamW, both tuned over the same learning rates",
            f"{PAPER}; margin chosen here",
            f"gap <= 0.3 nats after {steps} steps",
            f"{gap:+.3f}: Adam-mini {summary(found['AdamMini'])}, AdamW {summary(found['AdamW'])}",
            None if lab.quick else gap <= 0.3,
            "short run" if lab.quick else "",
        ),
        Claim(
            "Its blocks are better than one block per tensor",
            PAPER,
            "in at least 4 of 5 seeds",
            f"{better} of {len(seeds)}, mean lead {lead:.3f} nats; one block per tensor: {summary(found['whole'])}",
            None if lab.quick else better >= 4,
            "short run" if lab.quick else "",
        ),
        Claim(
            "Order of the losses: AdamW, Adam-mini, one block per tensor, SGD",
            PAPER,
            "ascending, first seed",
            ", ".join(f"{LABELS[key]} {loss:.3f}" for key, loss in first.items()),
            None if lab.quick else list(first.values()) == sorted(first.values()),
        ),
    ]
    if not lab.quick:
        long = {
            key: lab.part(
                f"long {key}", trained, optimizer=key, options={**COMMON, "lr": found[key]["lr"]}, seed=0, steps=2000
            )["held_out"]
            for key in ("AdamW", "AdamMini")
        }
        left = long["AdamMini"] - long["AdamW"]
        claims.append(
            Claim(
                "The gap to AdamW shrinks with the length of training",
                PAPER,
                "<= 0.1 nats and below that of 400 steps, after 2000 steps, first seed",
                f"{left:+.3f} ({long['AdamMini']:.3f} against {long['AdamW']:.3f}); {gaps[0]:+.3f} after 400 steps",
                left <= 0.1 and left < gaps[0],
            )
        )
    lines = [curve_line(LABELS[key], result) for key, result in found.items()]
    return claims, Panel("Character transformer, tuned", "step", "train loss, nats", lines)


def _hessian(lab: Laboratory) -> tuple[list[Claim], Panel]:
    classes = (2, 5, 30, 100)
    seeds = list(range(2 if lab.quick else 10))
    ratios = [lab.part(f"row blocks {C}", row_block_ratio, classes=C, seeds=seeds) for C in classes]
    means = [statistics.fmean(found) for found in ratios]
    errors = [statistics.stdev(found) / len(found) ** 0.5 for found in ratios]
    draws = 200 if lab.quick else 2000
    dense = lab.part("condition dense", condition_numbers, draws=draws, blocks=1)
    blocky = lab.part("condition blocks", condition_numbers, draws=draws, blocks=4)
    worse = sum(ratio >= 1 for ratio in dense) / draws
    lower = sum(ratio < 1 for ratio in blocky) / draws
    claims = [
        Claim(
            "More classes make the Hessian of a hidden layer at its start more block-diagonal, row by row",
            PAPER,
            "diagonal over off-diagonal blocks grows with C, at least twofold from 2 to 30",
            ", ".join(f"C = {C}: {m:.2f} ± {e:.2f}" for C, m, e in zip(classes, means, errors, strict=True)),
            means == sorted(means) and means[2] >= 2 * means[0],
        ),
        Claim(
            "On a dense Hessian, Adam's diagonal does not lower the condition number",
            PAPER,
            "in at least 90 % of draws",
            f"{worse:.1%} of {draws}; median factor {statistics.median(dense):.2f}",
            worse >= 0.9,
        ),
        Claim(
            "On a block-diagonal one whose blocks are multiples of the identity it does",
            PAPER,
            "in at least 90 % of draws",
            f"{lower:.1%} of {draws}; median factor {statistics.median(blocky):.2g}",
            lower >= 0.9,
        ),
    ]
    line = Line("8 rows of 30 weights", classes, means, errors, marker=True)
    panel = Panel("Row blocks of the Hessian at the start", "classes", "diagonal over off-diagonal", [line], x_log=True)
    return claims, panel


STUDY = Study(
    "adam-mini",
    "Adam-mini: one second moment per dense block of the Hessian",
    PAPER,
    "Transformer of 2 layers and width 48 on characters of real text, 400 steps of 32 windows, lr tuned over three "
    "values on the first seed; small dense Hessians.",
    investigate,
)
