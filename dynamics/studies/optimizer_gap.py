"""Small networks trained by SGD and by Adam, each with a learning rate of its own, and their block spectra."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...hessian.divergence import spectral_masses
from ...landscape.objective import Objective
from ..data_order import DataOrder
from ..optimizers.choice import make_optimizer
from ..point import Point
from ..spectra_measurements import BlockSpectra
from ..workloads.digits import digits
from ..workloads.examples import Dataset, Examples
from ..workloads.text import KJV_COMMAND, text_windows
from .character_training import single_thread
from .small_networks import (
    CharacterModel,
    Layer,
    MixerLayer,
    PatchClassifier,
    cnn,
    fan_in_start,
    gpt_start,
    mlp,
)

LENGTH, NUM_WINDOWS = 64, 4096
SCALE = 10.0
# Characters that each window lends to the Hessian.
MEASURED_LENGTH = 32
BATCH_SIZE = {"digits": 64, "text": 32}
# Learning rates are half decades, 10^(k/2). Four are tried first, then others until the best is not at an end.
FIRST_TRIES = {"SGD": (-4, -3, -2, -1), "Adam": (-6, -5, -4, -3)}
MOST_TRIES = 9
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adam": {}}
# No exact block is larger, whatever the vocabulary of the text.
DENSE_LIMIT = 2048
LAST_SHARE = 0.1

# What a model is made of, and what it is trained on.
MODELS: dict[str, tuple[str, Callable[[str | None], nn.Module]]] = {
    "MLP": ("digits", lambda text: mlp()),
    "CNN": ("digits", lambda text: cnn()),
    "MLP, scaled": ("digits", lambda text: mlp(SCALE)),
    "mixer": ("digits", lambda text: PatchClassifier(MixerLayer())),
    "ViT, 0.02": ("digits", lambda text: gpt_start(PatchClassifier(Layer(causal=False)))),
    "transformer, 0.02": ("text", lambda text: gpt_start(_characters(text))),
    "transformer, fan-in": ("text", lambda text: fan_in_start(_characters(text))),
}


def installed_text() -> str:
    """The King James Bible where the program that prints it is installed, else the manual inside CPython."""
    return "kjv" if shutil.which(KJV_COMMAND[0]) else "pydoc"


def network(name: str, seed: int, text: str | None = None) -> nn.Module:
    """A model at its initial weights; the global random stream is left alone.

    Args:
        text: For models of text, as `source` of `text_windows`, here and below.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name][1](text)


def weight_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks: weight tensors of at least two dimensions; no biases, norms or positions."""
    return [name for name, p in model.named_parameters() if p.ndim >= 2 and "positions" not in name]


def objective(model: nn.Module, name: str, num: int, text: str | None = None) -> Objective:
    """Mean cross-entropy of the first `num` digits, or of the first characters of so many windows.

    BatchNorm uses the statistics of these examples: the loss that the optimizer descends.
    """
    train = data(MODELS[name][0], text).train
    inputs, targets = train.inputs[:num], train.targets[:num]
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    else:
        inputs, targets = inputs[:, :MEASURED_LENGTH], targets[:, :MEASURED_LENGTH]
    return Objective.supervised(model, nn.CrossEntropyLoss(), (inputs, targets), mode="train")


def block_record(model: nn.Module, name: str, num: int, text: str | None = None) -> dict[str, Any]:
    """The block spectra of a model as the measurement `BlockSpectra` finds them, in float64.

    Returns:
        "blocks"; "scale" (largest |λ|) and "size" by block; "js" [B, B]; the whole model's "mean", "max", "linear",
        "ratio", "spread"; "negative" mass by block; "grid" of log10 |λ| and "density" [B, G] per decade.
    """
    model = copy.deepcopy(model).double()
    measurement = BlockSpectra(blocks=weight_blocks(model), dense_limit=DENSE_LIMIT)
    with single_thread():
        rows = list(measurement.measure(Point(0, objective(model, name, num, text))))
    [main] = [row for row in rows if row.quantity == measurement.name]
    arrays, blocks = main.arrays or {}, [row.block for row in rows if row.quantity == "block_sharpness"]
    whole = {row.quantity.removeprefix(f"{measurement.name}_"): row.value for row in rows if not row.block}
    atoms = [(arrays[f"{block}/nodes"], arrays[f"{block}/weights"]) for block in blocks]
    grid, masses = spectral_masses(atoms, zeros=[float(arrays[f"{block}/size_and_noise"][1]) for block in blocks])
    return {
        "blocks": [_short(block) for block in blocks],
        "size": [int(arrays[f"{block}/size_and_noise"][0]) for block in blocks],
        "scale": [float(nodes.abs().max()) for nodes, _ in atoms],
        "negative": [row.value for row in rows if row.quantity == "block_negative_mass"],
        "js": arrays["js_divergence"].tolist(),
        "mean": main.value,
        **{key: whole[key] for key in ("max", "linear")},
        "ratio": whole["scale_ratio"],
        "spread": whole["scale_spread"],
        "grid": [round(x, 4) for x in grid.tolist()],
        "density": [[round(m, 5) for m in row] for row in (masses[:, :-1] / (grid[1] - grid[0])).tolist()],
    }


@dataclass(frozen=True)
class Training:
    """A model after its training.

    Attributes:
        losses: Of every step's batch; the last is not finite where training diverged.
        records: What was recorded, by step.
    """

    model: nn.Module
    losses: list[float]
    records: dict[str, Any]


def train(
    name: str,
    optimizer: str,
    lr: float,
    *,
    seed: int,
    steps: int,
    text: str | None = None,
    at: Sequence[int] = (),
    record: Callable[[nn.Module], Any] | None = None,
) -> Training:
    """Trains a model at a constant learning rate, until a loss is not finite.

    Args:
        optimizer: "SGD" (momentum 0.9) or "Adam" (torch's defaults).
        seed: Of the weights and of the order of the data.
        at, record: `record(model)` after these numbers of steps.
    """
    model, examples = network(name, seed, text), data(MODELS[name][0], text).train
    rule = make_optimizer(optimizer, model, {**OPTIONS[optimizer], "lr": lr})
    order = DataOrder(examples.num, BATCH_SIZE[MODELS[name][0]], seed)
    done = Training(model, [], {})
    with single_thread():
        for step in range(steps + 1):
            if record is not None and step in at:
                done.records[str(step)] = record(model)
            if step == steps:
                break
            batch = examples.chosen(order.at(step))
            rule.zero_grad()
            loss = F.cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            rule.step()
            done.losses.append(float(loss.detach()))
            if not math.isfinite(done.losses[-1]):
                break
    return done


def trained(model: str, optimizer: str, lr: float, *, seed: int, steps: int, text: str | None = None) -> dict[str, Any]:
    """What `train` came to.

    Returns:
        "train": mean batch loss of the last tenth of the steps, nats, infinite if it diverged; "held_out" loss and
        "accuracy"; "curve": pairs [step, mean batch loss since the one before].
    """
    done = train(model, optimizer, lr, seed=seed, steps=steps, text=text)
    losses = done.losses
    if not math.isfinite(losses[-1]):
        return {"train": math.inf, "held_out": math.inf, "accuracy": 0.0, "curve": []}
    with single_thread():
        held_out_loss, accuracy = _judged(done.model, data(MODELS[model][0], text).held_out)
    last, every = losses[-max(1, int(steps * LAST_SHARE)) :], max(1, steps // 40)
    return {
        "train": sum(last) / len(last),
        "held_out": held_out_loss,
        "accuracy": accuracy,
        "curve": [[end, sum(losses[end - every : end]) / every] for end in range(every, steps + 1, every)],
    }


def tuned(optimizer: str, attempt: Callable[[float, int], dict[str, Any]], *, seeds: Sequence[int]) -> dict[str, Any]:
    """The learning rate of lowest train loss on the first seed, and what it gives on all.

    Args:
        attempt: What `trained` returns, by learning rate and seed.

    Returns:
        "lr"; "train", "held_out", "accuracy" by seed; "tried": train loss by learning rate; "inside": whether the best
        is not at an end of those tried; "curve" of the first seed.
    """
    found: dict[int, dict[str, Any]] = {}

    def run(k: int) -> float:
        found[k] = attempt(half_decade(k), seeds[0])
        return found[k]["train"]

    best = search(run, FIRST_TRIES[optimizer], MOST_TRIES)
    again = [found[best], *(attempt(half_decade(best), seed) for seed in seeds[1:])]
    return {
        "lr": half_decade(best),
        **{key: [one[key] for one in again] for key in ("train", "held_out", "accuracy")},
        "tried": {f"{half_decade(k):.3g}": found[k]["train"] for k in sorted(found)},
        "inside": min(found) < best < max(found),
        "curve": found[best]["curve"],
    }


def search(run: Callable[[int], float], first: Sequence[int], most: int) -> int:
    """The integer of lowest `run`: `first` are tried, then neighbours until the best has one on either side."""
    losses = {k: run(k) for k in first}
    while len(losses) < most:
        best = min(losses, key=lambda k: losses[k])
        if best == min(losses):
            losses[best - 1] = run(best - 1)
        elif best == max(losses):
            losses[best + 1] = run(best + 1)
        else:
            break
    return min(losses, key=lambda k: losses[k])


def half_decade(k: int) -> float:
    """10^(k/2) to three digits."""
    return float(f"{10 ** (k / 2):.3g}")


def spectra_along(
    model: str, lr: float, *, seed: int, at: Sequence[int], num: int, text: str | None = None
) -> dict[str, Mapping[str, Any]]:
    """`block_record` by step of a training with Adam."""

    def record(net: nn.Module) -> dict[str, Any]:
        return block_record(net, model, num, text)

    return train(model, "Adam", lr, seed=seed, steps=max(at), text=text, at=at, record=record).records


def _short(parameter: str) -> str:
    """wq for layer.attention.wq.weight."""
    return parameter.removesuffix(".weight").removesuffix(".linear").rpartition(".")[2]


@torch.no_grad()
def _judged(model: nn.Module, held_out: Examples) -> tuple[float, float]:
    """Held-out loss and accuracy."""
    model.eval()
    outputs = model(held_out.inputs)
    model.train()
    loss = float(F.cross_entropy(outputs, held_out.targets))
    return loss if math.isfinite(loss) else math.inf, float((outputs.argmax(1) == held_out.targets).double().mean())


@functools.cache
def data(kind: str, text: str | None = None) -> Dataset:
    """The digits, or windows of text."""
    return digits() if kind == "digits" else _windows(text)[0]


@functools.cache
def _windows(text: str | None) -> tuple[Dataset, str]:
    found = text_windows(text, num_examples=NUM_WINDOWS, length=LENGTH)
    return found.data, found.vocabulary


def _characters(text: str | None) -> CharacterModel:
    return CharacterModel(len(_windows(text)[1]), LENGTH)
