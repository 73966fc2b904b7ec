import matplotlib.pyplot as plt
import numpy as np
import pytest
from sharpscope.dynamics.studies import Heat, Line, Panel, StudyResult
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


def test_cells_stand_where_their_centres_are_and_empty_ones_are_blank():
    heat = Heat([1, 10, 100], [2, 4], [[1.0, 2.0, 3.0], [4.0, None, 6.0]], "diverged / runs")
    ax = study_figure(result(Panel("a", "B", "σ", [Line("edge", [1, 100], [2, 4])], x_log=True, heat=heat)))
    [mesh] = ax.collections
    edges = mesh.get_coordinates()
    assert np.allclose(edges[0, :, 0], [10**-0.5, 10**0.5, 10**1.5, 10**2.5])
    assert np.allclose(edges[:, 0, 1], [1, 3, 5])
    values = mesh.get_array()
    assert np.array_equal(values.mask, [[False, False, False], [False, True, False]])
    assert values[1, 2] == 6
    assert "diverged / runs" in [other.get_ylabel() for other in ax.figure.axes]
    plt.close(ax.figure)


def test_cells_need_a_row_for_each_y():
    with pytest.raises(ValueError, match="give a row of x for each y"):
        Heat([1, 2], [1], [[1.0]], "")


def test_dots_are_not_joined():
    ax = study_figure(result(Panel("a", "x", "y", [Line("", [1, 2, 3], [3.0, 1.0, 2.0], points=True)])))
    assert ax.lines[0].get_linestyle() == "None"
    assert ax.lines[0].get_marker() != "None"
    plt.close(ax.figure)
