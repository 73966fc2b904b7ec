"""The workloads by name: a network, a loss, real data, and settings that finish in minutes on two cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...landscape.objective import Objective
from ...landscape.selection import near_names
from .digits import digits
from .examples import Dataset, Examples, num_to_train_on
from .fashion_mnist import fashion_mnist
from .models import CharTransformer, digits_cnn, digits_mlp, fashion_cnn
from .text import text_windows

# Examples evaluated together when curvature is measured: bounds the memory of the graphs.
CHUNK_SIZE = 2048


class HalfSquaredError(nn.Module):
    """½ ‖f(x) − y‖², summed over the outputs and averaged over the examples."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (prediction - target).square().flatten(1).sum(1).mean()


@dataclass(frozen=True)
class Defaults:
    """How a workload is trained and measured when nothing else is asked for; None means on all examples."""

    steps: int
    every: int
    batch_size: int | None = None
    num_measured: int | None = None
    mode: str = "eval"
    # On small matrices a second thread gains a quarter, and costs several times that while others use the machine.
    threads: int | None = 1
    measure: tuple[str, ...] = ("loss", "sharpness", "stability_threshold")
    lr: Mapping[str, float] = field(default_factory=dict)  # by optimizer; others take their own default


@dataclass(frozen=True)
class Workload:
    """A network at its initial weights with the loss and the data to train it on."""

    name: str
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    train: Examples
    held_out: Examples
    source: str
    defaults: Defaults

    def loss(self, batch: Examples) -> Tensor:
        """Mean loss of a batch."""
        return self.criterion(self.model(batch.inputs), batch.targets)

    def objective(self, num_examples: int | None = None, **options: Any) -> Objective:
        """The loss over the first `num_examples` to train on; None takes as many as the workload's settings say.

        The `options` are those of `Objective`. Unless they say otherwise, networks with BatchNorm are in train mode:
        the loss with the statistics of the batch is the one that the optimizer descends.
        """
        num = num_to_train_on(num_examples, self.train.num, self.defaults.num_measured)
        options.setdefault("mode", self.defaults.mode)
        # Under BatchNorm in train mode the examples belong together.
        cut = num > CHUNK_SIZE and options["mode"] == "eval"
        options.setdefault("chunk_size", CHUNK_SIZE if cut else None)
        return Objective.supervised(self.model, self.criterion, tuple(t[:num] for t in self.train), **options)

    def accuracy(self, examples: Examples) -> float:
        """Share of labels that get the highest output, in eval mode; modes are left as found."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        hits = 0
        with torch.no_grad():
            for i in range(0, examples.num, CHUNK_SIZE):
                found = self.model(examples.inputs[i : i + CHUNK_SIZE]).argmax(1)
                hits += int((found == labels(examples.targets[i : i + CHUNK_SIZE])).sum())
        for module, training in modes.items():
            module.training = training
        return hits / labels(examples.targets).numel()

    def to(self, device: torch.device | str) -> Workload:
        """The same workload with model and data on a device."""
        train, held_out = (Examples(*(t.to(device) for t in part)) for part in (self.train, self.held_out))
        model = self.model.to(device)
        return Workload(self.name, model, self.criterion, train, held_out, self.source, self.defaults)


def labels(targets: Tensor) -> Tensor:
    """Class numbers of targets that are class numbers or one-hot rows."""
    return targets.argmax(1) if targets.is_floating_point() else targets


def _digits_mlp(data: Any, num_examples: int | None) -> tuple[Callable[[], nn.Module], nn.Module, Dataset]:
    found = digits(num_examples)
    train, held_out = (
        Examples(part.inputs, nn.functional.one_hot(part.targets, 10).float()) for part in (found.train, found.held_out)
    )
    return digits_mlp, HalfSquaredError(), Dataset(train, held_out, found.source)


def _digits_cnn(data: Any, num_examples: int | None) -> tuple[Callable[[], nn.Module], nn.Module, Dataset]:
    return digits_cnn, nn.CrossEntropyLoss(), digits(num_examples)


def _fashion_cnn(data: Any, num_examples: int | None) -> tuple[Callable[[], nn.Module], nn.Module, Dataset]:
    return fashion_cnn, nn.CrossEntropyLoss(), fashion_mnist(data, num_examples)


def _char_transformer(data: Any, num_examples: int | None) -> tuple[Callable[[], nn.Module], nn.Module, Dataset]:
    windows = text_windows(data, num_examples)
    return lambda: CharTransformer(len(windows.vocabulary)), nn.CrossEntropyLoss(), windows.data


_MAKERS = {
    "digits-mlp": _digits_mlp,
    "digits-cnn": _digits_cnn,
    "fashion-cnn": _fashion_cnn,
    "char-transformer": _char_transformer,
}
# Which workloads take `data`, and as what.
_DATA = {
    "fashion-cnn": "a folder with the four idx files",
    "char-transformer": "a text file, 'kjv' or 'pydoc'",
}
# Rough, and often enough to see the spectrum change.
DENSITY = "density:every=200,num_probes=3"
_DEFAULTS = {
    "digits-mlp": Defaults(
        steps=4000,
        every=20,
        measure=("loss", "gradient_norm", "sharpness", "stability_threshold", DENSITY),
        lr={"SGD": 0.2},
    ),
    "digits-cnn": Defaults(steps=600, every=20, batch_size=128, num_measured=512, mode="train", lr={"SGD": 0.05}),
    "fashion-cnn": Defaults(
        steps=600, every=30, batch_size=64, num_measured=512, mode="train", threads=None, lr={"SGD": 0.1}
    ),
    "char-transformer": Defaults(steps=600, every=30, batch_size=32, num_measured=64, threads=None, lr={"SGD": 0.1}),
}
WORKLOADS = tuple(_MAKERS)


def defaults_of(name: str) -> Defaults:
    """The settings of a built-in workload."""
    if name not in _MAKERS:
        raise ValueError(
            f"`workload` is {name!r}; choose one of {', '.join(WORKLOADS)} (near: {near_names(name, WORKLOADS)})"
        )
    return _DEFAULTS[name]


def workload(
    name: str = "digits-mlp",
    *,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    num_examples: int | None = None,
) -> Workload:
    """A built-in workload at its initial weights.

    Args:
        name: One of `WORKLOADS`: "digits-mlp", "digits-cnn", "fashion-cnn", "char-transformer".
        seed: Of the initial weights; the global random stream is left alone.
        data: For "fashion-cnn" a folder with the four idx files, for "char-transformer" a text file, "kjv" or
            "pydoc"; None looks for what is installed.
        num_examples: How many to train on; None takes the workload's own number.
    """
    defaults = defaults_of(name)
    if data is not None and name not in _DATA:
        raise ValueError(f"`data` is {str(data)!r}, but {name!r} has its data built in; leave it out")
    make, criterion, found = _MAKERS[name](data, num_examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    return Workload(name, model, criterion, found.train, found.held_out, found.source, defaults)
