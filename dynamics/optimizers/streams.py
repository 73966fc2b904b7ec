"""Random numbers of a step, drawn again identically after a resume."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

MASK = (1 << 64) - 1


def generator(seed: int, tensor: int, step: int, device: torch.device | str) -> torch.Generator:
    """A generator that depends on these integers and nothing else, so none has to be kept between steps.

    Each of them is added to the state and mixed by the finaliser of SplitMix64, a bijection of 64-bit words whose every
    output bit depends on every input bit: neighbouring steps and tensors have unrelated streams. The CPU generator of
    torch is seeded by the lower 32 bits of the result, that of a GPU by all 64. The global random state is not touched;
    CPU and GPU draw different numbers.

    Args:
        seed: Of the optimizer, any integer; taken modulo 2^64, like the others.
        tensor: Number of the parameter, see `tensor_numbers`; negative ones are free for what a step shares.
        step: Of this parameter.
        device: Where numbers will be drawn.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014, figure 16 (SplitMix64).
    """
    word = 0
    for part in (seed, tensor, step):
        word = _mixed((word + part + 0x9E3779B97F4A7C15) & MASK)
    made = torch.Generator(device=device)
    made.manual_seed(word)
    return made


def tensor_numbers(optimizer: Optimizer) -> dict[Tensor, int]:
    """Number of every parameter, from 0 through all groups in order; groups added later do not change it."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return {p: number for number, p in enumerate(parameters)}


def _mixed(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)
