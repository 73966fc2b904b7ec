import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from sharpscope.dynamics.row import Row
from sharpscope.figures import quantities
from sharpscope.figures.style import GREY, HOUSE


def panels(ax):
    """The panels of the figure by title, without the cells of legends."""
    return {a.get_title(loc="left").replace("\n", ""): a for a in ax.figure.axes if a.axison}


def artist(ax, gid):
    (found,) = [a for a in [*ax.lines, *ax.collections] if a.get_gid() == gid]
    return found


def gids(ax):
    return [a.get_gid() for a in [*ax.lines, *ax.collections, *ax.texts]]


def ends_of_band(ax, gid, step):
    corners = artist(ax, gid).get_paths()[0].vertices
    heights = corners[corners[:, 0] == step, 1]
    return heights.min(), heights.max()


def legend(ax):
    return [text.get_text() for a in ax.figure.axes if a.get_legend() for text in a.get_legend().get_texts()]


def draw(make_run, rows, steps=range(0, 50, 10), provenance=None, **options):
    ax = quantities(make_run(rows=rows, steps=steps, **(provenance or {})), **options)
    ax.figure.canvas.draw()
    return ax


def test_one_panel_for_each_quantity_with_the_recorded_numbers(make_run):
    run = make_run(rows=lambda s: [Row("loss", 3.0 - s / 50), Row("trace", 5.0 + s, 2.0)], steps=range(0, 50, 10))
    ax = quantities(run)
    found = panels(ax)
    assert list(found) == ["loss", "trace"]
    assert found["loss"] is ax
    assert ax.figure.get_gid() == HOUSE
    for name, panel in found.items():
        steps, values, _ = run.series(name)
        np.testing.assert_array_equal(artist(panel, f"{name}-0").get_data(), [steps, values])
    assert ends_of_band(found["trace"], "trace-0-band", 20) == pytest.approx((23, 27))
    assert [panel.get_ylabel() for panel in found.values()] == ["loss", "loss / parameter²"]
    assert {panel.get_xlabel() for panel in found.values()} == {"Training step"}


def test_low_and_high_are_the_band_of_their_quantity(make_run):
    def rows(step):
        return [Row("noise_scale", 10.0, 1.0), Row("noise_scale_low", 9.0), Row("noise_scale_high", 14.0)]

    ax = draw(make_run, rows)
    assert list(panels(ax)) == ["noise_scale"]
    assert ends_of_band(ax, "noise_scale-0-band", 20) == (9, 14)


def test_an_open_interval_reaches_the_edge_and_a_value_that_is_not_finite_is_counted(make_run):
    def rows(step):
        value, high = (math.inf, math.inf) if step in (20, 30) else (10.0, 14.0)
        return [Row("noise_scale", value), Row("noise_scale_low", 9.0), Row("noise_scale_high", high)]

    ax = draw(make_run, rows)
    assert np.isnan(artist(ax, "noise_scale-0").get_ydata()).tolist() == [False, False, True, True, False]
    assert ends_of_band(ax, "noise_scale-0-band", 20) == (9, ax.get_ylim()[1])
    assert ends_of_band(ax, "noise_scale-0-band", 10) == (9, 14)
    assert [text.get_text() for text in ax.texts] == ["2 of 5 not finite"]


def test_a_quantity_that_was_never_finite_says_so(make_run):
    ax = draw(make_run, lambda s: [Row("batch_sharpness", math.nan, converged=False)])
    assert [text.get_text() for text in ax.texts] == ["none of 5 finite"]
    assert not legend(ax)


@pytest.mark.parametrize(
    ("low", "high", "scale"), [(1.0, 9.0, "linear"), (1.0, 11.0, "log"), (-1.0, 100.0, "linear"), (0.0, 50.0, "linear")]
)
def test_positive_values_over_more_than_a_decade_have_a_logarithmic_axis(make_run, low, high, scale):
    ax = draw(make_run, lambda s: [Row("x", low if s else high)])
    assert ax.get_yscale() == scale
    assert ax.get_ylim()[0] < low < high < ax.get_ylim()[1]


def test_what_did_not_converge_is_hollow(make_run):
    ax = draw(make_run, lambda s: [Row("trace", 5.0 + s, 2.0, converged=s != 20)])
    hollow = artist(ax, "trace-0-open")
    assert (hollow.get_xdata().tolist(), hollow.get_markerfacecolor()) == ([20], "white")
    assert legend(ax) == ["not converged"]


def test_seven_blocks_are_named_the_highest_and_the_lowest_among_them(make_run):
    def rows(step):
        return [Row("gradient_snr", 2.0**-i * (1 + step), block=f"net.{i}.weight") for i in range(20)]

    ax = draw(make_run, rows)
    (panel,) = panels(ax).values()
    grey = [line for line in panel.lines if to_hex(line.get_color()).upper() == GREY and line.get_linestyle() == "-"]
    assert len(grey) == 13
    assert legend(ax) == [f"…{i}.weight" for i in (0, 3, 6, 9, 13, 16, 19)] + ["13 more"]
    assert all(line.get_linewidth() < 1 for line in grey)


def test_the_whole_model_is_told_from_its_blocks(make_run):
    def rows(step):
        return [Row("tail_index", 1.0 + i, 0.1, block=name) for i, name in enumerate(["", "a.weight", "b.weight"])]

    ax = draw(make_run, rows)
    assert set(legend(ax)) == {"whole model", "a.weight", "b.weight"}
    (whole,) = [line for line in panels(ax)["tail_index"].lines if line.get_label() == "whole model"]
    assert set(whole.get_ydata()) == {1.0}


def test_names_that_differ_in_the_middle_stay_different(make_run):
    blocks = [f"encoder.self_attention_of_layer_{i}_with_relative_positions.weight" for i in (0, 1)]
    ax = draw(make_run, lambda s: [Row("x", 1.0, block=block) for block in blocks])
    assert len(set(legend(ax))) == 2


def test_learning_rates_of_one_measurement_share_a_panel(make_run):
    kinds = ("exact", "condition_d", "theorem1")
    ax = draw(make_run, lambda s: [Row(f"coherence_lr_{kind}", 0.1 + i) for i, kind in enumerate(kinds)])
    assert list(panels(ax)) == ["coherence_lr"]
    assert legend(ax) == list(kinds)


def test_the_alignments_stand_in_one_row(make_run):
    names = [f"gradient_alignment_{kind}" for kind in ("mean_cosine", "diversity", "negative_share", "confusion")]
    ax = draw(make_run, lambda s: [Row(name, 1.0) for name in ("loss", *names, "gradient_norm", "trace")])
    rows = {name: panel.get_subplotspec().rowspan.start for name, panel in panels(ax).items()}
    assert {rows[name] for name in names} == {1}
    assert rows["loss"] == rows["gradient_norm"] == rows["trace"] == 0


def test_batch_sharpness_has_the_threshold_as_a_level(make_run):
    def rows(step):
        return [Row("stability_threshold", 10.0), Row("batch_sharpness", 4.0 + step / 10), Row("loss", 1.0)]

    ax = draw(make_run, rows, provenance={"lr": 0.2})
    found = panels(ax)
    assert set(found) == {"batch_sharpness", "loss"}
    assert set(artist(found["batch_sharpness"], "level").get_ydata()) == {10.0}
    assert [text.get_text() for text in found["batch_sharpness"].texts] == [r"$2/\eta$"]
    assert "level" not in gids(found["loss"])


def test_a_threshold_far_above_does_not_flatten_the_curve(make_run):
    ax = draw(make_run, lambda s: [Row("stability_threshold", 100.0), Row("batch_sharpness", 1.0 + s / 50)])
    assert ax.get_ylim()[1] < 3
    assert "level" not in gids(ax)
    assert [text.get_text() for text in ax.texts] == ["stability threshold = 100 $\\uparrow$"]


def test_names_choose_and_order_the_panels(make_run):
    run = make_run(rows=lambda s: [Row(name, 1.0) for name in ("a", "b", "stability_threshold", "skipped")])
    assert list(panels(quantities(run))) == ["a", "b", "stability_threshold"]
    assert list(panels(quantities(run, names=["b", "a"]))) == ["b", "a"]
    assert list(panels(quantities(run, names="skipped"))) == ["skipped"]
    assert {panel.get_subplotspec().colspan.start for panel in panels(quantities(run, columns=1)).values()} == {0}


def test_an_ax_takes_one_panel(make_run):
    run = make_run(rows=lambda s: [Row("a", 1.0 + s, block=b) for b in "xy"] + [Row("b", 1.0)])
    _, ax = plt.subplots()
    assert quantities(run, ax, names=["a"]) is ax
    assert legend(ax) == ["x", "y"]
    with pytest.raises(ValueError, match=r"`ax` is one Axes, and there are 2 panels \(a, b\)"):
        quantities(run, ax)


def test_one_step_shows_its_error(make_run):
    ax = draw(make_run, lambda s: [Row("a", 2.0, 0.5)], steps=[0])
    (segment,) = artist(ax, "a-0-bar").get_segments()
    assert segment[:, 1].tolist() == [1.5, 2.5]


def test_a_wide_error_leaves_the_line_readable(make_run):
    ax = draw(make_run, lambda s: [Row("a", 1.0 + s / 40, 50.0 if s == 20 else 0.1)])
    assert ax.get_ylim()[0] > -1
    assert ax.get_ylim()[1] < 4


def test_mistakes_are_named(make_run):
    run = make_run(rows=lambda s: [Row("noise_scale", 1.0)])
    with pytest.raises(ValueError, match="`names` has 'noise_scal'.*near it: 'noise_scale'"):
        quantities(run, names=["noise_scal"])
    with pytest.raises(ValueError, match="`names` is empty"):
        quantities(run, names=[])
    with pytest.raises(ValueError, match="`columns` is 0"):
        quantities(run, columns=0)
    with pytest.raises(ValueError, match=r"no quantity to draw; it holds cadence: add measurements"):
        quantities(make_run("other", rows=lambda s: [Row("cadence", 1.0, block="loss")]))
    assert not plt.get_fignums()
