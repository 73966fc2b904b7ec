"""Models with their data, partly trained: the same for every tool."""

from __future__ import annotations

import copy
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import GPT, ViT, autoencoder, mlp, resnet14

Batch = tuple[Tensor, Tensor]


@dataclass
class Case:
    """What a tool is given: L(θ) = mean of criterion(model(inputs), targets) over all batches, of equal sizes."""

    name: str
    model: nn.Module
    criterion: nn.Module
    batches: list[Batch]
    about: str = ""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def split(self, v: Tensor) -> list[Tensor]:
        """A flat vector [n] as views of the parameters' shapes."""
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def copy(self) -> Case:
        """The same data with a model of one's own, so that no tool meets what another left on its parameters."""
        return Case(self.name, copy.deepcopy(self.model), self.criterion, self.batches, self.about)

    def double(self) -> Case:
        """The same function in float64."""
        batches = [(x.double() if x.is_floating_point() else x, y.double() if y.is_floating_point() else y)
                   for x, y in self.batches]  # fmt: skip
        return Case(self.name, copy.deepcopy(self.model).double(), self.criterion, batches, self.about)

    def in_batches(self, count: int) -> Case:
        """The same examples as `count` batches of equal size."""
        (x, y) = self.batches[0]
        if len(self.batches) != 1 or len(x) % count:
            raise ValueError(f"`count` is {count}; {len(x)} examples do not divide into as many batches")
        # Targets of a language model are flat: several to an example.
        parts = list(zip(x.chunk(count), y.chunk(count), strict=True))
        return Case(self.name, self.model, self.criterion, parts, self.about)

    def part(self, share: int) -> Case:
        """The first of `share` equal parts of the examples."""
        return Case(self.name, self.model, self.criterion, self.in_batches(share).batches[:1], self.about)

    def gradient(self) -> tuple[Tensor, ...]:
        """∇L by one forward and one backward pass over each batch: the unit of time."""
        total: tuple[Tensor, ...] | None = None
        for x, y in self.batches:
            loss = self.criterion(self.model(x), y) / len(self.batches)
            found = torch.autograd.grad(loss, self.parameters)
            total = found if total is None else tuple(a + b for a, b in zip(total, found, strict=True))
        assert total is not None
        return total

    def fingerprint(self) -> str:
        """SHA-256 of weights and data."""
        sha = hashlib.sha256()
        for tensor in [*self.model.state_dict().values(), *(t for batch in self.batches for t in batch)]:
            sha.update(tensor.detach().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """How a case is made. `draw(size, seed)` gives a batch; sizes are examples of the single batch."""

    name: str
    about: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, int], Batch]
    size: int
    quick_size: int
    steps: int
    train_size: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    batch_count: int = 8

    def case(self, quick: bool, folder: Path | None = None) -> Case:
        """The trained case; weights come from `folder` when they were trained before."""
        with _seeded(0):
            model = self.build()
            self._train(model, cache_folder() if folder is None else folder)
        batch = self.draw(self.quick_size if quick else self.size, 0)
        return Case(self.name, model.eval(), self.criterion, [batch], self.about)

    def _train(self, model: nn.Module, folder: Path) -> None:
        shapes = repr([(name, tuple(p.shape)) for name, p in model.named_parameters()])
        key = hashlib.sha256(
            f"{self.about} {shapes} {self.steps} {self.train_size} {torch.__version__}".encode()
        ).hexdigest()[:12]
        file = folder / f"{self.name}-{key}.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return
        optimizer = self.optimizer(model.parameters())
        model.train()
        for step in range(self.steps):
            x, y = self.draw(self.train_size, 1000 + step)
            optimizer.zero_grad()
            self.criterion(model(x), y).backward()
            optimizer.step()
        model.zero_grad()
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), partial)
        partial.replace(file)


def cache_folder() -> Path:
    """Where trained weights and references are kept: under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sharpscope" / "peers"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@cache
def _digits() -> Batch:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def digits(size: int, seed: int, *, side: int, channels: int = 1, flat: bool = False) -> Batch:
    """scikit-learn's digits, enlarged to side x side, with pixel noise and 5 % random labels."""
    images, labels = _digits()
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(labels), (size,), generator=draw)
    x = F.interpolate(images[chosen], size=(side, side), mode="bilinear")
    x = (x.expand(-1, channels, -1, -1) - 0.3) / 0.35
    x = x + 0.3 * torch.randn(x.shape, generator=draw)
    y = labels[chosen].clone()
    wrong = torch.rand(size, generator=draw) < 0.05
    y[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=draw)
    return (x.flatten(1) if flat else x.contiguous()), y


def images(size: int, seed: int) -> Batch:
    """Noisy digits to be reproduced without their noise: [B, 1, 16, 16] -> [B, 256]."""
    x, _ = digits(size, seed, side=16)
    clean = F.avg_pool2d(x, 2)
    return x, F.interpolate(clean, size=(16, 16), mode="bilinear").flatten(1)


@cache
def _library_text() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def text(size: int, seed: int, *, tokens: int = 64) -> Batch:
    """Bytes of Python's standard library: [B, T] -> the next byte at each place [B T]."""
    source = _library_text()
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(source) - tokens - 1, (size, 1), generator=draw)
    places = starts + torch.arange(tokens + 1)
    window = source[places]
    return window[:, :-1].contiguous(), window[:, 1:].flatten()


def _momentum(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def _adamw(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "MLP",
            "784-256-256-10, ReLU, cross-entropy; digits at 28x28",
            lambda: mlp((784, 256, 256, 10)),
            lambda size, seed: digits(size, seed, side=28, flat=True),
            size=2048, quick_size=1024, steps=100, train_size=128, optimizer=_momentum(0.02),
        ),
        Recipe(
            "ResNet-14",
            "3 stages of 2 blocks, batch normalisation in eval mode, cross-entropy; digits at 32x32x3",
            resnet14,
            lambda size, seed: digits(size, seed, side=32, channels=3),
            size=128, quick_size=32, steps=60, train_size=64, optimizer=_momentum(0.05),
        ),
        Recipe(
            "GPT",
            "6 layers, width 128, tied embedding, GELU, cross-entropy; 64 bytes of Python source each",
            GPT,
            text,
            size=16, quick_size=4, steps=150, train_size=16, optimizer=_adamw(1e-3), batch_count=4,
        ),
        Recipe(
            "ViT",
            "3 layers, width 72, pre-norm, GELU, cross-entropy; digits at 16x16",
            ViT,
            lambda size, seed: digits(size, seed, side=16),
            size=128, quick_size=32, steps=80, train_size=64, optimizer=_adamw(1e-3),
        ),
        Recipe(
            "autoencoder",
            "convolutions, dense code, transposed convolutions, GELU, squared error; digits at 16x16",
            autoencoder,
            images,
            size=512, quick_size=128, steps=100, train_size=64, optimizer=_adamw(2e-3), criterion=nn.MSELoss(),
        ),
    )
}  # fmt: skip
