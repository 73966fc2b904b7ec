"""The table on disk: what is recorded comes back to the last bit."""

import math
import sqlite3
import struct
import sys
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.schema import TrajectoryError
from sharpscope.dynamics.trajectory import Trajectory

DATABASE = "trajectory.sqlite"


@pytest.fixture
def trajectory(tmp_path):
    with Trajectory.open(tmp_path / "run") as opened:
        yield opened


def bits(x):
    return struct.pack("<d", x)


# What comes back


SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, -1.7976931348623157e308, 0.1, 2.0**60, -3.0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50))
def test_every_float64_comes_back_to_the_last_bit(patterns):
    values = SPECIAL + [struct.unpack("<d", p.to_bytes(8, "little"))[0] for p in patterns]
    with tempfile.TemporaryDirectory() as folder:
        with Trajectory.open(folder) as opened:
            opened.record(0, [Row("q", v, error=v, index=i, seconds=v) for i, v in enumerate(values)])
        with Trajectory.open(folder, mode="r") as opened:
            table = opened.to_pandas()
            assert [bits(v) for v in table["value"]] == [bits(v) for v in values]
            assert [bits(v) for v in table["error"]] == [bits(v) for v in values]
            assert [bits(v) for v in table["seconds"]] == [bits(v) for v in values]
            assert bits(opened.series("q", index=len(SPECIAL) - 1).values[0]) == bits(-3.0)


def test_ordinary_numbers_stay_readable_for_plain_sql(trajectory):
    trajectory.record(0, [Row("loss", 0.5, error=math.inf)])
    plain = sqlite3.connect(trajectory.path / DATABASE)
    assert plain.execute("SELECT value, error FROM measured").fetchone() == (0.5, math.inf)


def test_series_is_ascending_in_step_whatever_the_order_of_recording(trajectory):
    for step in (20, 0, 10):
        trajectory.record(step, [Row("sharpness", step + 0.5, error=0.1), Row("sharpness", -1.0, index=1)])
    steps, values, errors = trajectory.series("sharpness")
    assert steps.tolist() == [0, 10, 20]
    assert values.tolist() == [0.5, 10.5, 20.5]
    assert errors.tolist() == [0.1, 0.1, 0.1]
    assert (steps.dtype, values.dtype, errors.dtype) == (np.int64, np.float64, np.float64)
    assert trajectory.indices("sharpness") == [0, 1]


def test_names_come_in_the_order_of_their_first_appearance(trajectory):
    trajectory.record(0, [Row("trace", 1.0, block="layer.10"), Row("trace", 1.0, block="layer.9"), Row("loss", 1.0)])
    trajectory.record(1, [Row("loss", 1.0), Row("trace", 2.0, block="layer.9")])
    trajectory.record(0, [Row("trace", 3.0, block="layer.10")])
    assert trajectory.quantities() == ["trace", "loss"]
    assert trajectory.blocks("trace") == ["layer.10", "layer.9"]
    assert trajectory.blocks("loss") == [""]


def test_recording_the_same_cell_again_replaces_it(trajectory):
    trajectory.record(3, [Row("loss", 1.0, products=5), Row("trace", 7.0)])
    trajectory.record(3, [Row("loss", 2.0, error=0.5, converged=False)])
    table = trajectory.to_pandas().set_index("quantity")
    assert len(table) == 2
    assert table.loc["loss", ["value", "error", "converged", "products"]].tolist() == [2.0, 0.5, False, 0]


def test_replace_drops_what_an_earlier_recording_of_the_step_left(trajectory):
    for step in (3, 4):
        trajectory.record(
            step, [Row("top", 1.0), Row("top", 0.5, index=1), Row("top", 2.0, block="fc"), Row("loss", 1.0)]
        )
    trajectory.record(3, [Row("top", 9.0)], replace=True)
    table = trajectory.to_pandas()
    assert table.query("step == 3")[["quantity", "value"]].values.tolist() == [["loss", 1.0], ["top", 9.0]]
    assert len(table.query("step == 4")) == 4


def test_a_step_counts_as_done_only_when_it_is_complete(trajectory):
    assert trajectory.last_step() is None
    trajectory.record(0, [Row("loss", 1.0)])
    trajectory.record(5, [Row("loss", 1.0)], complete=False)
    assert trajectory.steps() == [0, 5]
    assert trajectory.last_step() == 0
    assert not trajectory.is_complete(5)
    trajectory.record(5)
    assert trajectory.is_complete(5)
    trajectory.record(7)  # nothing to measure is an answer too
    assert trajectory.steps() == [0, 5, 7]


def test_discard_after_forgets_the_lost_future(trajectory):
    for step in range(4):
        trajectory.record(step, [Row("loss", float(step))])
    trajectory.discard_after(1)
    assert trajectory.steps() == [0, 1]
    assert trajectory.series("loss").values.tolist() == [0.0, 1.0]
    trajectory.discard_after(-1)
    assert trajectory.steps() == []


def test_row_keeps_plain_numbers():
    row = Row("q", torch.tensor(0.5), error=np.float32(0.25), index=np.int64(2), converged=np.bool_(False))  # type: ignore[arg-type]
    assert [type(x) for x in (row.value, row.error, row.index, row.converged)] == [float, float, int, bool]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": torch.zeros(2)}, "`value` of 'q'"),
        ({"value": None}, "`value` of 'q' is None"),
        ({"value": 1.0, "index": 1.5}, "`index` of 'q' is 1.5"),
        ({"value": 1.0, "block": None}, "`block` is None"),
        ({"value": 1.0, "arrays": {"x": [1.0]}}, r"`arrays\['x'\]` of 'q' is a list.*torch.as_tensor"),
    ],
)
def test_row_rejects_what_is_not_one_number(wrong, message):
    with pytest.raises(TypeError, match=message):
        Row("q", **wrong)


def test_row_needs_a_name():
    with pytest.raises(TypeError, match="`quantity` is ''"):
        Row("", 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.record(-1), ValueError, "`step` is -1; steps count from 0"),
        (lambda t: t.record(1.5), TypeError, "`step` is 1.5; give a whole number"),
        (lambda t: t.record(0, [1.0]), TypeError, "`rows` holds 1.0"),
        (lambda t: t.series("sharpnes"), ValueError, "'sharpnes' is not in .*near it: 'sharpness'"),
        (lambda t: t.series("sharpness", "fc"), ValueError, "block of 'sharpness' 'fc' .*near it: 'fc1'"),
        (lambda t: t.series("sharpness", "fc1", 4), ValueError, r"`index` is 4; .* has the indices \[0\]"),
        (lambda t: t.blocks("x"), ValueError, "quantity 'x'"),
        (lambda t: t.arrays(2, "sharpness", "fc1"), ValueError, r"`step` is 2, .*near it: \[0, 9\]"),
    ],
)
def test_wrong_names_and_numbers_are_answered_with_near_ones(trajectory, call, error, message):
    for step in (0, 9):
        trajectory.record(step, [Row("sharpness", 1.0, block="fc1")])
    with pytest.raises(error, match=message):
        call(trajectory)


def test_an_empty_trajectory_says_so(trajectory):
    with pytest.raises(ValueError, match="has no rows yet"):
        trajectory.series("loss")
    assert trajectory.to_pandas().empty


# Arrays


def test_arrays_come_back_with_type_and_shape(trajectory):
    whole = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    given = {
        "a": whole,
        "shared": whole[1],
        "strided": whole.T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "counts": torch.tensor([1, 2]),
        "scalar": torch.tensor(3.0, requires_grad=True),
        "nan": torch.tensor([math.nan, -0.0]),
    }
    trajectory.record(4, [Row("density", 1.0, block="a/b ü", arrays=given), Row("loss", 1.0)])
    found = trajectory.arrays(4, "density", "a/b ü")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert trajectory.array_steps("density", "a/b ü") == [4]
    assert trajectory.arrays(4, "loss") == {}
    assert trajectory.array_steps("loss") == []


def test_blocks_whose_names_look_alike_in_a_file_name_keep_their_own_arrays(trajectory):
    long = "block." * 60
    names = ["a/b", "a b", long + "x", long + "y"]
    trajectory.record(0, [Row("v", 0.0, block=b, arrays={"x": torch.tensor([i])}) for i, b in enumerate(names)])
    assert [trajectory.arrays(0, "v", b)["x"].item() for b in names] == [0, 1, 2, 3]


def test_files_that_no_row_refers_to_are_harmless(trajectory):
    trajectory.record(0, [Row("v", 0.0, arrays={"x": torch.zeros(1)})])
    trajectory.record(0, [Row("v", 0.0, arrays={"x": torch.ones(1)})])
    (trajectory.path / "arrays" / ".half.tmp").write_bytes(b"half")
    assert trajectory.arrays(0, "v")["x"].item() == 1.0


def test_a_lost_or_damaged_array_file_is_named(trajectory):
    trajectory.record(0, [Row("v", 0.0, arrays={"x": torch.zeros(4)})])
    (file,) = (trajectory.path / "arrays").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\1")
    with pytest.raises(TrajectoryError, match=f"{file.name} is damaged"):
        trajectory.arrays(0, "v")
    file.unlink()
    with pytest.raises(TrajectoryError, match=f"{file.name} is missing"):
        trajectory.arrays(0, "v")


# Remembering under a key


def test_recall_returns_the_rows_of_a_key_even_after_the_step_was_overwritten(trajectory):
    rows = [Row("v", math.nan, index=i, products=3, arrays={"x": torch.tensor([i])}) for i in range(3)]
    trajectory.record(0, rows, key="k")
    trajectory.record(0, [Row("v", 5.0, index=i) for i in range(3)])
    trajectory.discard_after(-1)
    found = trajectory.recall("k")
    assert [(row.index, row.products, row.arrays["x"].item()) for row in found] == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]
    assert all(math.isnan(row.value) for row in found)
    assert trajectory.recall("other") is None


def test_recall_knows_no_rows_from_not_measured_and_from_lost(trajectory):
    trajectory.record(0, (), key="nothing")
    assert trajectory.recall("nothing") == []
    trajectory.record(0, [Row("v", 0.0, arrays={"x": torch.zeros(1)})], key="lost")
    next((trajectory.path / "arrays").iterdir()).unlink()
    assert trajectory.recall("lost") is None


# Provenance


def test_provenance_keeps_versions_command_and_notes(tmp_path):
    with Trajectory.open(tmp_path, provenance={"seed": 3, "model": {"n": 10}}) as first:
        first.annotate(note="warmup 100", seed=4)
        kept = first.provenance
    assert kept["versions"].keys() == {"python", "torch", "numpy", "sharpscope", "platform"}
    assert kept["versions"]["torch"] == torch.__version__
    assert kept["command"] == sys.argv
    assert (kept["seed"], kept["model"], kept["note"]) == (4, {"n": 10}, "warmup 100")
    with Trajectory.open(tmp_path, provenance={"seed": 5}) as second:
        again = second.provenance
    assert again["started"] == kept["started"]
    assert again["seed"] == 5
    assert [entry["command"] for entry in again["reopened"]] == [sys.argv]


def test_a_note_that_json_cannot_keep_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"`provenance\['model'\]` is .*JSON cannot keep"):
        Trajectory.open(tmp_path / "run", provenance={"model": object()})
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="keys are strings"):
        Trajectory.open(tmp_path / "run", provenance={1: 2})  # type: ignore[dict-item]


# Tables


def test_table_is_the_same_for_the_same_rows_in_any_order(tmp_path):
    rows = [Row("b", 1.0, block="y"), Row("b", 2.0, block="x"), Row("a", math.nan, index=1), Row("a", 3.0)]
    tables = []
    for name, order in (("one", [0, 1, 2, 3]), ("two", [2, 0, 3, 1])):
        with Trajectory.open(tmp_path / name) as opened:
            for step in (1, 0):
                for i in order:
                    opened.record(step, [rows[i]])
            tables.append(opened.to_pandas(costs=False))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert list(tables[0]) == ["step", "quantity", "block", "index", "value", "error", "converged"]
    assert tables[0]["step"].is_monotonic_increasing


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_exported_files_read_back_the_same(trajectory, kind):
    values = [0.1, 1 / 3, 5e-324, math.inf, math.nan]
    trajectory.record(0, [Row("q", v, block="", index=i, seconds=0.7) for i, v in enumerate(values)])
    path = trajectory.path / f"table.{kind}"
    getattr(trajectory, f"to_{kind}")(path)
    if kind == "csv":
        back = pd.read_csv(path, keep_default_na=False, na_values={"value": ["nan"], "error": ["nan"]})
    else:
        back = pd.read_parquet(path)
    pd.testing.assert_frame_equal(back, trajectory.to_pandas(), check_exact=True, check_dtype=kind == "parquet")
    with pytest.raises(TrajectoryError, match="writing the"):
        getattr(trajectory, f"to_{kind}")(trajectory.path / "missing" / "table")


def test_parquet_without_pyarrow_names_the_extra(trajectory, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"sharpscope\[export\]"):
        trajectory.to_parquet(trajectory.path / "t.parquet")
