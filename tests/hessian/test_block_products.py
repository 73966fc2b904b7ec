"""Products of many blocks in one pass through the data, and the densities that come of them, against dense matrices."""

import pytest
import torch
from sharpscope.hessian.block_spectra import block_spectra
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.deflation import Complement, leading_subspace
from sharpscope.hessian.density import w1_distance
from sharpscope.hessian.extremes import extremes
from sharpscope.hessian.hessian_block import products
from sharpscope.hessian.lockstep import sample
from sharpscope.hessian.operator import DenseOperator
from sharpscope.landscape.blocks import Block, partition
from sharpscope.landscape.layout import Layout
from sharpscope.landscape.objective import Objective
from torch import nn
from torch.nn.functional import cross_entropy

ENGINES = ["double-backward", "forward-over-reverse", "finite-difference"]


class Counted(nn.Module):
    """A small network that counts how often it is evaluated."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return self.layers(x)


def problem(**options):
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Counted()
    data = [
        (torch.randn(7, 4, generator=rng, dtype=torch.float64), torch.randint(0, 3, (7,), generator=rng))
        for _ in range(3)
    ]
    return model, Objective.supervised(model, cross_entropy, data, **options)


def blocks_of(objective):
    rows = Block("rows", [("layers.0.weight", (slice(1, 3),)), "layers.3.bias"])
    return [*partition(objective).values(), rows]


@pytest.mark.parametrize("engine", ENGINES)
def test_products_together_are_those_of_each(engine):
    _, objective = problem()
    hessian = Hessian(objective, engine=engine)
    ops = [hessian.block(block) for block in blocks_of(objective)]
    rng = torch.Generator().manual_seed(1)
    Vs = [torch.randn(op.shape[0], i % 3, generator=rng, dtype=torch.float64) for i, op in enumerate(ops)]
    dense = DenseOperator(torch.eye(5, dtype=torch.float64))
    images, seconds = products([dense, *ops], [torch.ones(5, 1, dtype=torch.float64), *Vs])
    assert len(images) == len(seconds) == len(ops) + 1
    assert torch.equal(images[0], torch.ones(5, 1, dtype=torch.float64))
    for op, V, image in zip(ops, Vs, images[1:], strict=True):
        assert torch.equal(image, op.matmat(V))


def test_blocks_of_several_hessians_and_complements():
    _, objective = problem()
    ops = []
    for factor in (1, 2):
        hessian = Hessian(objective)
        block = hessian.block(partition(objective)["layers.0.weight"])
        ops += [block, Complement(block, leading_subspace(block, factor, seed=0))]
    Vs = [torch.full((24, 2), float(i + 1), dtype=torch.float64) for i in range(4)]
    images, _ = products(ops, Vs)
    for op, V, image in zip(ops, Vs, images, strict=True):
        torch.testing.assert_close(image, op.matmat(V), atol=0, rtol=0)


def test_what_is_not_kept_is_built_once_for_all_blocks():
    model, objective = problem(memory_budget=1)
    hessian = Hessian(objective, engine="double-backward")
    ops = [hessian.block(block) for block in partition(objective).values()]
    Vs = [torch.ones(op.shape[0], 1, dtype=torch.float64) for op in ops]
    products(ops, Vs)
    model.calls[0] = 0
    products(ops, Vs)
    assert model.calls[0] == 3, "one evaluation of each batch"
    model.calls[0] = 0
    for op, V in zip(ops, Vs, strict=True):
        op.matmat(V)
    assert model.calls[0] == 3 * len(ops)


def test_a_product_that_is_not_finite_is_refused():
    _, objective = problem()
    hessian = Hessian(objective, engine="double-backward")
    ops = [hessian.block(block) for block in partition(objective).values()]
    Vs = [torch.ones(op.shape[0], 1, dtype=torch.float64) for op in ops]
    Vs[2][0] = torch.nan
    with pytest.raises(ValueError, match="not finite: the vector itself"):
        products(ops, Vs)


def outlying(sizes, seed=5):
    """Blocks with a bulk of both signs, and outliers; their eigenvalues and the operator."""
    rng = torch.Generator().manual_seed(seed)
    matrices, spectra = [], []
    for n in sizes:
        bulk = 0.05 * torch.randn(n - 8, generator=rng, dtype=torch.float64) ** 3
        values = torch.cat([bulk, torch.logspace(-0.5, 1, 8, dtype=torch.float64)])
        Q, _ = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))
        matrices.append(Q @ torch.diag(values) @ Q.T)
        spectra.append(values.sort().values)
    layout = Layout(tuple(f"b{i}" for i in range(len(sizes))), tuple(torch.Size([n]) for n in sizes))
    return DenseOperator(torch.block_diag(*matrices), layout=layout), spectra


def distance(spectrum, true):
    nodes, weights = spectrum.atoms()
    shares = torch.full_like(true, 1 / len(true))
    return w1_distance(nodes, weights, true, shares)


def test_the_default_is_nearer_to_the_spectrum_than_many_plain_probes():
    op, true = outlying([500, 400])
    spectra = block_spectra(op, num_top=1)
    plain = block_spectra(op, num_top=1, num_steps=60, num_probes=6)
    for name, expected in zip(spectra, true, strict=True):
        found = spectra[name]
        assert found.density is not None
        assert found.density.products < 230 < plain[name].density.products == 360
        assert distance(found, expected) < distance(plain[name], expected)
        assert distance(found, expected) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize("tol", [1e-2, 2e-3])
def test_the_accuracy_asked_of_a_density_is_kept(tol):
    op, true = outlying([500, 400])
    spectra = block_spectra(op, num_top=1, density_tol=tol)
    assert spectra.converged
    for spectrum, expected in zip(spectra.values(), true, strict=True):
        radius = float(expected.abs().max())
        assert spectrum.density is not None
        assert spectrum.density.w1_error() <= tol * radius * (1 + 1e-6)
        assert distance(spectrum, expected) <= tol * radius


def test_ends_come_from_the_same_runs_where_they_show_them():
    op, true = outlying([400], seed=6)
    spectrum = block_spectra(op, num_top=1, num_steps=40, num_probes=4)["b0"]
    assert spectrum.products == spectrum.density.products == 160
    for found, residual, expected in (
        (spectrum.top, spectrum.top_residuals, true[0][-1]),
        (spectrum.bottom, spectrum.bottom_residuals, true[0][0]),
    ):
        assert float((found[0] - expected).abs()) <= float(residual[0]) <= 1e-3 * spectrum.scale


@pytest.mark.parametrize(("copies", "shown"), [(1, True), (300, False)])
def test_copies_of_an_eigenvalue_are_not_taken_for_one(copies, shown):
    """A run sees the 300-fold 0 once, and would put the next eigenvalue second from below."""
    bulk = torch.linspace(0.9, 1, 399 - copies)
    values = torch.cat([torch.zeros(copies), torch.tensor([0.5]), bulk, torch.tensor([2.0, 3.0])]).double()
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    (runs,) = sample([DenseOperator(Q @ torch.diag(values) @ Q.T)], 30, 4, [0], lambda _: None)
    ends = extremes(runs, 2)
    assert (ends is not None) == shown
    if ends is not None:
        assert ends.within(1e-3)
        torch.testing.assert_close(ends.bottom, values[:2], atol=1e-3, rtol=0)
        torch.testing.assert_close(ends.top, values[-2:].flip(0), atol=1e-3, rtol=0)


def test_steps_beside_an_accuracy_are_refused():
    op, _ = outlying([50])
    with pytest.raises(ValueError, match="`density_tol` is 0.1, which chooses steps"):
        block_spectra(op, density_tol=0.1, num_steps=10)
