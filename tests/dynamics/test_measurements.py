"""Measurements against dense linear algebra."""

import copy
import math

import pytest
import torch
from sharpscope.dynamics.measurements import (
    GradientCurvature,
    GradientNorm,
    Loss,
    StabilityThreshold,
    UpdateCurvature,
)
from sharpscope.dynamics.point import Measurement, Point
from sharpscope.dynamics.spectra_measurements import BlockSpectra, BottomEigenvalue, Density, Sharpness, Trace
from sharpscope.landscape.objective import Objective
from torch import nn

ALL = (
    Loss,
    GradientNorm,
    Sharpness,
    BottomEigenvalue,
    Trace,
    Density,
    BlockSpectra,
    GradientCurvature,
    UpdateCurvature,
    StabilityThreshold,
)


class Case:
    """An MLP problem with its dense gradient and Hessian, all float64."""

    def __init__(self, mlp, dense_hessian):
        self.model, (inputs, targets) = mlp
        self.objective = Objective.supervised(self.model, nn.functional.cross_entropy, (inputs, targets))
        parameters = list(self.model.parameters())

        def loss():
            return nn.functional.cross_entropy(self.model(inputs), targets)

        self.loss = float(loss().detach())
        self.gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), parameters)])
        self.hessian = dense_hessian(loss, parameters)
        self.eigenvalues = torch.linalg.eigvalsh(self.hessian)

    def point(self, step=0, **options):
        return Point(step, self.objective, **options)


@pytest.fixture
def case(mlp, dense_hessian):
    return Case(mlp, dense_hessian)


def only(rows):
    rows = list(rows)
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("kind", ALL)
def test_each_is_a_measurement_whose_repr_is_complete(kind):
    default, named = kind(), kind(every=7, name="other")
    assert isinstance(default, Measurement)
    assert named.every == 7
    assert "other" in repr(named)
    assert repr(kind()) == repr(default) != repr(named)
    assert eval(repr(named), {kind.__name__: kind}) == named


def test_loss_and_gradient_norm(case):
    assert only(Loss().measure(case.point())).value == pytest.approx(case.loss, rel=1e-12)
    expected = float(case.gradient.norm())
    assert only(GradientNorm().measure(case.point())).value == pytest.approx(expected, rel=1e-12)


def curvature(hessian, v):
    return float(v @ hessian @ v / (v @ v))


def test_curvature_along_the_gradient_and_the_update(case):
    row = only(GradientCurvature().measure(case.point()))
    assert row.value == pytest.approx(curvature(case.hessian, case.gradient), rel=1e-10)
    assert 0 < row.error < 1e-9
    assert row.products == 1
    # The direction alone counts.
    update = 1e-30 * torch.linspace(-1, 1, len(case.gradient), dtype=torch.float64)
    row = only(UpdateCurvature().measure(case.point(update=update)))
    assert row.value == pytest.approx(curvature(case.hessian, update * 1e30), rel=1e-10)


def test_curvature_along_nothing(case):
    assert list(UpdateCurvature().measure(case.point())) == []
    row = only(UpdateCurvature().measure(case.point(update=torch.zeros_like(case.gradient))))
    assert math.isnan(row.value)
    assert not row.converged


def test_stability_threshold(case):
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.25)
    assert only(StabilityThreshold().measure(case.point(optimizer=optimizer))).value == 8.0
    adam = torch.optim.Adam(case.model.parameters())
    assert list(StabilityThreshold().measure(case.point(optimizer=adam))) == []
    assert list(StabilityThreshold().measure(case.point())) == []


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (Sharpness(num=3, tol=1e-6), lambda values: values.flip(0)[:3]),
        (BottomEigenvalue(num=2, tol=1e-6), lambda values: values[:2]),
        (Sharpness(num=2, which="LM", tol=1e-6), lambda values: values[values.abs().argsort(descending=True)[:2]]),
    ],
)
def test_ends_of_the_spectrum(measurement, expected, case):
    rows = list(measurement.measure(case.point()))
    assert [row.index for row in rows] == list(range(measurement.num))
    for row, value in zip(rows, expected(case.eigenvalues).tolist(), strict=True):
        assert row.quantity == measurement.name
        assert row.converged
        assert abs(row.value - value) <= row.error <= 1e-6 * float(case.eigenvalues.abs().max())
    assert rows[0].products > 0
    assert all(row.products == 0 for row in rows[1:])


def test_an_exhausted_budget_is_visible(case):
    with pytest.warns(UserWarning, match="converge"):
        row = only(Sharpness(tol=1e-12, max_products=2).measure(case.point()))
    assert not row.converged
    assert row.products <= 2
    assert abs(row.value - float(case.eigenvalues[-1])) <= row.error


def test_kept_vectors(case):
    row, _ = Sharpness(num=2, tol=1e-8, keep_vectors=True).measure(case.point())
    v = row.arrays["vectors"][:, 0]
    assert float((case.hessian @ v - row.value * v).norm()) <= 3.01 * row.error


class Quadratic:
    """xᵀAx/2 + bᵀx at x = 0 with an A that changes from step to step."""

    def __init__(self, n=200, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.eigenvectors = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        self.x = torch.zeros(n, dtype=torch.float64)
        self.b = torch.randn(n, generator=generator, dtype=torch.float64)

    def point(self, step, eigenvalues, b=None, **options):
        A = (self.eigenvectors * eigenvalues) @ self.eigenvectors.T
        b = self.b if b is None else b
        objective = Objective.from_closure(lambda x: x @ (A @ x) / 2 + b @ x, [self.x])
        return Point(step, objective, **options)


def test_a_warm_start_saves_products_where_the_spectrum_moves_slowly():
    problem, state, products = Quadratic(), {}, []
    values = torch.linspace(-1, 1, 200, dtype=torch.float64)
    values[-1] = 1.3
    for step in range(6):
        grown = values * (1 + 0.01 * step)
        row = only(Sharpness().measure(problem.point(step, grown, state=state)))
        assert row.converged
        assert abs(row.value - float(grown[-1])) <= row.error
        products.append(row.products)
    assert max(products[1:]) <= 0.5 * products[0]


@pytest.mark.parametrize("which", ["LA", "LM", "SA"])
def test_a_warm_start_does_not_stay_in_a_stale_eigenspace(which):
    """The tracked eigenvector stays exact while another one overtakes, in a direction the gradient has no part in."""
    problem, state = Quadratic(), {}
    before = torch.linspace(-1, 1, 200, dtype=torch.float64)
    after = before.clone()
    before[199], before[0] = 4.0, -3.0
    after[199], after[0] = 4.0, -3.0
    new = {"LA": 6.0, "LM": -6.0, "SA": -6.0}[which]
    after[100] = new
    # The gradient is orthogonal to the eigenvector that is about to win.
    u = problem.eigenvectors[:, 100]
    b = problem.b - (problem.b @ u) * u
    measurement = Sharpness(which=which, proof_every=4)
    only(measurement.measure(problem.point(0, before, b, state=state)))
    for step in range(1, 5):
        row = only(measurement.measure(problem.point(step, after, b, state=state)))
    assert row.value == pytest.approx(new, rel=1e-3)


def test_measuring_again_gives_the_same_number(case):
    state = {}
    list(Sharpness().measure(case.point(0, state=state)))
    first, second = (copy.deepcopy(state) for _ in range(2))
    rows = [list(Sharpness().measure(case.point(1, state=copied))) for copied in (first, second)]
    assert [row.value for row in rows[0]] == [row.value for row in rows[1]]
    assert torch.equal(first["vectors"], second["vectors"])


def test_vectors_of_another_model_are_not_used(case):
    state = {"vectors": torch.ones(5, 1, dtype=torch.float64)}
    row = only(Sharpness(tol=1e-6).measure(case.point(state=state)))
    assert row.value == pytest.approx(float(case.eigenvalues[-1]), rel=1e-5)


def test_trace_within_its_error(case):
    exact = float(case.eigenvalues.sum())
    within = 0
    for seed in range(20):
        row = only(Trace(num_probes=16, seed=seed).measure(case.point()))
        within += abs(row.value - exact) <= 3 * row.error
        assert row.products == 16
    assert within >= 19


def test_fixed_probes_see_changes_far_below_the_standard_error(case, mlp):
    model, data = mlp
    grown = Objective.supervised(model, lambda out, target: 1.001 * nn.functional.cross_entropy(out, target), data)
    before = only(Trace(num_probes=8).measure(case.point()))
    after = only(Trace(num_probes=8).measure(Point(1, grown)))
    assert after.value / before.value == pytest.approx(1.001, rel=1e-9)
    assert before.error > 0.01 * before.value


def test_density(case):
    row = only(Density(num_steps=30, num_probes=4).measure(case.point()))
    nodes, weights = row.arrays["nodes"], row.arrays["weights"]
    assert nodes.shape == weights.shape
    assert torch.allclose(weights.sum(1), torch.ones(4, dtype=weights.dtype))
    assert row.value == pytest.approx(float((nodes * weights).sum(1).mean()), rel=1e-9)
    assert abs(row.value - float(case.eigenvalues.mean())) <= 3.01 * row.error
    assert row.products == 4 * nodes.shape[1]


def test_block_spectra(case):
    measurement = BlockSpectra(dense_limit=70, num_steps=20, num_probes=2, tol=1e-6)
    rows = {}
    for row in measurement.measure(case.point()):
        rows.setdefault(row.quantity, []).append(row)
    blocks, [heterogeneity] = rows["block_sharpness"], rows["heterogeneity"]
    assert [row.block for row in blocks] == list(case.objective.layout.names)
    offsets = case.objective.layout.offsets
    scales = []
    for i, (row, first, last) in enumerate(zip(blocks, offsets[:-1], offsets[1:], strict=True)):
        exact = torch.linalg.eigvalsh(case.hessian[first:last, first:last])
        scales.append(float(exact.abs().max()))
        assert abs(row.value - float(exact[-1])) <= row.error + 1e-12 * scales[-1]
        nodes, weights = (heterogeneity.arrays[f"{row.block}/{kind}"] for kind in ("nodes", "weights"))
        assert float(weights.sum()) == pytest.approx(1.0)
        if last - first <= 70:
            torch.testing.assert_close(nodes, exact, rtol=1e-8, atol=1e-10)
            rank, negative = rows["block_effective_rank"][i], rows["block_negative_mass"][i]
            assert rank.block == negative.block == row.block
            assert rank.value == pytest.approx(float(exact.abs().sum() ** 2 / exact.square().sum()))
            assert negative.value == pytest.approx(float(exact.clamp(max=0).abs().sum() / exact.abs().sum()))
    js = heterogeneity.arrays["js_divergence"]
    pairs = js[tuple(torch.triu_indices(len(blocks), len(blocks), 1))]
    assert heterogeneity.value == pytest.approx(float(pairs.mean()))
    assert heterogeneity.error > 0, "one block is sampled"
    assert rows["heterogeneity_max"][0].value == pytest.approx(float(pairs.max()))
    assert rows["heterogeneity_linear"][0].value != pytest.approx(heterogeneity.value)
    [ratio], [spread] = rows["heterogeneity_scale_ratio"], rows["heterogeneity_scale_spread"]
    assert abs(ratio.value - max(scales) / min(scales)) <= ratio.error + 1e-9 * ratio.value
    assert spread.value == pytest.approx(float(torch.tensor(scales).double().log10().std()), rel=1e-4)


def test_blocks_of_ones_own_choice(case):
    rows = BlockSpectra(blocks="layer", num_steps=5, num_probes=1).measure(case.point())
    assert [row.block for row in rows if row.quantity == "block_sharpness"] == ["0", "2", "4"]
