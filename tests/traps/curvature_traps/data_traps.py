"""Traps in the data: how batches are weighted, read and checked."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .adapter import Adapter
from .checks import (
    matrix_of,
    right_empirical_fisher,
    right_gauss_newton,
    right_gradient_covariance,
    right_hessian,
)
from .models import UNEVEN, TiedLanguageModel, classification, cut, labelled, mlp
from .outcome import WrongAnswer, trap
from .problem import Problem


@trap("uneven batches", "data")
def uneven_batches(tool: Adapter) -> str:
    """Batches of 32, 32 and 6 examples mean the same as one batch of 70: weights are 32/70, 32/70 and 6/70."""
    return right_hessian(tool, classification(batches=cut(labelled(), UNEVEN)))


@trap("uneven batches, Gauss-Newton", "data")
def uneven_batches_gauss_newton(tool: Adapter) -> str:
    """The same for the generalised Gauss-Newton matrix."""
    return right_gauss_newton(tool, classification(batches=cut(labelled(), UNEVEN)))


@trap("uneven batches, empirical Fisher", "data")
def uneven_batches_empirical_fisher(tool: Adapter) -> str:
    """The same for the mean outer product of per-example gradients."""
    return right_empirical_fisher(tool, classification(batches=cut(labelled(), UNEVEN)))


@trap("uneven batches, gradient covariance", "data")
def uneven_batches_gradient_covariance(tool: Adapter) -> str:
    """The covariance of per-example gradients about the mean of all examples, not about that of each batch."""
    return right_gradient_covariance(tool, classification(batches=cut(labelled(), UNEVEN)))


@trap("ignored labels", "data")
def ignored_labels(tool: Adapter) -> str:
    """A token-wise loss with ignore_index is a mean over the labels that count, which differ from batch to batch."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(0, 6, (8, 5), generator=generator)
    targets = torch.randint(0, 6, (8, 5), generator=generator)
    targets[4:, 1:] = -100
    whole = (tokens, targets)
    criterion = nn.CrossEntropyLoss(ignore_index=-100)
    return right_hessian(tool, Problem(TiedLanguageModel(), criterion, cut(whole, (4, 4)), whole))


@trap("summed loss", "data")
def summed_loss(tool: Adapter) -> str:
    """With reduction='sum' the objective over three batches is their sum, not their mean."""
    data = labelled()
    return right_hessian(tool, Problem(mlp(), nn.CrossEntropyLoss(reduction="sum"), cut(data, UNEVEN), data))


@trap("shuffled loader", "data")
def shuffled_loader(tool: Adapter) -> str:
    """A loader that shuffles at every pass: the mean over all examples does not depend on their order."""
    loader = DataLoader(TensorDataset(*labelled()), batch_size=35, shuffle=True)
    return right_hessian(tool, classification(batches=loader))


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Adds fresh noise at every access, from a stream of its own."""

    def __init__(self) -> None:
        self._x, self._y = labelled()
        self._generator = torch.Generator().manual_seed(7)

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self._x[i] + 0.3 * torch.randn(4, generator=self._generator), self._y[i]


@trap("random augmentation", "data", refusal=r"determinis|augment|differ|second pass|same data|disagree")
def random_augmentation(tool: Adapter) -> str:
    """Data that change at every pass define no Hessian: the tool has to say that the data differ between passes."""
    problem = classification(batches=DataLoader(_Augmented(), batch_size=35))
    operator = tool.hessian(problem)
    first, second = (matrix_of(tool, operator, problem) for _ in range(2))
    moved = float((first - second).norm() / second.norm())
    raise WrongAnswer(f"answers without a word; two reads of its matrix differ by {moved:.1%}")


@trap("NaN in the data", "data", refusal=r"(nan|finite).*batch\W*(number\W*)?1\b|batch\W*(number\W*)?1\b.*(nan|finite)")
def nan_in_the_data(tool: Adapter) -> str:
    """One NaN among the inputs of the second batch (number 1): the tool has to name NaN and the batch."""
    x, y = labelled()
    x = x.clone()
    x[40, 2] = math.nan
    problem = classification(batches=cut((x, y), UNEVEN))
    matrix = matrix_of(tool, tool.hessian(problem), problem)
    bad = int((~torch.isfinite(matrix)).sum())
    raise WrongAnswer(f"answers with {bad} of {matrix.numel()} entries NaN")


class _FromDict(nn.Module):
    """Takes its inputs by name, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.body(inputs["features"] * inputs["mask"])


@trap("dict batches", "data")
def dict_batches(tool: Adapter) -> str:
    """Batches are dicts {features, mask, labels}, as tokenisers and datasets make them."""
    x, y = labelled()
    mask = torch.ones_like(x)
    mask[::2, 3] = 0.0
    names = ("features", "mask", "labels")
    batches = [dict(zip(names, batch, strict=True)) for batch in cut((x, mask, y))]

    def split(batch: dict[str, Tensor]) -> tuple[Any, Any]:
        return {"features": batch["features"], "mask": batch["mask"]}, batch["labels"]

    whole = {"features": x, "mask": mask, "labels": y}
    return right_hessian(tool, Problem(_FromDict(), nn.CrossEntropyLoss(), batches, whole, split=split))


@trap("lambda loss", "data")
def lambda_loss(tool: Adapter) -> str:
    """The criterion is a lambda (label smoothing by hand), not a module with a `reduction`."""
    data = labelled()
    criterion = lambda out, y: F.cross_entropy(out, y) - 0.1 * F.log_softmax(out, dim=1).mean()
    return right_hessian(tool, Problem(mlp(), criterion, cut(data), data))


@trap("one example a batch", "data")
def one_example_a_batch(tool: Adapter) -> str:
    """Batches of one example keep their batch axis and count one each."""
    x, y = labelled(8)
    return right_hessian(tool, Problem(mlp(), nn.CrossEntropyLoss(), cut((x, y), (1,) * 8), (x, y)))
