"""What is no trajectory, or cannot be opened, is named and left alone."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.schema import SCHEMA_VERSION, TrajectoryError
from sharpscope.dynamics.trajectory import Trajectory

DATABASE = "trajectory.sqlite"


@pytest.fixture
def trajectory(tmp_path):
    with Trajectory.open(tmp_path / "run") as opened:
        yield opened


def test_a_new_trajectory_may_share_its_folder_with_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with Trajectory.open(tmp_path, mode="x") as opened:
        opened.record(0)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_exclusive_mode_refuses_what_is_there(trajectory):
    with pytest.raises(TrajectoryError, match=r"already holds a trajectory.*another folder"):
        Trajectory.open(trajectory.path, mode="x")


def test_reading_what_is_not_there_names_what_is(trajectory, tmp_path):
    with pytest.raises(TrajectoryError, match=f"does not exist; there are trajectories in {trajectory.path}"):
        Trajectory.open(tmp_path / "rum", mode="r")
    with pytest.raises(TrajectoryError, match=f"holds no trajectory .*; there are trajectories in {trajectory.path}"):
        Trajectory.open(tmp_path, mode="r")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrajectoryError, match='give the folder of a run, or mode="a"'):
        Trajectory.open(tmp_path / "empty", mode="r")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_file_is_not_a_folder(trajectory, tmp_path):
    (tmp_path / "file").write_text("x")
    for mode in "arx":
        with pytest.raises(TrajectoryError, match="is a file; a trajectory is a folder"):
            Trajectory.open(tmp_path / "file", mode=mode)
        with pytest.raises(TrajectoryError, match=f"give its folder {trajectory.path}"):
            Trajectory.open(trajectory.path / DATABASE, mode=mode)
    with pytest.raises(TrajectoryError):
        Trajectory.open(tmp_path / "file" / "below")


def test_unknown_mode(tmp_path):
    with pytest.raises(ValueError, match="`mode` is 'w'"):
        Trajectory.open(tmp_path, mode="w")
    with pytest.raises(ValueError, match="`provenance` cannot be written"):
        Trajectory.open(tmp_path, mode="r", provenance={})


@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_newer_schema_is_left_alone(trajectory, mode):
    trajectory.close()
    file = trajectory.path / DATABASE
    with contextlib.closing(sqlite3.connect(file)) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 6}")
    content = file.read_bytes()
    message = f"schema version {SCHEMA_VERSION + 6}; this sharpscope supports up to {SCHEMA_VERSION}.*--upgrade"
    with pytest.raises(TrajectoryError, match=message):
        Trajectory.open(trajectory.path, mode=mode)
    assert file.read_bytes() == content


@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_database_of_another_program_is_left_alone(tmp_path, mode):
    file = tmp_path / DATABASE
    with contextlib.closing(sqlite3.connect(file)) as foreign:
        foreign.execute("CREATE TABLE photos (name)")
    content = file.read_bytes()
    with pytest.raises(TrajectoryError, match="database of another program"):
        Trajectory.open(tmp_path, mode=mode)
    assert file.read_bytes() == content


@pytest.mark.parametrize("mode", ["a", "r"])
def test_garbage_is_named(tmp_path, mode):
    (tmp_path / DATABASE).write_bytes(b"no database" * 500)
    with pytest.raises(TrajectoryError, match=r"damaged or no SQLite database.*Restore a copy"):
        Trajectory.open(tmp_path, mode=mode)


def test_a_damaged_page_is_named(trajectory):
    for step in range(200):
        trajectory.record(step, [Row("loss", float(step), block="b" * 50)])
    trajectory.close()
    file = trajectory.path / DATABASE
    content = bytearray(file.read_bytes())
    for page in range(1, len(content) // 4096):  # every page but the first, which holds the schema
        content[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    file.write_bytes(content)
    with pytest.raises(TrajectoryError, match="damaged"), Trajectory.open(trajectory.path, mode="r") as opened:
        opened.to_pandas()


def test_creation_that_was_cut_short_is_finished_by_the_next_writer(tmp_path):
    (tmp_path / DATABASE).touch()
    with pytest.raises(TrajectoryError, match="still empty"):
        Trajectory.open(tmp_path, mode="r")
    with Trajectory.open(tmp_path, mode="x") as opened:
        opened.record(0)


def test_a_closed_or_read_only_trajectory_says_so(trajectory):
    with Trajectory.open(trajectory.path, mode="r") as reader, pytest.raises(TrajectoryError, match='mode="a"'):
        reader.record(0, [Row("v", 1.0, arrays={"x": torch.zeros(1)})])
    assert not (trajectory.path / "arrays").exists()
    trajectory.close()
    trajectory.close()
    assert "closed" in repr(trajectory)
    with pytest.raises(TrajectoryError, match="was closed; open it again"):
        trajectory.steps()


UNPRIVILEGED = """
import os, sys
from sharpscope.dynamics.trajectory import Trajectory

if os.geteuid() == 0:
    os.setuid(65534)
for call in (
    lambda: Trajectory.open(sys.argv[1] + "/new"),
    lambda: Trajectory.open(sys.argv[1]),
    lambda: Trajectory.open(sys.argv[1], mode="r"),
):
    try:
        with call() as opened:
            print("steps", opened.steps())
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_an_unwritable_folder_is_named_and_can_still_be_read():
    folder = tempfile.mkdtemp()  # not below tmp_path, which other users may not enter
    try:
        with Trajectory.open(folder) as opened:
            opened.record(7, [Row("loss", 1.0)])
        os.chmod(Path(folder) / DATABASE, 0o444)
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", UNPRIVILEGED, folder], capture_output=True, text=True, timeout=120)
        created, appended, read = done.stdout.splitlines()
        assert created.startswith(f"TrajectoryError no permission for {folder}/new")
        assert appended.startswith(f"TrajectoryError {folder} cannot be opened or written")
        assert read == "steps [7]"
    finally:
        os.chmod(folder, 0o755)
        for file in Path(folder).iterdir():
            file.unlink()
        Path(folder).rmdir()
