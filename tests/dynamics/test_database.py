"""Several processes, sudden death and full disks: what was recorded stays, and an error says so."""

import contextlib
import errno
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.schema import TrajectoryError
from sharpscope.dynamics.trajectory import Trajectory

DATABASE = "trajectory.sqlite"


@pytest.fixture
def trajectory(tmp_path):
    with Trajectory.open(tmp_path / "run") as opened:
        yield opened


# Several at once


def test_reading_goes_on_while_another_connection_writes(trajectory):
    trajectory.record(0, [Row("loss", 1.0)])
    with Trajectory.open(trajectory.path, mode="r") as reader:
        other = sqlite3.connect(trajectory.path / DATABASE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM measured")
        assert reader.series("loss").values.tolist() == [1.0]
        other.execute("ROLLBACK")
        trajectory.record(1, [Row("loss", 2.0)])
        assert reader.series("loss").values.tolist() == [1.0, 2.0]


def test_second_writer_waits_for_the_first(trajectory):
    other = sqlite3.connect(trajectory.path / DATABASE, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    release.start()
    trajectory.record(0, [Row("loss", 1.0)])
    release.join()
    assert trajectory.last_step() == 0


def test_second_writer_gives_up_with_a_reason(tmp_path):
    with Trajectory.open(tmp_path, timeout=0.05) as trajectory:
        trajectory.record(3, [Row("loss", 1.0)])
        other = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        message = r"another process kept .* locked for 0.05 s: recording step 4 .*up to step 3 is saved.*Wait for it"
        with pytest.raises(TrajectoryError, match=message):
            trajectory.record(4, [Row("loss", 1.0)])
        other.execute("ROLLBACK")
        trajectory.record(4, [Row("loss", 1.0)])


def test_many_may_create_and_write_the_same_trajectory_at_once(tmp_path):
    failures = []

    def write(worker):
        try:
            with Trajectory.open(tmp_path / "run") as opened:
                for step in range(5):
                    opened.record(step, [Row("loss", worker, index=worker, arrays={"x": torch.tensor(worker)})])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with Trajectory.open(tmp_path / "run", mode="r") as opened:
        assert len(opened.to_pandas()) == 30
        assert len(opened.provenance["reopened"]) == 5


def test_threads_may_share_one_trajectory(trajectory):
    threads = [
        threading.Thread(target=lambda i=i: [trajectory.record(s, [Row("q", s, index=i)]) for s in range(20)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trajectory.to_pandas()) == 80


WRITERS = """
import os, sys, torch
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.trajectory import Trajectory

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    if os.fork() == 0:
        with open(folder + ".said", "w", buffering=1) as said:
            said.write(f"{os.getpid()}\\n")
            trajectory = Trajectory.open(folder)
            for step in range(100_000):
                array = torch.full((50,), float(step))
                trajectory.record(step, [Row("loss", step / 3), Row("density", step, arrays={"x": array})])
                said.write(f"{step}\\n")
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    moments = random.Random(0)
    folders = [tmp_path / f"run{i}" for i in range(6)]
    said = [Path(f"{folder}.said") for folder in folders]
    parent = subprocess.Popen([sys.executable, "-c", WRITERS, *map(str, folders)])
    alive = {}

    def lines(file):
        return file.read_text().splitlines() if file.exists() else []

    try:
        deadline = time.monotonic() + 120
        while any(len(lines(file)) < 1 for file in said):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        alive = {file: int(lines(file)[0]) for file in said}
        # The first is killed about when it creates the database, the others while they write.
        for i, file in enumerate(said):
            while i > 0 and len(lines(file)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.1 if i else 0.005))
            os.kill(alive.pop(file), signal.SIGKILL)
    finally:
        for pid in alive.values():
            os.kill(pid, signal.SIGKILL)
        if len(alive) == len(folders):
            parent.kill()
        parent.wait(60)
    for folder, file in zip(folders, said, strict=True):
        acknowledged = [int(line) for line in lines(file)[1:]]
        with Trajectory.open(folder) as opened:
            steps = opened.steps()
            # At most the one that was being written is there without having been acknowledged.
            assert steps in (acknowledged, [*acknowledged, len(acknowledged)])
            for step in steps:
                assert opened.is_complete(step)
                assert (opened.arrays(step, "density")["x"] == step).all()
            if steps:
                assert opened.series("loss").values.tolist() == [step / 3 for step in steps]
            opened.record(len(steps), [Row("loss", 1.0)])
            assert opened.last_step() == len(steps)


# Full disks


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes, as on a disk that is full."""
    found = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, found[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found)


def many_rows(step):
    return [Row("q", 1.0, block="b" * 100, index=i) for i in range(2000)]


def test_a_full_disk_says_what_is_saved_and_the_run_can_go_on(trajectory):
    trajectory.record(0, many_rows(0))
    connection = trajectory._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 10}")
    message = r"no room left .*recording step 1 failed \(database or disk is full\).*up to step 0 is saved.*Free some"
    with pytest.raises(TrajectoryError, match=message):
        trajectory.record(1, many_rows(1))
    assert trajectory.steps() == [0]
    connection.execute("PRAGMA max_page_count = 1000000")
    trajectory.record(1, many_rows(1))
    assert len(trajectory.to_pandas()) == 4000


def test_a_refused_write_leaves_what_was_there(trajectory):
    trajectory.record(0, [Row("q", 1.0)])
    size = sum(file.stat().st_size for file in trajectory.path.iterdir())
    with largest_file(size), pytest.raises(TrajectoryError, match=r"recording step 1 failed.*up to step 0 is saved"):
        trajectory.record(1, many_rows(1))
    assert trajectory.steps() == [0]
    trajectory.record(1, [Row("q", 2.0)])
    with Trajectory.open(trajectory.path, mode="r") as opened:
        assert opened.series("q").values.tolist() == [1.0, 2.0]


def test_no_room_for_an_array_keeps_none_of_its_step(trajectory):
    with largest_file(50_000), pytest.raises(TrajectoryError, match=r"no room left .*No step was saved yet"):
        trajectory.record(0, [Row("q", 1.0), Row("v", 1.0, arrays={"x": torch.zeros(100_000)})])
    assert trajectory.steps() == []
    assert list((trajectory.path / "arrays").iterdir()) == []


def test_no_room_on_the_device(trajectory, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trajectory.record(3, [Row("q", 1.0)])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrajectoryError, match=r"no room left .*No space left on device.*up to step 3 is saved"):
        trajectory.record(4, [Row("v", 1.0, arrays={"x": torch.zeros(1)})])


def test_an_interrupted_transaction_keeps_nothing(trajectory):
    def interrupted(connection):
        connection.execute("INSERT INTO steps VALUES (5)")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), trajectory._database.transaction("testing") as connection:
        interrupted(connection)
    assert trajectory.steps() == []
    trajectory.record(5)
