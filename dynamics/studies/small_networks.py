"""The smallest networks of several families whose weight tensors have at most 1024 entries: exact block Hessians."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, NUM_HEADS = 16, 2
# Handwritten digits: 8 x 8 pixels, ten classes, cut into 16 patches of 2 x 2 pixels for what works on sequences.
PIXELS, CLASSES, PATCH = 64, 10, 2
NUM_PATCHES = PIXELS // PATCH**2
HIDDEN = 16
GPT_STD = 0.02


class ScaledLinear(nn.Linear):
    """x -> c W x without a bias. The same map with W divided by c has a Hessian block of W that is c² times larger."""

    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * F.linear(input, self.weight)


class Attention(nn.Module):
    """Several heads, with separate weights for queries, keys, values and output and no biases."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        N, T, _ = x.shape
        q, k, v = (w(x).view(N, T, NUM_HEADS, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH / NUM_HEADS)  # [N, heads, T, T]
        if self.causal:
            ahead = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        return self.wo((scores.softmax(3) @ v).transpose(1, 2).reshape(N, T, WIDTH))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(causal=causal)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharacterModel(nn.Module):
    """Causal decoder of one layer on characters [N, T] -> logits [N, vocabulary, T]; the head is not tied."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.zeros(length, WIDTH))
        self.layer = Layer(causal=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.positions[: characters.shape[1]]
        return self.head(self.norm(self.layer(x))).transpose(1, 2)


class Patches(nn.Module):
    """[N, 64] pixels -> [N, 16, WIDTH], one vector for each patch, with its position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(PATCH**2, WIDTH, bias=False)
        self.positions = nn.Parameter(torch.zeros(NUM_PATCHES, WIDTH))

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.view(-1, 1, 8, 8)
        return self.linear(F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)) + self.positions


class PatchClassifier(nn.Module):
    """Digits as sequences of patches: one layer (attention or mixer), the mean over patches, a linear head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches, self.layer, self.norm = Patches(), layer, nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.patches(pixels))).mean(1))


class MixerLayer(nn.Module):
    """An MLP across patches, then one across channels, each on the normalised input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.token_up, self.token_down = (nn.Linear(NUM_PATCHES, NUM_PATCHES, bias=False) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_down(F.gelu(self.token_up(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mlp(scale: float = 1.0) -> nn.Sequential:
    """64-16-16-10 with ReLU and no biases, weights normal with variance 2 / fan-in, 1 / fan-in in the last layer.

    Args:
        scale: s of the factors s, 1 and 1/s by which the layers multiply; their weights are divided by the same. The
            network then starts as the same function whatever s, with Hessian blocks s², 1 and 1/s² times those of
            s = 1.
    """
    shapes = [(PIXELS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, CLASSES)]
    layers = [ScaledLinear(*shape, factor) for shape, factor in zip(shapes, (scale, 1.0, 1 / scale), strict=True)]
    for layer, gain in zip(layers, (2, 2, 1), strict=True):
        nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features) / layer.scale)
    first, second, head = layers
    return nn.Sequential(OrderedDict(first=first, relu1=nn.ReLU(), second=second, relu2=nn.ReLU(), head=head))


def cnn() -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU on [N, 64] pixels, a linear head; torch's initial weights."""
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 8, 8)),
            conv1=nn.Conv2d(1, 8, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(8),
            relu1=nn.ReLU(),
            halved=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 12, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(12),
            relu2=nn.ReLU(),
            pooled=nn.AdaptiveAvgPool2d(2),
            flat=nn.Flatten(),
            head=nn.Linear(48, CLASSES, bias=False),
        )
    )


def gpt_start(model: nn.Module) -> nn.Module:
    """All weights, embeddings and positions normal with standard deviation 0.02, as in GPT-2 and ViT; norms stay."""
    return _normal(model, lambda weight: GPT_STD)


def fan_in_start(model: nn.Module) -> nn.Module:
    """The same with variance 1 / fan-in, for embeddings and positions 1 / width."""
    return _normal(model, lambda weight: 1 / math.sqrt(weight.shape[1]))


def _normal(model: nn.Module, std: Callable[[Tensor], float]) -> nn.Module:
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=std(p))
    return model
