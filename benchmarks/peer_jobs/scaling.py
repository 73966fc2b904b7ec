"""How the costs grow: with parameters, examples, blocks and eigenvalues. Random initial weights, in gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .cases import Case, digits
from .jobs import JOBS, top_job
from .measure import Outcome, Rules
from .networks import GPT, mlp
from .tools import Tool

WIDTHS = {"1e4": 12, "1e5": 112, "1e6": 680, "1e7": 2790, "1.2e8": 10560}


@dataclass(frozen=True)
class Scale:
    """One table: a job on cases of growing size. `points` yields (size, case, eigenvalues asked for)."""

    key: str
    title: str
    points: Callable[[bool], Iterator[tuple[str, Case, int]]]
    job: str = ""

    def run(self, tools: Sequence[Tool], quick: bool, folder: Path) -> dict[str, dict[str, Outcome]]:
        """Outcomes by size and tool."""
        table = {}
        for size, case, k in self.points(quick):
            job = JOBS[self.job] if self.job else top_job(k, 1e-3)
            large, tiny = case.num_parameters > 5e7, case.num_parameters < 5e4
            rules = Rules(1 if large else 3, 3 if quick else 20, 2000 if tiny else 300)
            table[size] = job.run(case, tools, rules, folder)
        return table


def _perceptron(widths: tuple[int, ...], examples: int, name: str, side: int = 28) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(widths, nn.Tanh)
    return Case(name, model, nn.CrossEntropyLoss(), [digits(examples, 0, side=side, flat=True)])


def _by_parameters(quick: bool) -> Iterator[tuple[str, Case, int]]:
    for size, width in WIDTHS.items():
        if not quick or float(size) < 1e7:
            yield f"{size} (MLP)", _perceptron((784, width, width, 10), 64, f"width-{width}"), 1
    if not quick:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT(50257, 128, 768, 12, 12)
            window = torch.randint(0, 50257, (1, 129))
        batch = window[:, :-1].contiguous(), window[:, 1:].flatten()
        yield "1.2e8 (GPT-2 shape)", Case("gpt2", model, nn.CrossEntropyLoss(), [batch]), 1


def _by_examples(quick: bool) -> Iterator[tuple[str, Case, int]]:
    for examples in (16, 128, 1024) if quick else (16, 128, 1024, 8192):
        yield str(examples), _perceptron((784, 256, 256, 10), examples, f"examples-{examples}"), 1


def _by_blocks(quick: bool) -> Iterator[tuple[str, Case, int]]:
    for layers in (4, 16) if quick else (4, 16, 64):
        widths = (784, *[64] * (layers - 1), 10)
        yield str(2 * layers), _perceptron(widths, 256, f"layers-{layers}"), 1


def _by_eigenvalues(quick: bool) -> Iterator[tuple[str, Case, int]]:
    case = _perceptron((64, 64, 48, 10), 1024, "small", side=8)
    for k in (1, 10) if quick else (1, 3, 10, 30):
        yield str(k), case, k


SCALES = {
    scale.key: scale
    for scale in (
        Scale("parameters", "One Hessian-vector product, by parameters", _by_parameters, "hvp"),
        Scale("examples", "One Hessian-vector product of a 270k MLP, by examples", _by_examples, "hvp"),
        Scale("blocks", "One product with every block of an MLP of width 64, by blocks", _by_blocks, "blocks"),
        Scale("eigenvalues", "Top eigenvalues to 1e-3 of an MLP of 7.8k parameters, by their number", _by_eigenvalues),
    )
}
