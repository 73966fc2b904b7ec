"""Small networks that show on two cores what large ones do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def digits_mlp() -> nn.Sequential:
    """64-100-100-10 with tanh: 17,610 parameters, smooth, so that every derivative exists."""
    return nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))


def digits_cnn() -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU on [N, 64] pixels seen as 8 x 8."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *_convolution(1, 16),
        nn.MaxPool2d(2),
        *_convolution(16, 32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def fashion_cnn() -> nn.Sequential:
    """Three convolutions with BatchNorm and ReLU on [N, 1, 28, 28] images; the first halves the resolution."""
    return nn.Sequential(
        *_convolution(1, 8, stride=2),
        *_convolution(8, 16),
        nn.MaxPool2d(2),
        *_convolution(16, 32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    # BatchNorm subtracts the mean, so a bias before it would have a gradient and Hessian of zero.
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


class CharTransformer(nn.Module):
    """Causal decoder on characters [N, T] -> logits [N, vocabulary, T], as cross-entropy wants them.

    Pre-norm layers, learned positions, output weights tied to the embedding.
    """

    def __init__(self, vocabulary: int, *, length: int = 64, width: int = 64, num_heads: int = 4, num_layers: int = 2):
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(TransformerLayer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for weight in (self.embedding.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.embedding(characters) + self.positions(positions)  # [N, T, width]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).transpose(1, 2)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and those before it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, width = x.shape
        heads = self.qkv(x).view(N, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [3, N, heads, T, head size]
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(N, T, width))
