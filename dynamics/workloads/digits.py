"""Handwritten digits of scikit-learn: 1797 real images of 8 x 8 pixels that come with the package."""

from __future__ import annotations

import torch

from .examples import Dataset, Examples, num_to_train_on

NUM_HELD_OUT = 297
BRIGHTEST = 16.0


def digits(num_examples: int | None = None) -> Dataset:
    """Pixels [N, 64] in units of the brightest, minus the mean image of the training part; labels [N] of ten classes.

    The last 297 images are held out; other people wrote them.

    Args:
        num_examples: How many to train on, the first of 1500; None takes all.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'sharpscope[data]'") from error
    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(pixels, dtype=torch.float64)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    num = len(targets) - NUM_HELD_OUT
    # A common offset of the inputs is one huge eigenvalue that has nothing to do with what is learned. Sums of whole
    # numbers are exact in float64, so that every machine gets the same inputs.
    inputs = ((pixels - pixels[:num].mean(0)) / BRIGHTEST).float()
    chosen = num_to_train_on(num_examples, num)
    train, held_out = Examples(inputs[:chosen], targets[:chosen]), Examples(inputs[num:], targets[num:])
    return Dataset(train, held_out, "scikit-learn load_digits()")
