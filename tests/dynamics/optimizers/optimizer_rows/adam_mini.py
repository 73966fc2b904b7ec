import torch
from sharpscope.dynamics.optimizers.adam_mini import AdamMini

from .row import OptimizerRow


def adamw(groups, **options):
    return torch.optim.AdamW(groups, **options)


def entries(name, p):
    from sharpscope.landscape.reductions import Reduction

    return Reduction.entries(p.shape)


def official(groups):
    """The authors' package, one group per tensor, with names that give rows to matrices and one block to the others."""
    from adam_mini import Adam_mini

    named = []
    for i, group in enumerate(groups):
        named += [(f"{'mlp' if p.ndim == 2 else 'w'}{i}.{j}", p) for j, p in enumerate(group["params"])]
    optimizer = Adam_mini(named, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, verbose=False)
    options = {id(p): {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}
    for group in optimizer.param_groups:
        group.update(options[id(group["params"][0])])
        if group["params"][0].ndim < 2:
            group["weight_decay"] = 0.0
    return optimizer


ROWS = [
    OptimizerRow(
        "AdamMini",
        AdamMini,
        {"lr": 1e-2},
        make=lambda groups: AdamMini(groups, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
        oracle=official,
        second_group={"lr": 3e-3, "weight_decay": 0.3},
        tolerance=1e-12,
        package="adam_mini",
    ),
    OptimizerRow(
        "AdamMini with one-entry blocks",
        lambda params, **options: AdamMini(params, partition=entries, decay_vectors=True, **options),
        {"lr": 1e-2, "weight_decay": 0.1},
        oracle=lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        second_group={"lr": 3e-3, "weight_decay": 0.3, "betas": (0.8, 0.95)},
        tolerance=1e-12,
    ),
]
