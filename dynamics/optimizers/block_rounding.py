"""Quantizing one layer or block so that its output changes least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .option_checks import check_choice
from .packed_codes import QuantizedWeight
from .sign_rounding import SignRound, check_whole

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LEARNED = ("offset", "min_scale", "max_scale")


@dataclass(frozen=True)
class BlockRounding:
    """What `sign_round` found.

    Attributes:
        weights: By parameter name: codes, scales and zero points; `pack()` stores them.
        losses: Mean squared error on the batch of each iteration, before its step [iterations].
        judged_losses: The same on the fixed subset [iterations + 1], the first rounded to nearest, the last after the
            last step; with keep="last" only these two.
        chosen: Index of the step kept, 0 for rounding to nearest, `iterations` for the last.
        loss_nearest, loss: On the fixed subset, rounded to nearest and as kept; with keep="best" never
            loss > loss_nearest.
        flips: By parameter name, the share of codes that differ from rounding to nearest.
        max_offset: Largest |V| kept.
    """

    weights: Mapping[str, QuantizedWeight]
    losses: Sequence[float]
    judged_losses: Sequence[float]
    chosen: int
    loss_nearest: float
    loss: float
    flips: Mapping[str, float]
    max_offset: float


def sign_round(
    block: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    targets: Tensor | None = None,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    iterations: int = 200,
    batch_size: int = 8,
    lr: float | None = None,
    clip: bool = True,
    scale_dtype: str = "float16",
    keep: str = "best",
    num_judged: int | None = None,
    seed: int = 0,
) -> BlockRounding:
    r"""Quantizes the weights of a block's linear layers and convolutions in place, rounding each as it learns to.

    `SignRound` minimises the mean squared error between the block's output and `targets` on random batches. Biases,
    norms and embeddings stay. Of a whole network the blocks are done in order, each with the outputs of the quantized
    ones before it as `inputs` and what the full-precision network has there as `targets`. The block runs in eval mode;
    modes, gradients and the global random numbers are left as they were. A block that raises on the way gets its
    weights back.

    Args:
        block: Returns one tensor.
        inputs: [N, ...], or a tuple of such that the block takes as its arguments, an attention mask for example.
        targets: [N, ...]; None is the output of the block before it is quantized.
        bits, group_size, symmetric, iterations, lr, clip, scale_dtype: As for `SignRound`; 0 iterations is rounding to
            nearest.
        batch_size: Examples of a step.
        keep: "best" keeps the step with the least error on a fixed subset of the inputs, rounding to nearest being the
            first candidate, and costs its forward pass at every step. "last" keeps the last. (The official code picks
            the least error among the batches, which differ, so that an easy batch wins.)
        num_judged: Size of the fixed subset; None is four batches, at most N.
        seed: Of the batches and the fixed subset.

    Raises:
        ValueError: the block has no such layer, or the numbers of examples differ.

    Source: Cheng et al., Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs, 2023,
    algorithm 1.
    """
    check_choice("keep", keep, ("best", "last"))
    check_whole("iterations", iterations, least=0)
    check_whole("batch_size", batch_size, least=1)
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    N = len(arguments[0])
    named = layer_weights(block)
    if not named:
        raise ValueError("`block` has no linear layer or convolution, so there is nothing to round")
    modes = {module: module.training for module in block.modules()}
    before = {p: (p.detach().clone(), p.requires_grad, p.grad) for p in named.values()}
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip": clip, "scale_dtype": scale_dtype}
    try:
        block.eval()
        if targets is None:
            targets = _output(block, arguments)
        counts = {len(x) for x in (*arguments, targets)}
        if counts != {N}:
            raise ValueError(f"`inputs` and `targets` hold {sorted(counts)} examples; they must be equally many")
        gen = torch.Generator().manual_seed(seed)
        judged = torch.randperm(N, generator=gen)[: min(N, 4 * batch_size if num_judged is None else num_judged)]

        def loss_at(chosen: Tensor) -> Tensor:
            chosen = chosen.to(targets.device)
            found = block(*(x[chosen] for x in arguments))
            return F.mse_loss(found.float() if found.dtype.itemsize < 4 else found, targets[chosen].to(found.dtype))

        for p in named.values():
            p.requires_grad_(True)
        optimizer = SignRound(list(named.values()), lr=lr, iterations=max(iterations, 1), **options)
        optimizer.round_to_nearest()
        nearest = {name: optimizer.quantized(p).codes for name, p in named.items()}
        batches = (torch.randperm(N, generator=gen)[:batch_size] for _ in range(iterations))
        losses, judged_losses, chosen = _descend(optimizer, named, loss_at, batches, judged, keep)
    except BaseException:
        with torch.no_grad():
            for p, (value, _, _) in before.items():
                p.copy_(value)
        raise
    finally:
        for p, (_, flag, gradient) in before.items():
            p.grad = gradient
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
    weights = {name: optimizer.quantized(p) for name, p in named.items()}
    return BlockRounding(
        weights=weights,
        losses=losses,
        judged_losses=judged_losses,
        chosen=chosen,
        loss_nearest=judged_losses[0],
        loss=judged_losses[chosen if keep == "best" else -1],
        flips={name: float((w.codes != nearest[name]).double().mean()) for name, w in weights.items()},
        max_offset=max(float(optimizer.state[p]["offset"].abs().max()) for p in named.values()),
    )


def layer_weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers and convolutions by name, a tied one once."""
    found: dict[str, nn.Parameter] = {}
    for path, module in block.named_modules():
        weight = module.weight if isinstance(module, LAYERS) else None
        if isinstance(weight, nn.Parameter) and not any(weight is p for p in found.values()):
            found[f"{path}.weight" if path else "weight"] = weight
    return found


def _descend(
    optimizer: SignRound,
    named: Mapping[str, nn.Parameter],
    loss_at: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    judged: Tensor,
    keep: str,
) -> tuple[list[float], list[float], int]:
    """Losses of the batches, those of the fixed subset, and the index of the step kept."""
    params = list(named.values())
    losses, judged_losses = [], [_value(loss_at, judged)]
    chosen, best = 0, _learned(optimizer, params)
    for batch in batches:
        with torch.enable_grad():
            loss = loss_at(batch)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
        losses.append(float(loss.detach()))
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
        if keep == "best":
            judged_losses.append(_value(loss_at, judged))
            if judged_losses[-1] < judged_losses[chosen]:
                chosen, best = len(losses), _learned(optimizer, params)
    if keep == "last":
        judged_losses.append(_value(loss_at, judged))
        return losses, judged_losses, len(losses)
    optimizer.restore(best)
    return losses, judged_losses, chosen


def _learned(optimizer: SignRound, params: Sequence[nn.Parameter]) -> dict[Tensor, dict[str, Tensor]]:
    return {p: {name: optimizer.state[p][name].clone() for name in LEARNED} for p in params}


@torch.no_grad()
def _value(loss_at: Callable[[Tensor], Tensor], chosen: Tensor) -> float:
    return float(loss_at(chosen))


@torch.no_grad()
def _output(block: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
    found = block(*arguments)
    if not isinstance(found, Tensor):
        raise TypeError(f"`block` returns a {type(found).__name__}; it must return one tensor")
    return found
