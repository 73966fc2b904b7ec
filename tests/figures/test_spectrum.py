import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sharpscope.dynamics.row import Row
from sharpscope.figures.spectrum import density, density_evolution
from sharpscope.figures.style import save
from sharpscope.hessian.eigs import top_eigenvalues
from sharpscope.hessian.operator import DenseOperator, DiagonalOperator
from sharpscope.hessian.slq import SpectralDensity, spectral_density

# A bulk around zero, nine in ten, and outliers up to 8.
EIGENVALUES = torch.cat([torch.linspace(-0.1, 0.1, 90, dtype=torch.float64), torch.linspace(1, 8, 10)])


@pytest.fixture(scope="module")
def operator():
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=torch.float64))[0]
    return DenseOperator(Q @ torch.diag(EIGENVALUES) @ Q.T)


@pytest.fixture(scope="module")
def sampled(operator) -> SpectralDensity:
    result = spectral_density(operator, num_steps=20, num_probes=4)
    assert not result.exact
    return result


def line(ax, gid):
    (found,) = [one for one in ax.lines if one.get_gid() == gid]
    return found


def collection(ax, gid):
    return [one for one in ax.collections if one.get_gid() == gid]


def density_rows(step):
    spectrum = spectral_density(DiagonalOperator(EIGENVALUES * (1 + step / 100)), num_steps=12, num_probes=2)
    top = 8 * (1 + step / 100)
    return [
        Row("density", spectrum.mean().estimate, arrays={"nodes": spectrum.nodes, "weights": spectrum.weights}),
        Row("sharpness", top, error=0.1),
        Row("bottom_eigenvalue", -0.1, error=0.2, converged=False),
        Row("stability_threshold", 12.0),
    ]


@pytest.fixture
def run(make_run):
    return make_run(rows=density_rows, steps=[0, 20, 60], lr=2 / 12)


def test_line_and_band_are_those_of_the_density(sampled):
    ax = density(sampled, sigma=0.1)
    x, y = line(ax, "density-0").get_data()
    heights, band = (t.numpy() for t in sampled.on_grid(x, 0.1))
    shown = np.isfinite(y)
    np.testing.assert_allclose(y[shown], heights[shown])
    assert heights[~shown].max(initial=0) < ax.get_ylim()[0]  # only what lies under the axes is left out
    (area,) = collection(ax, "density-0-band")
    corners = area.get_paths()[0].vertices
    at = int(np.argmax(heights))
    assert corners[corners[:, 0] == x[at], 1].max() == pytest.approx(heights[at] + band[at])
    assert corners[corners[:, 0] == x[at], 1].min() == pytest.approx(heights[at] - band[at])


def test_every_node_is_a_point_so_that_no_peak_is_cut(sampled):
    x = line(density(sampled, sigma=1e-4), "density-0").get_xdata()
    assert np.isin(sampled.nodes.numpy().ravel(), x).all()


def test_scale_and_labels(sampled):
    ax = density(sampled)
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "Eigenvalue λ (loss / parameter²)"
    assert ax.get_ylabel() == "Spectral density (parameter² / loss)"
    assert ax.get_title() == ""
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["± standard error"]


def test_a_lone_eigenvalue_stands_above_the_floor(sampled):
    """The mass of one outlier in a hundred is seen whatever its height beside the bulk's."""
    ax = density(sampled)
    x, y = line(ax, "density-0").get_data()
    peak = np.nanmax(y[(x > 7.8) & (x < 8.2)])
    assert peak > 2 * ax.get_ylim()[0]


def test_a_node_in_a_gap_does_not_deepen_the_axis():
    nodes = torch.tensor([[-0.1, 0.0, 0.1, 1.0, 1.5, 2.0] + [0.05] * 30], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.2, 0.2, 1e-3, 1e-9, 1e-3] + [0.398 / 30] * 30], dtype=torch.float64)
    ax = density(SpectralDensity(nodes, weights, 0.0, False, 0, 0.0), sigma=0.02)
    single = 1e-3 / (0.02 * math.sqrt(2 * math.pi))
    assert single / 10 < ax.get_ylim()[0] < single


@pytest.mark.parametrize("kind", ["exact", "one probe"])
def test_without_a_standard_error_there_is_no_band(operator, kind):
    probes, steps = (8, 40) if kind == "exact" else (1, 20)
    result = spectral_density(operator, num_steps=steps, num_probes=probes)
    assert result.exact == (kind == "exact")
    ax = density(result)
    assert not collection(ax, "density-0-band")
    assert ax.get_legend() is None
    assert all(math.isfinite(limit) for limit in ax.get_ylim())


def test_eigenvalues_are_ticks(operator, sampled):
    pairs = top_eigenvalues(operator, 3)
    ax = density(sampled, eigenvalues=pairs)
    np.testing.assert_allclose(line(ax, "eigenvalues-0-sure").get_xdata(), pairs.values.numpy())
    (ticks,) = collection(ax, "eigenvalues-0")
    np.testing.assert_allclose([path.vertices[0, 0] for path in ticks.get_paths()], pairs.values.numpy())
    assert "eigenvalue" in [text.get_text() for text in ax.get_legend().get_texts()]
    for values in ([8.0, 7.0], np.array([8.0, 7.0]), torch.tensor([8.0, 7.0])):
        plain = density(sampled, eigenvalues=values)
        assert line(plain, "eigenvalues-0-sure").get_xdata().tolist() == [8.0, 7.0]


def test_eigenvalues_that_did_not_converge_are_hollow(operator, sampled):
    pairs = top_eigenvalues(operator, 3)
    residuals = torch.tensor([1e-9, 1e-9, 0.5], dtype=torch.float64)
    ax = density(sampled, eigenvalues=dataclasses.replace(pairs, residuals=residuals, converged=False))
    hollow = line(ax, "eigenvalues-0-open")
    assert hollow.get_markerfacecolor() == "white"
    assert hollow.get_xdata().tolist() == [float(pairs.values[2])]
    assert len(line(ax, "eigenvalues-0-sure").get_xdata()) == 2
    assert "not converged" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_two_densities_on_one_ax(sampled, operator):
    ax = density(sampled, label="before")
    again = density(spectral_density(2 * operator, num_steps=20, num_probes=4), ax, label="after")
    assert again is ax
    first, second = line(ax, "density-0"), line(ax, "density-1")
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["before", "after"]
    assert np.nanmax(second.get_ydata()) < ax.get_ylim()[1]
    assert np.nanmax(first.get_ydata()) < ax.get_ylim()[1]


def test_a_given_ax_is_used(sampled):
    _, (left, right) = plt.subplots(1, 2)
    assert density(sampled, right) is right
    assert not left.lines


def test_from_a_trajectory_with_its_eigenvalues(run):
    ax = density(run, step=20)
    arrays = run.arrays(20, "density")
    again = SpectralDensity(arrays["nodes"], arrays["weights"], 0.0, False, 0, 0.0)
    x, y = line(ax, "density-0").get_data()
    shown = np.isfinite(y)
    np.testing.assert_allclose(y[shown], again.on_grid(x)[0].numpy()[shown])
    assert line(ax, "eigenvalues-0-sure").get_xdata().tolist() == [pytest.approx(9.6)]
    assert line(ax, "eigenvalues-0-open").get_xdata().tolist() == [-0.1]
    last = density(run, eigenvalues=[])
    assert line(last, "density-0").get_xdata().max() > 12
    assert len(last.lines) == 2  # the density and the mark of zero


def test_a_recorded_exact_density_has_no_band(make_run):
    def rows(step):
        exact = spectral_density(DiagonalOperator(EIGENVALUES))
        return [Row("density", 0.0, arrays={"nodes": exact.nodes, "weights": exact.weights})]

    assert not collection(density(make_run(rows=rows, steps=[0])), "density-0-band")


def test_wrong_sources_and_steps(run, make_run, sampled):
    with pytest.raises(TypeError, match="`source` is a list"):
        density([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`step` is 3, but `source` is one SpectralDensity"):
        density(sampled, step=3)
    with pytest.raises(ValueError, match=r"`step` is 30, where no density was measured; near it: \[0, 20, 60\]"):
        density(run, step=30)
    bare = make_run("bare", rows=lambda step: [Row("loss", 1.0)])
    for figure in (density, density_evolution):
        with pytest.raises(ValueError, match=r"no 'density' to draw; it has 'loss': .*Density\(\)"):
            figure(bare)
    numbers = make_run("numbers", rows=lambda step: [Row("density", 1.0)])
    with pytest.raises(ValueError, match="without nodes and weights"):
        density(numbers)
    assert not plt.get_fignums()


def test_evolution_shows_each_density_at_its_step(run):
    ax = density_evolution(run, sigma=0.2)
    (mesh,) = collection(ax, "density")
    borders = mesh.get_coordinates()
    assert borders[0, :, 0].tolist() == [-10, 10, 40, 80]  # halfway between the steps 0, 20, 60
    middles = (borders[1:, 0, 1] + borders[:-1, 0, 1]) / 2
    shades = np.ma.filled(mesh.get_array().reshape(len(middles), 3), np.nan)
    for column, step in enumerate([0, 20, 60]):
        arrays = run.arrays(step, "density")
        spectrum = SpectralDensity(arrays["nodes"], arrays["weights"], 0.0, False, 0, 0.0)
        expected = spectrum.on_grid(middles, 0.2)[0].numpy()
        seen = np.isfinite(shades[:, column])
        assert seen.any()
        np.testing.assert_allclose(shades[seen, column], expected[seen])


def test_evolution_has_the_sharpness_and_the_threshold_on_it(run):
    ax = density_evolution(run)
    np.testing.assert_array_equal(line(ax, "sharpness").get_ydata(), run.series("sharpness").values)
    assert set(line(ax, "threshold").get_ydata()) == {12.0}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [r"$\lambda_{1}$", r"$2/\eta$"]
    assert ax.get_ylim()[1] > 12.8
    assert ax.get_xlabel() == "Training step"
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == "Spectral density (parameter² / loss)"


def test_evolution_of_one_step_in_a_given_ax(make_run):
    run = make_run(rows=lambda step: density_rows(step)[:1], steps=[5])
    _, (left, right) = plt.subplots(1, 2)
    assert density_evolution(run, left) is left
    assert left.get_xlim() == (4.5, 5.5)
    assert not right.has_data()


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_saving(run, sampled, tmp_path, ending):
    for name, ax in (("density", density(sampled)), ("evolution", density_evolution(run))):
        path = tmp_path / f"{name}.{ending}"
        save(ax, path)
        assert path.stat().st_size > 5000
