"""SignSGD without and with momentum."""

from sharpscope.dynamics.optimizers.sign import SignSGD

from .row import OptimizerRow


def theirs(params, **options):
    from pytorch_optimizer import SignSGD

    return SignSGD(params, foreach=False, **options)


def row(name, **options):
    return OptimizerRow(
        name=name,
        by_options=SignSGD,
        descent={"lr": 2e-3, **options},
        make=lambda params: SignSGD(params, lr=2e-3, weight_decay=0.05, **options),
        oracle=lambda params: theirs(params, lr=2e-3, weight_decay=0.05, **{"momentum": 0.0, **options}),
        second_group={"lr": 5e-3, "weight_decay": 0.0},
        package="pytorch_optimizer",
    )


ROWS = [row("SignSGD"), row("Signum", momentum=0.9)]
