import matplotlib.pyplot as plt
import pytest
from sharpscope.dynamics.studies import Line, Panel, StudyResult
from sharpscope.figures import study_figure


def result(*panels):
    return StudyResult("name", "Title", "Paper", "A model, some data, three seeds", [], panels, False, 1.0)


def test_each_panel_has_its_lines_levels_and_scales():
    first = Panel(
        "a", "step", "loss", [Line("x", [1, 10], [2.0, 0.1]), Line("y", [1, 10], [3.0, 1.0], [0.1, 0.1])], True, True
    )
    second = Panel("b", "n", "count", [Line("", [0, 1], [0.0, 1.0], marker=True)], levels={"limit": 0.5})
    ax = study_figure(result(first, second, second))
    axes = [a for a in ax.figure.axes if a.axison]
    assert len(axes) == 3
    assert (axes[0].get_xscale(), axes[0].get_yscale(), axes[1].get_yscale()) == ("log", "log", "linear")
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["x", "y"]
    assert axes[1].get_legend() is None
    assert axes[1].lines[-1].get_ydata()[0] == 0.5
    assert "three seeds" in ax.figure.get_supxlabel()
    plt.close(ax.figure)


def test_nothing_to_draw_is_said():
    with pytest.raises(ValueError, match="has no panels"):
        study_figure(result())
