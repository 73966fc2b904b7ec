"""Runs killed with SIGKILL in another process: nothing written is lost, and they end like one left alone."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sharpscope.dynamics.schema import TrajectoryError
from sharpscope.dynamics.training import train
from sharpscope.dynamics.trajectory import Trajectory

STEPS = 240
OPTIONS = {
    "workload": "digits-cnn",
    "optimizer": "SGD",
    "momentum": 0.9,
    "batch_size": 32,
    "num_examples": 100,
    "steps": STEPS,
    "every": 10,
    "checkpoint_every": 25,
    "threads": 1,
}
MEASURE = ["loss", "sharpness:tol=1e-2", "update_curvature", "density:every=80,num_steps=5,num_probes=2"]


def table(folder):
    with Trajectory.open(folder, mode="r") as trajectory:
        return trajectory.to_pandas(costs=False)


def rows_so_far(folder):
    """What a reader sees while the run goes on; None before there is anything."""
    try:
        return table(folder)
    except (TrajectoryError, OSError):
        return None


def start(folder):
    options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    measure = [f"--measure={spec}" for spec in MEASURE]
    command = [sys.executable, "-m", "sharpscope", "train", f"--out={folder}", "--resume", *options, *measure]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder.parent)


def kill_at(process, folder, step, delay):
    """Waits until a step was measured (-1: until the folder is there), and a little longer, then kills."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        seen = rows_so_far(folder)
        if folder.exists() if step < 0 else seen is not None and len(seen) and seen["step"].max() >= step:
            break
        time.sleep(0.002)
    time.sleep(delay)
    seen = rows_so_far(folder)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    return seen


def kill_and_resume(tmp_path: Path, moments):
    folder = tmp_path / "killed"
    for step, delay in moments:
        seen = kill_at(start(folder), folder, step, delay)
        if seen is not None:
            left = table(folder)  # it opens, and what a reader had seen is all there, to the last bit
            assert len(seen.merge(left, how="inner")) == len(seen)
    process = start(folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()

    train(**OPTIONS, measure=MEASURE, out=tmp_path / "whole", progress=False)
    assert table(folder).equals(table(tmp_path / "whole"))
    with Trajectory.open(folder, mode="r") as one, Trajectory.open(tmp_path / "whole", mode="r") as other:
        for step in other.array_steps("density"):
            a, b = one.arrays(step, "density"), other.arrays(step, "density")
            assert all(torch.equal(a[name], b[name]) for name in b)
    last = f"checkpoints/step-{STEPS:08d}.pt"
    a, b = (torch.load(run / last, weights_only=True) for run in (folder, tmp_path / "whole"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    assert not list(folder.rglob("*.tmp"))


def test_killed_at_its_birth_and_on_its_way(tmp_path):
    kill_and_resume(tmp_path, [(-1, 0.0), (90, 0.01)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_ten_times(tmp_path, seed):
    generator = random.Random(seed)
    steps = sorted(generator.randrange(-1, STEPS - 20) for _ in range(10))
    kill_and_resume(tmp_path, [(step, generator.random() * 0.1) for step in steps])
