import matplotlib.pyplot as plt
import pytest
import torch
from sharpscope.dynamics.row import Row
from sharpscope.dynamics.trajectory import Trajectory
from sharpscope.figures.plot import FIGURES, drawable, plot


@pytest.fixture
def folder(tmp_path):
    """Sharpness at two steps, a density at one of them."""
    with Trajectory.open(tmp_path / "run") as trajectory:
        arrays = {"nodes": torch.linspace(0, 2, 8).repeat(2, 1).double(), "weights": torch.full((2, 8), 1 / 8).double()}
        for step in (0, 10):
            density = [Row("density", 1.0, 0.1, arrays=arrays)] if step else []
            trajectory.record(step, [Row("sharpness", 2.0 + step, 0.01), Row("loss", 1.0), *density])
    return tmp_path / "run"


def test_all_that_there_is_data_for(folder):
    before = plt.get_fignums()
    paths = plot(folder)
    assert [path.name for path in paths] == ["sharpness.png", "density.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert plt.get_fignums() == before


@pytest.mark.parametrize(("kind", "magic"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_one_file_or_a_folder_in_any_format(folder, tmp_path, kind, magic):
    (path,) = plot(folder, tmp_path / "new" / f"paper.{kind}", figures=["sharpness"])
    assert path.read_bytes().startswith(magic)
    (path,) = plot(folder, tmp_path / "figures", figures=["density"], formats=[kind])
    assert path == tmp_path / "figures" / f"density.{kind}"


def test_an_open_trajectory_stays_open(folder):
    with Trajectory.open(folder, mode="r") as trajectory:
        plot(trajectory, figures=["sharpness"])
        assert trajectory.steps() == [0, 10]


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`figures` names 'sharpnes'.*near: 'sharpness'"):
        plot(folder, figures=["sharpnes"])
    with pytest.raises(ValueError, match="'density_evolution', which needs 'density' at 2 steps"):
        plot(folder, figures=["density_evolution"])
    with pytest.raises(ValueError, match="`formats` has 'jpeg'"):
        plot(folder, formats=["jpeg"])
    with pytest.raises(ValueError, match="is one file, and there are 2 figures"):
        plot(folder, tmp_path / "all.png")
    with Trajectory.open(tmp_path / "empty") as trajectory:
        with pytest.raises(ValueError, match="nothing to draw: it holds no rows"):
            plot(trajectory)
        trajectory.record(0, [Row("skipped", 1.0, block="loss")])
        with pytest.raises(ValueError, match="nothing to draw: it holds skipped"):
            plot(trajectory)


@pytest.mark.parametrize(
    ("rows", "figures"),
    [
        ([Row("loss", 1.0)], ["quantities"]),
        ([Row("sharpness", 1.0), Row("loss", 1.0), Row("stability_threshold", 1.0)], ["sharpness"]),
        ([Row("sharpness", 1.0, index=1), Row("sharpness", 1.0), Row("cadence", 5.0, block="loss")], ["sharpness"]),
        ([Row("sharpness", 1.0), Row("noise_scale", 1.0)], ["sharpness", "quantities"]),
        ([Row("sharpness", 1.0), Row("loss", 1.0, block="head")], ["sharpness", "quantities"]),
        ([Row("sharpness", 1.0, block="head")], ["quantities"]),
        ([Row("threshold_ratio", 1.0), Row("preconditioned_sharpness", 1.0)], ["stability"]),
        (
            [Row("threshold_ratio", 1.0), *(Row("preconditioned_sharpness", 1.0, index=i) for i in range(2))],
            ["stability", "quantities"],
        ),
        ([Row("density", 1.0)], ["quantities"]),  # without nodes and weights
    ],
)
def test_nothing_measured_is_left_out(tmp_path, rows, figures):
    with Trajectory.open(tmp_path / "run") as trajectory:
        for step in (0, 10):
            trajectory.record(step, rows)
        assert drawable(trajectory) == figures
        assert [path.stem for path in plot(trajectory)] == figures


def test_quantities_can_be_asked_for_where_other_figures_show_them_all(folder):
    (path,) = plot(folder, figures=["quantities"])
    assert path.name == "quantities.png"


def test_every_figure_is_described():
    assert all(name in (plot.__doc__ or "") for name in FIGURES)
