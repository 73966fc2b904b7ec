import shutil

import numpy as np
import pytest
import torch
from sharpscope.dynamics.analysis import analyze
from sharpscope.dynamics.training import train
from sharpscope.dynamics.trajectory import Trajectory
from torch import nn

MEASURE = ["loss", "sharpness:tol=1e-4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the main job on 80 digits, with five checkpoints."""
    folder = tmp_path_factory.mktemp("analysis") / "run"
    train(
        num_examples=80, steps=40, every=10, checkpoint_every=10, measure=MEASURE, out=folder, threads=1, progress=False
    )
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_checkpoints_of_a_run_give_what_was_measured_live(run):
    result = analyze(run, measure=MEASURE, progress=False)
    assert result.replay.measured == [0, 10, 20, 30, 40]
    assert not result.replay.failed
    assert result.folder == run / "analysis"
    with Trajectory.open(run, mode="r") as live, result.trajectory() as later:
        for quantity in ("loss", "sharpness"):
            a, b = live.series(quantity), later.series(quantity)
            assert a.steps.tolist() == b.steps.tolist()
            # Each value lies within its residual bound of an eigenvalue; the loss is the same computation.
            allowed = np.nan_to_num(a.errors) + np.nan_to_num(b.errors) + 1e-5 * np.abs(a.values)
            assert (np.abs(a.values - b.values) <= allowed).all()


def test_a_second_time_is_served_from_cache(run):
    first = analyze(run, measure=MEASURE, progress=False)
    again = analyze(run, measure=MEASURE, progress=False)
    assert again.replay.cached == first.replay.measured
    assert not again.replay.measured
    assert again.replay.products == 0
    assert first.table().equals(again.table())


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-*0.pt", "checkpoints/step-00000020.pt"])
def test_any_way_of_naming_checkpoints_of_a_run_finds_its_workload(run, place):
    result = analyze(run / place, measure="loss", progress=False)
    with Trajectory.open(run, mode="r") as live:
        steps, values, _ = live.series("loss")
    found = result.table()
    assert found["value"].tolist() == pytest.approx([values[steps.tolist().index(step)] for step in found["step"]])


def test_a_damaged_checkpoint_is_reported_and_the_others_measured(run):
    damaged = run / "checkpoints" / "step-00000020.pt"
    damaged.write_bytes(damaged.read_bytes()[:500])
    result = analyze(run, measure="loss", progress=False)
    assert result.replay.measured == [0, 10, 30, 40]
    assert [name.endswith("step-00000020.pt") for name, _ in result.replay.failed] == [True]


def test_a_model_of_the_users_own(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), (torch.randn(9, 3), torch.randn(9, 2))
    (tmp_path / "weights").mkdir()
    expected = []
    for step in range(3):
        torch.save(model.state_dict(), tmp_path / "weights" / f"model-{step}.pt")
        expected.append(float(nn.functional.mse_loss(model(data[0]), data[1]).detach()))
        with torch.no_grad():
            model.weight.add_(0.1)
    result = analyze(
        tmp_path / "weights", model=nn.Linear(3, 2), data=data, criterion="MSELoss", measure="loss", progress=False
    )
    assert result.folder == tmp_path / "weights" / "analysis"
    assert result.table()["value"].tolist() == pytest.approx(expected)


def test_what_is_missing_is_said(tmp_path, run):
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "a-1.pt")
    with pytest.raises(ValueError, match=r"belongs to no run of sharpscope.*--model"):
        analyze(tmp_path / "a-1.pt")
    with pytest.raises(ValueError, match="`data` .* is missing"):
        analyze(tmp_path / "a-1.pt", model=nn.Linear(2, 1))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="has no checkpoints yet"):
        analyze(run)
