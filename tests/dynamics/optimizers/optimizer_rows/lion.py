"""Lion against two independent versions."""

from sharpscope.dynamics.optimizers.lion import Lion

from .row import OptimizerRow


def lion_pytorch(params):
    from lion_pytorch import Lion

    return Lion(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.3)


def pytorch_optimizer(params):
    from pytorch_optimizer import Lion

    return Lion(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.3, foreach=False)


def row(name, oracle):
    return OptimizerRow(
        name=name,
        by_options=Lion,
        descent={"lr": 2e-3},
        make=lambda params: Lion(params, lr=1e-3, weight_decay=0.3),
        oracle=oracle,
        second_group={"lr": 4e-3, "betas": (0.95, 0.98), "weight_decay": 0.0},
        package=oracle.__name__,
    )


ROWS = [row("Lion", lion_pytorch), row("Lion (second oracle)", pytorch_optimizer)]
