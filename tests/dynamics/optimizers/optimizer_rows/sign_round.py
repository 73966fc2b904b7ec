"""SignRound in the checks of torch's conventions."""

from sharpscope.dynamics.optimizers.sign_rounding import SignRound

from .row import OptimizerRow

ROWS = [
    OptimizerRow(
        name="SignRound",
        by_options=SignRound,
        descent={"bits": 2, "group_size": 16, "lr": 0.02, "iterations": 100},
        draws=True,
        note="It leaves vectors alone, so that the common parity run does not fit: test_sign_round.py steps it beside "
        "autograd. At an lr of zero it still rounds to nearest, which `draws` excuses.",
    )
]
