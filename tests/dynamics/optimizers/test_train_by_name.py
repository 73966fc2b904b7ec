"""Every optimizer, by its name alone, trains a workload with everything measured."""

import warnings

import pytest
from sharpscope.dynamics.optimizers.choice import has_threshold, optimizer_names
from sharpscope.dynamics.training import train

SHORT = dict(num_examples=40, steps=6, every=3, checkpoint_every=3, threads=1, progress=False)
MEASURED = ("loss", "preconditioned_sharpness", "threshold_ratio", "optimizer_state_bytes")


@pytest.mark.parametrize("name", optimizer_names())
def test_it_trains_with_what_it_feels_measured_and_resumes(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"lr": 1e-3} if name == "RMSprop" else {}  # its own default, 0.01, goes up first
        whole = train(optimizer=name, measure=MEASURED, out=tmp_path / "whole", **options, **SHORT)
        train(optimizer=name, measure=MEASURED, out=tmp_path / "run", **options, **SHORT)
        for path in (tmp_path / "run" / "checkpoints").glob("step-00000006.pt"):
            path.unlink()
        again = train(out=tmp_path / "run", resume=True, progress=False)
    assert again.resumed_at == 3
    with whole.trajectory() as one, again.trajectory() as other:
        known = set(one.quantities())
        assert "loss" in known
        assert ("threshold_ratio" in known) == has_threshold(name)
        for quantity in known:
            assert one.series(quantity).values.tolist() == other.series(quantity).values.tolist(), quantity
        if name != "SignRound":  # it rounds the initial weights
            assert one.series("loss").values[-1] < one.series("loss").values[0]


@pytest.mark.parametrize("name", ["SAM", "AdamMini", "SlimAdam", "AdamW4bit", "SGDSaI", "PSGD", "Lion"])
@pytest.mark.parametrize("workload", ["digits-cnn", "char-transformer"])
def test_it_takes_other_networks_too(name, workload, tmp_path):
    data = {"data": "pydoc"} if workload == "char-transformer" else {}
    short = {**SHORT, "num_examples": 16, "batch_size": 8, "steps": 2, "every": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(workload, optimizer=name, measure=("loss",), out=tmp_path, **data, **short)
    with result.trajectory() as trajectory:
        assert trajectory.series("loss").steps.tolist() == [0, 2]
