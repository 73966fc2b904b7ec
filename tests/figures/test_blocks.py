import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sharpscope.dynamics.row import Row
from sharpscope.figures.blocks import block_spectra_grid, js_heatmap
from sharpscope.figures.style import save
from sharpscope.hessian.block_spectra import block_spectra
from sharpscope.landscape.objective import Objective
from torch import nn


class Net(nn.Module):
    """tanh between two layers; the third is never used, so its block has no curvature."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(6, 10), nn.Linear(10, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def spectra():
    """first.weight (60) sampled, the others exact."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        objective = Objective.supervised(
            Net().double(), nn.CrossEntropyLoss(), (torch.randn(40, 6).double(), torch.randint(0, 3, (40,)))
        )
        return block_spectra(objective, dense_limit=40, num_steps=10, num_probes=4)


@pytest.fixture
def run(make_run, spectra):
    """The arrays that the measurement BlockSpectra records."""

    def rows(step):
        arrays = {"js_divergence": spectra.js_divergence()}
        for name, spectrum in spectra.items():
            arrays[f"{name}/nodes"], arrays[f"{name}/weights"] = spectrum.atoms()
            arrays[f"{name}/size_and_noise"] = torch.tensor([spectrum.size, spectrum.noise], dtype=torch.float64)
            sure = spectrum.converged and name != "second.bias"
            yield Row("block_sharpness", float(spectrum.top[0]), block=name, converged=sure)
        yield Row("heterogeneity", 0.1, arrays=arrays)

    return make_run(rows=rows, steps=[0, 10])


def panels(ax):
    return {panel.get_title(loc="left"): panel for panel in ax.child_axes}


def artist(panel, gid):
    found = [one for one in [*panel.lines, *panel.collections] if one.get_gid() == gid]
    return found[0] if found else None


def share(panel, side):
    """The integral of the drawn density over decades, read back from the picture."""
    line = artist(panel, f"{side}-line")
    formatter = panel.yaxis.get_major_formatter()
    floor = 10.0 ** int(formatter(0).split("{")[1].split("}")[0])
    decades = np.abs(np.nan_to_num(line.get_ydata()))
    density = np.where(decades > 0, floor * 10**decades, 0)
    return float(np.trapezoid(density, np.log10(line.get_xdata())))


def test_one_panel_for_each_block_in_their_order(spectra):
    ax = block_spectra_grid(spectra)
    assert list(panels(ax)) == list(spectra)
    assert [panel.get_title(loc="right") for panel in ax.child_axes] == [f"n = {s.size}" for s in spectra.values()]
    ax.figure.canvas.draw()


def test_panels_share_both_axes(spectra):
    every = block_spectra_grid(spectra).child_axes
    assert len({panel.get_xlim() for panel in every}) == len({panel.get_ylim() for panel in every}) == 1
    assert all(panel.get_xscale() == "log" for panel in every)
    low, high = every[0].get_ylim()
    assert low == -high


@pytest.mark.parametrize("name", ["first.weight", "first.bias", "second.weight", "second.bias"])
def test_areas_are_the_shares_of_positive_and_negative_eigenvalues(spectra, name):
    """The smoothing moves no mass, so the areas are the shares above the noise; the floor cuts under 1 % off."""
    panel = panels(block_spectra_grid(spectra))[name]
    nodes, weights = spectra[name].atoms()
    for side, sign in (("positive", 1), ("negative", -1)):
        kept = (sign * nodes > spectra[name].noise) & (sign * nodes > panel.get_xlim()[0])
        assert share(panel, side) == pytest.approx(float(weights[kept].sum()), abs=0.01)


def test_negative_eigenvalues_hang_down_and_are_hatched(spectra):
    panel = panels(block_spectra_grid(spectra))["first.weight"]
    assert np.nanmin(artist(panel, "negative-line").get_ydata()) < 0
    assert np.nanmin(artist(panel, "positive-line").get_ydata()) > 0
    assert artist(panel, "negative").get_hatch()
    assert not artist(panel, "positive").get_hatch()


def test_sampled_blocks_have_a_band_and_exact_ones_none(spectra):
    for name, panel in panels(block_spectra_grid(spectra)).items():
        assert (artist(panel, "positive-band") is None) == spectra[name].exact, name


def test_the_largest_eigenvalue_is_marked(spectra):
    drawn = panels(block_spectra_grid(spectra))
    assert artist(drawn["second.weight"], "top").get_xdata() == [float(spectra["second.weight"].top[0])]
    assert artist(drawn["spare.weight"], "top") is None


def test_a_block_without_curvature_says_so(spectra):
    assert spectra["spare.weight"].zero
    (note,) = panels(block_spectra_grid(spectra))["spare.weight"].texts
    assert note.get_text() == "100 % ≈ 0"


def test_only_blocks_without_curvature(spectra):
    ax = block_spectra_grid(spectra, blocks=["spare.weight", "spare.bias"])
    ax.figure.canvas.draw()
    assert list(panels(ax)) == ["spare.weight", "spare.bias"]


def test_choice_of_blocks_and_columns(spectra):
    ax = block_spectra_grid(spectra, blocks=["second.bias", "first.weight"], columns=1)
    upper, lower = ax.child_axes
    ax.figure.canvas.draw()
    assert list(panels(ax)) == ["second.bias", "first.weight"]
    assert upper.get_position().x0 == lower.get_position().x0
    assert upper.get_position().y0 > lower.get_position().y1
    with pytest.raises(ValueError, match=r"`blocks` names 'second.bais', .* 'second.bias'"):
        block_spectra_grid(spectra, blocks=["second.bais"])
    with pytest.raises(ValueError, match="`blocks` makes 0 panels"):
        block_spectra_grid(spectra, blocks=[])
    with pytest.raises(ValueError, match="`columns` is 0"):
        block_spectra_grid(spectra, columns=0)


def test_labels_and_legend(spectra):
    ax = block_spectra_grid(spectra)
    assert ax.get_xlabel() == "|λ| (loss / parameter²)"
    assert ax.get_ylabel().startswith("Share of eigenvalues per decade")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["largest eigenvalue"]


def test_a_long_name_loses_its_middle(make_run, spectra):
    name = "transformer.h.11.attn.c_attn.weight.head7"

    def rows(step):
        nodes, weights = spectra["second.weight"].atoms()
        facts = torch.tensor([spectra["second.weight"].size, 0.0])
        arrays = {f"{name}/nodes": nodes, f"{name}/weights": weights, f"{name}/size_and_noise": facts}
        yield Row("block_sharpness", 1.0, block=name)
        yield Row("heterogeneity", 0.0, arrays=arrays)

    (title,) = panels(block_spectra_grid(make_run(rows=rows)))
    start, end = title.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert len(title) <= 24


def test_the_grid_of_a_trajectory(run, spectra):
    drawn = panels(ax := block_spectra_grid(run, step=0))
    assert list(drawn) == list(spectra)
    assert artist(drawn["second.bias"], "top").get_markerfacecolor() == "white"
    assert artist(drawn["second.weight"], "top").get_markerfacecolor() != "white"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["largest eigenvalue", "not converged"]
    assert drawn["second.weight"].get_title(loc="right") == "n = 30"
    assert drawn["first.weight"].get_title(loc="right") == "n = 60"


def test_both_figures_in_given_axes(spectra):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    assert block_spectra_grid(spectra, left) is left
    assert js_heatmap(spectra, right) is right
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    outer = left.get_position()
    for panel in left.child_axes:
        assert outer.x0 - 1e-6 <= panel.get_position().x0 < panel.get_position().x1 <= outer.x1 + 1e-6
    assert left.get_tightbbox(renderer).x1 < right.get_tightbbox(renderer).x0


def test_heatmap_shows_the_distances(spectra):
    ax = js_heatmap(spectra)
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), spectra.js_distance().numpy())
    assert image.get_clim() == (0, pytest.approx(math.sqrt(math.log(2))))
    names = list(spectra)
    assert [label.get_text() for label in ax.get_xticklabels()] == names
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written[(1, 0)] == f"{float(spectra.js_distance()[0, 1]):.2f}"
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == "Jensen-Shannon distance (√nat)"


def test_heatmap_hands_its_options_on(spectra):
    ax = js_heatmap(spectra, axis="linear", sigma=0.05)
    expected = spectra.js_distance(axis="linear", sigma=0.05).numpy()
    np.testing.assert_allclose(ax.images[0].get_array(), expected)


def test_heatmap_of_a_trajectory(run, spectra):
    ax = js_heatmap(run)
    np.testing.assert_allclose(ax.images[0].get_array(), spectra.js_distance().numpy(), atol=1e-12)
    assert [label.get_text() for label in ax.get_xticklabels()] == list(spectra)
    with pytest.raises(ValueError, match="`axis` and `sigma` need a BlockSpectra"):
        js_heatmap(run, axis="linear")


@pytest.mark.parametrize("figure", [block_spectra_grid, js_heatmap])
def test_wrong_sources_and_steps(figure, run, make_run, spectra):
    with pytest.raises(TypeError, match="`source` is a dict; pass BlockSpectra or a Trajectory"):
        figure(dict(spectra))
    with pytest.raises(ValueError, match="`step` is 3, but `source` is one BlockSpectra"):
        figure(spectra, step=3)
    with pytest.raises(ValueError, match=r"`step` is 7, .* near it: \[0, 10\]"):
        figure(run, step=7)
    bare = make_run("bare", rows=lambda step: [Row("loss", 1.0)])
    with pytest.raises(ValueError, match=r"no 'heterogeneity' to draw; it has 'loss': .*BlockSpectra\(\)"):
        figure(bare)
    assert not plt.get_fignums()


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_saving(spectra, tmp_path, ending):
    for figure in (block_spectra_grid, js_heatmap):
        path = tmp_path / f"{figure.__name__}.{ending}"
        save(figure(spectra), path)
        assert path.stat().st_size > 5000
