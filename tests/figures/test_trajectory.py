import math
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sharpscope.dynamics.regimes import Label, Regime, regimes
from sharpscope.dynamics.row import Row
from sharpscope.figures.regime_shades import SHADES
from sharpscope.figures.style import save
from sharpscope.figures.trajectory import sharpness_trajectory

LIMIT = 10.0  # 2/η of the fixture `run`, whose sharpness at step 120 did not converge


def artist(ax, gid):
    found = [a for a in [*ax.lines, *ax.collections] if a.get_gid() == gid]
    assert len(found) == 1, f"{gid!r} not among {[a.get_gid() for a in ax.lines]}"
    return found[0]


def loss_axes(ax):
    (found,) = [other for other in ax.figure.axes if other.get_gid() == "loss-axes"]
    return found


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_lines_hold_the_recorded_numbers(run):
    ax = sharpness_trajectory(run)
    for axes, gid, quantity in [(ax, "sharpness-0-1", "sharpness"), (loss_axes(ax), "loss-0", "loss")]:
        steps, values, _ = run.series(quantity)
        x, y = artist(axes, gid).get_data()
        np.testing.assert_array_equal(x, steps)
        np.testing.assert_array_equal(y, values)


def test_threshold_is_drawn_and_named(run):
    ax = sharpness_trajectory(run)
    line = artist(ax, "threshold-0")
    assert set(line.get_ydata()) == {LIMIT}
    assert line.get_linestyle() != "-"
    assert texts(ax) == [r"$2/\eta$"]
    assert ax.texts[0].xy == (1.0, LIMIT)
    assert ax.get_ylim()[0] == 0
    assert LIMIT < ax.get_ylim()[1] < 1.3 * LIMIT


def test_band_spans_the_errors_and_skips_what_did_not_converge(run):
    ax = sharpness_trajectory(run)
    steps, values, errors = run.series("sharpness")
    sure = steps != 120
    corners = artist(ax, "sharpness-0-1-band").get_paths()[0].vertices
    for step, value, error in zip(steps[sure], values[sure], errors[sure], strict=True):
        heights = corners[corners[:, 0] == step, 1]
        assert heights.min() == pytest.approx(value - error)
        assert heights.max() == pytest.approx(value + error)
    assert 120 not in corners[:, 0]


def test_not_converged_is_hollow_and_in_the_legend(run):
    ax = sharpness_trajectory(run)
    hollow = artist(ax, "sharpness-0-1-open")
    assert hollow.get_xdata().tolist() == [120]
    assert hollow.get_markerfacecolor() == "white"
    assert hollow.get_marker() not in ("", "None", None)
    assert "not converged" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_without_open_ends_there_is_no_legend(make_run):
    ax = sharpness_trajectory(make_run(rows=lambda step: [Row("sharpness", 1.0 + step)]))
    assert ax.get_legend() is None


def test_axes_share_steps_and_say_their_units(run):
    ax = sharpness_trajectory(run)
    below = loss_axes(ax)
    ax.figure.canvas.draw()
    assert ax.get_ylabel() == "Sharpness\n(loss / parameter²)"
    assert (below.get_xlabel(), below.get_ylabel()) == ("Training step", "Loss")
    assert below.get_yscale() == "log"
    assert not any(label.get_visible() for label in ax.get_xticklabels())
    ax.set_xlim(10, 20)
    assert below.get_xlim() == (10, 20)
    assert below.get_position().y1 < ax.get_position().y0
    assert ax.get_title() == ""


@pytest.mark.parametrize("layout", [None, "tight", "constrained"])
def test_a_given_ax_is_used_and_nothing_leaves_the_figure(run, layout):
    figure, (left, right) = plt.subplots(1, 2, layout=layout, figsize=(9, 4))
    before = left.get_position()
    assert sharpness_trajectory(run, right) is right
    figure.canvas.draw()
    assert len(figure.axes) == 3
    if layout is None:
        assert left.get_position().bounds == before.bounds
    box = loss_axes(right).get_tightbbox()
    assert box.y0 >= 0
    assert box.x0 >= left.get_tightbbox().x1 or layout is None


def test_an_ax_without_a_grid_works_too(run):
    ax = sharpness_trajectory(run, plt.figure().add_axes((0.2, 0.2, 0.6, 0.6)))
    ax.figure.canvas.draw()
    assert loss_axes(ax).get_position().y0 == pytest.approx(0.2)


def test_every_eigenvalue_has_its_own_dash_and_name(make_run):
    def rows(step):
        return [Row("sharpness", 10.0 + step - i, index=i) for i in range(3)]

    ax = sharpness_trajectory(make_run(rows=rows))
    lines = [artist(ax, f"sharpness-0-{i}") for i in (1, 2, 3)]
    assert len({line.get_color() for line in lines}) == 3
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 3
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [r"$\lambda_{1}$", r"$\lambda_{2}$", r"$\lambda_{3}$"]


def test_two_runs_on_one_ax(make_run):
    def other(step):
        return [Row("sharpness", 15.0), Row("stability_threshold", 20.0), Row("loss", 2.0)]

    ax = sharpness_trajectory(make_run("a", lr=0.2), label="η = 0.2")
    assert sharpness_trajectory(make_run("b", rows=other, lr=0.1), ax, label="η = 0.1") is ax
    below = loss_axes(ax)
    assert [line.get_gid() for line in below.lines] == ["loss-0", "loss-1"]
    first, second = artist(ax, "sharpness-0-1"), artist(ax, "sharpness-1-1")
    assert first.get_color() != second.get_color()
    assert artist(ax, "threshold-1").get_color() == second.get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["η = 0.2", "η = 0.1"]
    assert [text.xy for text in ax.texts] == [(1.0, 10.0), (1.0, 20.0)]


def test_one_name_for_a_threshold_that_runs_share(make_run):
    ax = sharpness_trajectory(make_run("a", lr=0.2), label="seed 0")
    sharpness_trajectory(make_run("b", lr=0.2), ax, label="seed 1")
    assert texts(ax) == [r"$2/\eta$"]


@pytest.mark.parametrize(
    ("provenance", "given", "name"),
    [
        ({"learning_rate": 0.2}, None, r"$2/\eta$"),
        ({"optimizer": {"name": "SGD", "lr": 0.2}}, None, r"$2/\eta$"),
        ({"optimizer": "SGD", "lr": 0.2}, None, r"$2/\eta$"),
        ({"lr": 0.2, "momentum": 0.9}, "$3.8/\\eta$", "$3.8/\\eta$"),
        ({"lr": 0.38}, None, "stability\nthreshold"),  # momentum 0.9: 2 (1 + μ) / η = 10
        ({}, None, "stability\nthreshold"),
    ],
)
def test_threshold_is_called_two_over_eta_only_where_it_is(make_run, provenance, given, name):
    ax = sharpness_trajectory(make_run(**provenance), threshold_label=given)
    assert texts(ax) == [name]


def test_a_threshold_that_changes_is_a_staircase(make_run):
    def rows(step):
        return [Row("sharpness", 5.0), Row("stability_threshold", 10.0 if step < 200 else 20.0)]

    line = artist(ax := sharpness_trajectory(make_run(rows=rows)), "threshold-0")
    assert line.get_drawstyle() == "steps-post"
    assert set(line.get_ydata()) == {10.0, 20.0}
    assert ax.texts[0].xy == (1.0, 20.0)


def test_a_threshold_far_above_does_not_flatten_the_curve(make_run):
    def rows(step):
        return [Row("sharpness", 1.0 + step / 400), Row("stability_threshold", 2000.0)]

    ax = sharpness_trajectory(make_run(rows=rows, lr=1e-3))
    assert ax.get_ylim()[1] < 3
    assert texts(ax) == [r"$2/\eta$ = 2000 $\uparrow$"]


def test_missing_sharpness_names_what_there_is(make_run):
    with pytest.raises(ValueError, match=r"no 'sharpness' to draw; it has 'loss', 'trace': .*Sharpness\(\)"):
        sharpness_trajectory(make_run(rows=lambda step: [Row("loss", 1.0), Row("trace", 2.0)]))
    with pytest.raises(ValueError, match="it has nothing yet"):
        sharpness_trajectory(make_run("empty", steps=[]))
    assert not plt.get_fignums()


@pytest.mark.parametrize("option", ["absent", "declined"])
def test_without_loss_the_steps_stand_under_the_sharpness(make_run, run, option):
    if option == "absent":
        ax = sharpness_trajectory(make_run("bare", rows=lambda step: [Row("sharpness", 1.0)]))
    else:
        ax = sharpness_trajectory(run, loss=False)
    assert len(ax.figure.axes) == 1
    assert ax.get_xlabel() == "Training step"


def test_a_loss_at_zero_gets_a_linear_axis(make_run):
    ax = sharpness_trajectory(make_run(rows=lambda step: [Row("sharpness", 1.0), Row("loss", 0.0)]))
    assert loss_axes(ax).get_yscale() == "linear"


def test_a_diverged_run_is_drawn_up_to_its_end(make_run):
    def rows(step):
        bad = step >= 200
        value = math.nan if bad else 1.0 + step
        return [Row("sharpness", value, converged=not bad), Row("loss", math.inf if bad else 1.0, error=math.nan)]

    ax = sharpness_trajectory(make_run(rows=rows))
    ax.figure.canvas.draw()
    assert np.isfinite(artist(ax, "sharpness-0-1").get_ydata()).sum() == 10
    assert 181 < ax.get_ylim()[1] < 200


def test_one_step_and_many_steps(make_run):
    one = sharpness_trajectory(make_run("one", steps=[0]))
    assert any(line.get_marker() == "o" for line in one.lines)
    one.figure.canvas.draw()
    assert [tick for tick in one.get_xticks() if one.get_xlim()[0] <= tick <= one.get_xlim()[1]] == [0]
    many = sharpness_trajectory(make_run("many", rows=lambda s: [Row("sharpness", 1.0)], steps=range(200)))
    assert all(line.get_marker() in ("", "None", "none", None) for line in many.lines)


def test_a_threshold_that_was_never_finite_is_left_out(make_run):
    ax = sharpness_trajectory(make_run(rows=lambda s: [Row("sharpness", 1.0), Row("stability_threshold", math.inf)]))
    assert not texts(ax)
    assert not [line for line in ax.lines if str(line.get_gid()).startswith("threshold")]


def regime(label, first, last):
    return Regime(label, first, last, 1.0, 1.0, 1.0, (1.0, 1.0), 0.0, "")


REGIMES = [
    regime("progressive sharpening", 0, 100),
    regime("edge of stability", 120, 300),
    regime("progressive sharpening", 320, 380),
]


def test_regimes_are_shaded_in_both_axes_and_named_once(run):
    ax = sharpness_trajectory(run, regimes=REGIMES)
    ax.figure.canvas.draw()
    for axes in (ax, loss_axes(ax)):
        spans = [patch for patch in axes.patches if str(patch.get_gid()).startswith("regime-")]
        assert [(p.get_x(), p.get_x() + p.get_width()) for p in spans] == [(0, 110), (110, 310), (310, 380)]
        first, second, third = (p.get_facecolor() for p in spans)
        assert first == third != second
        assert [bool(p.get_hatch()) for p in spans] == [False, True, False]
    (named,) = [a for a in ax.get_children() if a.get_gid() == "regimes-legend"]
    assert [text.get_text() for text in named.get_texts()] == ["progressive sharpening", "edge of stability"]
    box, place = named.get_window_extent(), ax.get_window_extent()
    assert place.y1 <= box.y0 < box.y1 <= ax.figure.bbox.y1  # over the axes, inside the figure
    assert not named.get_clip_on()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["not converged"]


def test_every_label_of_a_regime_has_a_shade_of_its_own():
    assert set(SHADES) == set(get_args(Label))
    assert len(set(SHADES.values())) == len(SHADES)


def test_the_regimes_found_in_a_run_are_those_drawn(make_run):
    run = make_run(lr=0.2, steps=range(0, 400, 5))
    found = regimes(run)
    assert {one.label for one in found} >= {"progressive sharpening", "edge of stability"}
    ax = sharpness_trajectory(run, regimes=found)
    assert len([p for p in ax.patches if str(p.get_gid()).startswith("regime-")]) == len(found)


def test_regimes_of_something_else_are_refused(run):
    with pytest.raises(TypeError, match="`regimes` holds a str"):
        sharpness_trajectory(run, regimes=["edge of stability"])
    with pytest.raises(ValueError, match="go from step 0 to 900, `trajectory` from 0 to 380"):
        sharpness_trajectory(run, regimes=[regime("saturation", 0, 900)])
    ax = sharpness_trajectory(run, regimes=REGIMES)
    with pytest.raises(ValueError, match="second run on the same `ax`"):
        sharpness_trajectory(run, ax, regimes=REGIMES)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_saving(run, tmp_path, ending):
    path = tmp_path / f"sharpness.{ending}"
    save(sharpness_trajectory(run), path)
    assert path.stat().st_size > 5000
    if ending == "svg":
        assert 'id="sharpness-0-1"' in path.read_text()
