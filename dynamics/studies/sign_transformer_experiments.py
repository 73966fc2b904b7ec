"""Experiments on attention that is trained by signs: the synthetic task, and digits among noise tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizers.sign import SignSGD
from .character_training import single_thread
from .digit_problems import digit_examples
from .two_layer_attention import TwoLayerAttention, logistic_loss, order_parameters, signal_noise_tokens

SIZE, SUPPORT, NOISE = 2000, 200, 2.0
NUM_TRAIN, NUM_TEST = 20, 400
SCALE = 0.1 / math.sqrt(SIZE)
# Test examples are drawn with the seed of the run plus this.
TEST_SEED = 1000
# Every step is recorded up to here, then every tenth.
DENSE = 200


def stages_run(optimizer: str, lr: float, steps: int, seed: int, dtype: str = "float32") -> dict[str, Any]:
    """Full-batch training of the two-layer transformer.

    Args:
        optimizer: "SignGD", "Adam" (β = 0.9, 0.999, ε = 1e-15) or "GD".
        seed: Of weights and data.
        dtype: "float32" or "float64".

    Returns:
        "step", "loss" and the order parameters on the training examples at each step up to 200 and every tenth after
        that; "test_step", "test_loss", "test_error" on fresh examples at every tenth of those.
    """
    precision = {"float32": torch.float32, "float64": torch.float64}[dtype]
    train = signal_noise_tokens(NUM_TRAIN, SIZE, SUPPORT, NOISE, seed=seed, dtype=precision)
    test = signal_noise_tokens(NUM_TEST, SIZE, SUPPORT, NOISE, seed=TEST_SEED + seed, dtype=precision)
    model = TwoLayerAttention(SIZE, scale=SCALE, seed=seed, dtype=precision)
    rule = made(optimizer, model, lr)
    found: dict[str, list[float]] = {"step": [], "loss": [], "test_step": [], "test_loss": [], "test_error": []}
    with single_thread():
        for step in range(steps + 1):
            rule.zero_grad()
            loss = logistic_loss(model(train.tokens), train.labels)
            if step <= DENSE or step % 10 == 0:
                found["step"].append(step)
                found["loss"].append(float(loss.detach()))
                for name, value in order_parameters(model, train).items():
                    found.setdefault(name, []).append(value)
            if step % (10 if step <= DENSE else 100) == 0:
                found["test_step"].append(step)
                with torch.no_grad():
                    output = model(test.tokens)
                    found["test_loss"].append(float(logistic_loss(output, test.labels)))
                    found["test_error"].append(float((output.sign() != test.labels).double().mean()))
            loss.backward()
            rule.step()
    return found


def made(optimizer: str, model: nn.Module, lr: float) -> Optimizer:
    """One of "SignGD", "Adam", "GD". ε of Adam is tiny, not 0: most gradients of sparse data are exactly zero."""
    if optimizer == "SignGD":
        return SignSGD(model.parameters(), lr=lr)
    if optimizer == "Adam":
        return torch.optim.Adam(model.parameters(), lr=lr, eps=1e-15)
    return torch.optim.SGD(model.parameters(), lr=lr)


class PatchTransformer(nn.Module):
    """Tokens [n, l, 16] through one encoder layer of width 32 with two heads; their mean is classified."""

    def __init__(self, num_tokens: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, width)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens) + self.position).mean(1))


def digit_tokens(num: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Digits as four tokens of 4 x 4 pixels, and four more of Gaussian noise: [num, 8, 16], and labels [num].

    Args:
        noise: Standard deviation of the noise; pixels have 1.
        seed: Of the choice of digits and of the noise.
    """
    pixels, labels = digit_examples(num, seed=seed, dtype=torch.float32)
    patches = pixels.view(num, 2, 4, 2, 4).transpose(2, 3).reshape(num, 4, 16)
    random = torch.Generator().manual_seed(seed)
    return torch.cat([patches, noise * torch.randn(num, 4, 16, generator=random)], 1), labels


def patches_run(optimizer: str, lr: float, noise: float, seed: int, steps: int, num_train: int = 300) -> dict[str, Any]:
    """Full-batch training on digits among noise tokens until the train loss is below 0.1.

    Returns:
        "steps" taken, "loss" on the training digits, "accuracy" on 600 other digits with fresh noise, in points.
    """
    tokens, labels = digit_tokens(num_train + 600, noise, seed)
    with single_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PatchTransformer(tokens.shape[1])
        rule = made(optimizer, model, lr)
        loss, step = math.inf, 0
        for step in range(steps + 1):
            rule.zero_grad()
            value = F.cross_entropy(model(tokens[:num_train]), labels[:num_train])
            loss = float(value.detach())
            if loss < 0.1 or step == steps:
                break
            value.backward()
            rule.step()
        with torch.no_grad():
            right = (model(tokens[num_train:]).argmax(1) == labels[num_train:]).double().mean()
    return {"steps": step, "loss": loss, "accuracy": 100 * float(right)}
