"""Handwritten digits, and fully connected networks in the standard parametrisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def digit_examples(num: int, *, seed: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Pixels [num, 64] shifted and scaled by one mean and one standard deviation; labels [num] of ten classes.

    Args:
        num: How many of scikit-learn's 1797 images.
        seed: Chooses them at random; None takes the first.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = torch.arange(num)
    if seed is not None:
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:num]
    pixels = torch.as_tensor(images, dtype=dtype)[chosen]
    return (pixels - pixels.mean()) / pixels.std(correction=0), torch.as_tensor(labels)[chosen].long()


def one_hot(labels: Tensor, num_classes: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    """[N] -> [N, num_classes]."""
    return nn.functional.one_hot(labels, num_classes).to(dtype)


def half_squares(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the squared error, a mean over examples and outputs."""
    return 0.5 * (prediction - target).square().mean()


def fully_connected(
    depth: int,
    width: int,
    *,
    inputs: int = 64,
    outputs: int = 10,
    activation: type[nn.Module] = nn.ReLU,
    bias: bool = False,
    zero_output: bool = False,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A network of `depth` weight layers in the standard parametrisation.

    Weights are normal with variance 2 / fan-in, 1 / fan-in in the last layer; biases are zero.

    Args:
        depth: Weight layers.
        width: Of the hidden layers.
        bias: Whether layers have one.
        zero_output: Sets the last layer to zero, so that the network begins at f = 0.
        seed: Of the weights.
    """
    random = torch.Generator().manual_seed(seed)
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = []
    for i in range(depth):
        last = i == depth - 1
        # Made without torch's own initial weights, which would take from the global random stream.
        layer = nn.Linear(sizes[i], sizes[i + 1], bias=bias, dtype=dtype, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_(generator=random).mul_(((1 if last else 2) / sizes[i]) ** 0.5)
            if last and zero_output:
                layer.weight.zero_()
            if bias:
                layer.bias.zero_()
        layers += [layer] if last else [layer, activation()]
    return nn.Sequential(*layers)
