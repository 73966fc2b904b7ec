import matplotlib.pyplot as plt
import pytest
from sharpscope import Row, Trajectory
from sharpscope.figures import comparison, stability


def trajectory(path, quantities, scale=1.0, name="SGD"):
    made = Trajectory.open(path, provenance={"optimizer": {"name": name}})
    for step in range(0, 30, 10):
        made.record(step, [Row(q, scale * (1.0 + step), error=0.1) for q in quantities])
    return made


def test_runs_share_rows_for_what_any_of_them_recorded(tmp_path):
    runs = {
        "one": trajectory(tmp_path / "1", ["loss", "sharpness"]),
        "two": trajectory(tmp_path / "2", ["loss", "threshold_ratio"], 0.5),
    }
    ax = comparison(runs)
    axes = ax.figure.axes
    labels = [[line.get_label() for line in a.lines if line.get_label() in runs] for a in axes]
    assert labels == [["one", "two"], ["one"], ["two"]]
    assert axes[2].lines[-1].get_ydata()[0] == 1.0  # the edge
    assert list(axes[0].lines[1].get_ydata()) == [0.5, 5.5, 10.5]
    assert [t.get_text() for t in ax.figure.legends[0].get_texts()] == ["one", "two"]
    plt.close(ax.figure)


def test_one_run_is_named_after_its_optimizer(tmp_path):
    ax = stability(trajectory(tmp_path, ["threshold_ratio"], name="Lion"))
    assert [t.get_text() for t in ax.figure.legends[0].get_texts()] == ["Lion"]
    plt.close(ax.figure)


def test_runs_without_anything_to_show_are_refused(tmp_path):
    with pytest.raises(ValueError, match="have none of loss, sharpness"):
        comparison({"a": trajectory(tmp_path, ["trace"])})
    with pytest.raises(ValueError, match="`runs` is empty"):
        comparison({})
