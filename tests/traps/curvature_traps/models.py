"""Small networks and data with which the traps are set."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .problem import Problem

NUM_EXAMPLES = 70
UNEVEN = (32, 32, 6)
# For traps that are about something else: a mean of batch means is right here.
EVEN = (35, 35)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """43 parameters: 4 inputs, 5 hidden tanh units, 3 classes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model.to(dtype)


def labelled(num: int = NUM_EXAMPLES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs [num, 4] and labels in 0, 1, 2. The last examples differ from the first, as in any sorted data set."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num, 4, generator=generator)
    x[-6:] *= 3.0
    y = torch.randint(0, 3, (num,), generator=generator)
    return x.to(dtype), y


def cut(data: tuple[Tensor, ...], sizes: tuple[int, ...] = EVEN) -> list[tuple[Tensor, ...]]:
    """Tensors as batches of these sizes."""
    return list(zip(*(t.split(list(sizes)) for t in data), strict=True))


def classification(model: nn.Module | None = None, **options: Any) -> Problem:
    """A classifier of 4 numbers on 70 examples in one batch; see `Problem` for the options."""
    data = labelled()
    options.setdefault("batches", [data])
    return Problem(mlp() if model is None else model, nn.CrossEntropyLoss(), whole=data, **options)


class HalfSquares(nn.Module):
    """½ Σ d w² of a prediction w [1, n]: a loss with the Hessian diag(d)."""

    reduction = "mean"
    d: Tensor

    def __init__(self, d: Tensor) -> None:
        super().__init__()
        self.register_buffer("d", d)

    def forward(self, w: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (self.d * w * w).sum() + 0.0 * target.sum()


class Point(nn.Module):
    """Its n parameters are its prediction."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.w.unsqueeze(0) * x


def quadratic(d: Tensor, at: Tensor | None = None) -> Problem:
    """A loss with the Hessian diag(d), at the point `at` (default: a random one)."""
    torch.manual_seed(4)
    point = torch.randn(len(d), dtype=d.dtype) if at is None else at.clone()
    whole = (torch.ones(1, 1, dtype=d.dtype), torch.zeros(1, dtype=d.dtype))
    return Problem(Point(point), HalfSquares(d), [whole], whole)


class Attention(nn.Module):
    """Self-attention over [b, t, 4] into 3 classes; `plain` writes the attention out instead of calling the kernel."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # each [b, 1, t, 4]
        if self.plain:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(mixed.squeeze(1).mean(dim=1))


class Normalised(nn.Module):
    """An MLP with a LayerNorm; `plain` writes the normalisation out."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)
        self.plain = plain
        with torch.no_grad():
            self.norm.weight.add_(0.3 * torch.randn(5))
            self.norm.bias.add_(0.3 * torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.plain:
            centred = h - h.mean(dim=-1, keepdim=True)
            scale = (centred.square().mean(dim=-1, keepdim=True) + self.norm.eps).sqrt()
            h = centred / scale * self.norm.weight + self.norm.bias
        else:
            h = self.norm(h)
        return self.last(torch.tanh(h))


class Checkpointed(nn.Module):
    """The MLP of `mlp` with its hidden layer recomputed in the backward pass."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda t: torch.tanh(self.body[0](t)), x, use_reentrant=False)
        assert isinstance(hidden, Tensor)
        return self.body[2](hidden)


class TiedLanguageModel(nn.Module):
    """Next-token prediction over 6 tokens with the output layer tied to the embedding: 24 parameters, not 48."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(6, 4)
        self.mix = nn.Linear(4, 4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.mix(self.embedding(tokens)))).transpose(1, 2)  # [b, classes, t]
