"""An optimizer that is shown gradients from a list."""

import torch


def run(optimizer_class, gradients, **options):
    """The path of a parameter that sees the given gradients [T, n]."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, gradients.shape[1], dtype=gradients.dtype))
    optimizer = optimizer_class([p], **options)
    path = []
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def noise(steps=50, n=40, seed=0):
    return torch.randn(steps, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
