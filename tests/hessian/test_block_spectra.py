"""Block spectra against dense Hessians, closed forms, and what must not change them."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from sharpscope.hessian.block_spectra import block_spectra
from sharpscope.hessian.curvature import Hessian
from sharpscope.hessian.deflation import EndPairs, leading_subspace, products_for
from sharpscope.hessian.eigs import NotConvergedWarning
from sharpscope.hessian.operator import DenseOperator, LinearOperator
from sharpscope.hessian.preconditioned import PreconditionedOperator
from sharpscope.hessian.slq import spectral_density
from sharpscope.landscape.blocks import Block, partition
from sharpscope.landscape.layout import Layout
from sharpscope.landscape.objective import Objective
from torch import nn
from torch.nn.functional import cross_entropy

# float64 products and eigenvalues: rounding only.
ROUNDING = {"atol": 1e-11, "rtol": 1e-9}


def objective_of(problem, scale=1.0):
    model, data = problem
    return Objective.supervised(model, lambda output, target: scale * cross_entropy(output, target), data)


KNOWN = {}


@pytest.fixture(params=["mlp", "cnn", "transformer"])
def known(request, make_problem, dense_hessian):
    """(objective, dense Hessian as an operator) of a shared problem, differentiated once for this file."""
    if request.param not in KNOWN:
        model, (inputs, targets) = problem = make_problem(request.param)
        objective = objective_of(problem)
        H = dense_hessian(lambda: cross_entropy(model(inputs), targets), model.parameters())
        KNOWN[request.param] = objective, DenseOperator((H + H.T) / 2, layout=objective.layout)
    return KNOWN[request.param]


def eigenvalues_of(op, blocks, name):
    i = blocks[name].indices(op.layout)
    return torch.linalg.eigvalsh(op.dense()[i][:, i])


def diagonal_blocks(*blocks):
    """A block diagonal operator with blocks b0, b1 ... from eigenvalues, each in a random basis."""
    rng = torch.Generator().manual_seed(0)
    matrices = []
    for values in blocks:
        Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=rng, dtype=torch.float64))
        matrices.append(Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T)
    layout = Layout(tuple(f"b{i}" for i in range(len(blocks))), tuple(torch.Size([len(values)]) for values in blocks))
    return DenseOperator(torch.block_diag(*matrices), layout=layout)


@pytest.mark.parametrize("kind", ["parameter", "layer", "neuron"])
def test_small_blocks_are_exact(known, kind):
    objective, op = known
    values = torch.linalg.eigvalsh(op.dense())
    spectra = block_spectra(objective, kind, operator=op)
    assert spectra.converged
    for name, spectrum in spectra.items():
        true = eigenvalues_of(op, spectra.partition, name)
        assert spectrum.exact
        assert spectrum.products == spectrum.size == len(true)
        if not spectrum.zero:
            torch.testing.assert_close(spectrum.eigenvalues, true, **ROUNDING)
            assert float((spectrum.top[0] - true[-1]).abs()) <= float(spectrum.top_residuals[0])
            assert float((spectrum.bottom[0] - true[0]).abs()) <= float(spectrum.bottom_residuals[0])
    assert math.isclose(sum(float(s.trace) for s in spectra.values()), float(values.sum()), rel_tol=1e-9)
    # Cauchy: no block reaches beyond the whole.
    assert max(float(s.top[0]) for s in spectra.values()) <= float(values[-1]) + 1e-12
    assert min(float(s.bottom[0]) for s in spectra.values()) >= float(values[0]) - 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hessian_of_an_objective_is_the_default(make_problem, known, dtype):
    """Restricted products of the live model, in its own precision, against the dense float64 matrix."""
    _, op = known
    name = next(name for name, (_, known_op) in KNOWN.items() if known_op is op)
    objective = objective_of(make_problem(name, dtype))
    kind = "head" if name == "transformer" else "neuron"
    chosen = list(partition(objective, kind).values())[::3]
    spectra = block_spectra(objective, chosen)
    for block, spectrum in spectra.items():
        true = eigenvalues_of(op, spectra.partition, block)
        if spectrum.zero:
            assert float(true.abs().max()) <= float(spectrum.top_residuals[0]) + 1e-6
        else:
            # The stated residual covers the products; float32 weights and data add their own rounding.
            slack = 1e-5 * float(true.abs().max()) + 1e-7 if dtype == torch.float32 else 1e-14
            assert float((spectrum.top[0] - true[-1]).abs()) <= float(spectrum.top_residuals[0]) + slack
            assert float((spectrum.bottom[0] - true[0]).abs()) <= float(spectrum.bottom_residuals[0]) + slack


def test_large_blocks_are_sampled_within_their_errors(known):
    objective, op = known
    spectra = block_spectra(
        objective, "layer", operator=op, dense_limit=0, num_steps=6, num_probes=4, num_top=2, tol=1e-4
    )
    assert any(spectrum.density is not None and not spectrum.density.exact for spectrum in spectra.values())
    for name, spectrum in spectra.items():
        true = eigenvalues_of(op, spectra.partition, name)
        assert spectrum.converged
        if spectrum.exact or spectrum.zero:
            continue
        for found, residual, expected in (
            (spectrum.top, spectrum.top_residuals, true.flip(0)[:2]),
            (spectrum.bottom, spectrum.bottom_residuals, true[:2]),
        ):
            assert bool(((found - expected).abs() <= residual + 1e-14).all())
            assert float(residual.max()) <= 1e-4 * spectrum.scale * (1 + 1e-9)
        # Four probes: the standard error is itself uncertain. Rounding is all there is where a density is exact.
        assert abs(spectrum.trace.estimate - float(true.sum())) <= 5 * spectrum.trace.stderr + 1e-12
        nodes, weights = spectrum.atoms()
        assert abs(float(weights.sum()) - 1) < 1e-12
        assert math.isclose(float((nodes * weights).sum()) * spectrum.size, spectrum.trace.estimate, abs_tol=1e-10)
        assert spectrum.eigenvalues is None
        assert spectrum.density is not None
        assert spectrum.products >= spectrum.density.products


def test_sampled_and_exact_agree_on_how_blocks_differ():
    """Well separated clusters: Lanczos quadrature reproduces what the eigenvalues say."""
    mixed = [1.0] * 60 + [2.0] * 60
    op = diagonal_blocks(mixed, mixed, [100.0] * 90 + [50.0] * 30)
    exact = block_spectra(op, dense_limit=120).js_divergence()
    spectra = block_spectra(op, num_probes=20, num_steps=4)
    assert all(spectrum.density is not None and not spectrum.density.exact for spectrum in spectra.values())
    assert abs(float(exact[0, 1])) < 1e-12
    # 20 probes of 120 entries find a share to within √(2 / (20 · 120)) · ½, about one percent.
    torch.testing.assert_close(spectra.js_divergence(), exact, atol=0.01, rtol=0)


class Counted(LinearOperator):
    """Any operator; keeps the vectors of its products, and which blocks they lie in."""

    def __init__(self, op):
        super().__init__(op.shape[0], dtype=op.dtype, layout=op.layout)
        self._op, self.widths, self.touched = op, [], []

    def matmat(self, V):
        self.widths.append(V.shape[1])
        self.touched.append([bool(part.any()) for part in V.split([s.numel() for s in self.layout.shapes])])
        return self._op.matmat(V)


@pytest.mark.parametrize("room", [math.inf, 300, 0])
def test_blocks_in_lockstep_are_as_alone(monkeypatch, room):
    """Whatever the memory allows; seeds go by the place of the block among all blocks."""
    if room < math.inf:
        monkeypatch.setattr("sharpscope.hessian.lockstep.available_bytes", lambda _: 8 * room * 8 * (7 + 4))
    rng = torch.Generator().manual_seed(3)
    op = diagonal_blocks(*(torch.randn(n, generator=rng).tolist() for n in (120, 5, 90, 200)))
    blocks = partition(op)
    spectra = block_spectra(op, blocks, dense_limit=10, num_steps=7, num_probes=3, num_top=1, seed=11)
    assert [s.exact for s in spectra.values()] == [False, True, False, False]
    for i, (name, spectrum) in enumerate(spectra.items()):
        if spectrum.exact:
            continue
        alone = spectral_density(op.block(blocks[name]), num_steps=7, num_probes=3, seed=11 + i)
        torch.testing.assert_close(spectrum.density.nodes, alone.nodes, atol=1e-12, rtol=0)
        torch.testing.assert_close(spectrum.density.weights, alone.weights, atol=1e-10, rtol=0)
        assert spectrum.density.products == alone.products == 21
        assert spectrum.density.seconds > 0


def test_blocks_go_in_lockstep_and_ended_ones_cost_nothing():
    spread = torch.linspace(-1, 1, 80).tolist()
    op = Counted(diagonal_blocks([3.0] * 30 + [1.0] * 30, spread))
    spectra = block_spectra(op, dense_limit=0, num_steps=5, num_probes=2, num_top=1, tol=0.5)
    by_block = [[], []]
    steps = []
    for touched, width in zip(op.touched, op.widths, strict=True):
        assert sum(touched) == 1, "a product is one block's"
        by_block[touched[1]].append(width)
        steps.append(int(touched[1]))
    assert steps[:7] == [0, 1, 0, 1, 1, 1, 1]
    assert by_block[0][:2] == [2, 2]
    assert by_block[1][:5] == [2] * 5
    assert [spectra[name].density.products for name in spectra] == [4, 10]
    assert sum(op.widths) == spectra.products


@pytest.mark.parametrize("multiple", [False, True])
def test_ends_come_from_the_deflation_unless_copies_may_hide(multiple):
    """The run of the deflation sees one copy of a multiple eigenvalue; the probes beside it see the others."""
    bulk = (0.1 * torch.sin(torch.arange(1.0, 795.0))).tolist()
    values = [4.0, *([4.0] if multiple else []), 3.0, 2.0, -1.0, -2.0, -3.0]
    op = Counted(diagonal_blocks(values + bulk))
    spectrum = block_spectra(op, deflate=4, num_steps=20, num_probes=4, dense_limit=0, num_top=3, tol=1e-4)["b0"]
    true = torch.tensor(sorted(values + bulk), dtype=torch.float64)
    for found, expected in ((spectrum.top, true.flip(0)[:3]), (spectrum.bottom, true[:3])):
        torch.testing.assert_close(found, expected, atol=4e-4, rtol=0)
    assert spectrum.converged
    assert spectrum.products == sum(op.widths)
    assert (spectrum.products == spectrum.density.products) != multiple


@pytest.mark.parametrize("probes", [3, 4])
def test_few_probes_prove_nothing(probes):
    values = [4.0, 3.0, 2.0, -1.0, -2.0, -3.0, *(0.1 * torch.sin(torch.arange(1.0, 795.0))).tolist()]
    options = {"deflate": 6, "num_steps": 20, "dense_limit": 0, "tol": 1e-4}
    spectrum = block_spectra(diagonal_blocks(values), num_probes=probes, **options)["b0"]
    assert (spectrum.products == spectrum.density.products) == (probes == 4)


@pytest.mark.parametrize(("room", "most"), [(math.inf, 4), (2.5, 2), (0, 1)])
def test_deflated_vectors_of_few_blocks_are_held_at_once(monkeypatch, room, most):
    """As many as an eighth of the free memory has room for, at least one; and the result is the same."""
    rng = torch.Generator().manual_seed(3)
    op = diagonal_blocks(*(torch.randn(150, generator=rng).tolist() for _ in range(4)))
    options = {"deflate": 2, "num_steps": 10, "num_probes": 2, "dense_limit": 0, "num_top": 1}
    expected = block_spectra(op, **options)
    free = 8 * int(room * 150 * 8 * products_for(2, 150, EndPairs(1, 1e-3))) if room < math.inf else 1 << 40
    monkeypatch.setattr("sharpscope.hessian.block_densities.available_bytes", lambda _: free)
    references, held = [], []

    def watched(*args, **kwargs):
        found = leading_subspace(*args, **kwargs)
        references.append(weakref.ref(found))
        gc.collect()
        held.append(sum(reference() is not None for reference in references))
        return found

    monkeypatch.setattr("sharpscope.hessian.block_densities.leading_subspace", watched)
    spectra = block_spectra(op, **options)
    assert len(held) == 4
    assert max(held) == most
    for name, spectrum in spectra.items():
        torch.testing.assert_close(spectrum.density.nodes, expected[name].density.nodes, atol=1e-10, rtol=0)


def test_permuting_neurons_changes_no_spectrum(mlp):
    model, data = mlp
    before = block_spectra(objective_of(mlp), "layer")
    neurons_before = block_spectra(objective_of(mlp), "neuron")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor.copy_(tensor[order].clone())
        model[2].weight.copy_(model[2].weight[:, order].clone())
    after = block_spectra(objective_of((model, data)), "layer")
    neurons_after = block_spectra(objective_of((model, data)), "neuron")
    for name in before:
        torch.testing.assert_close(after[name].eigenvalues, before[name].eigenvalues, **ROUNDING)
    for i, j in enumerate(order.tolist()):
        torch.testing.assert_close(
            neurons_after[f"0.neuron{i}"].eigenvalues, neurons_before[f"0.neuron{j}"].eigenvalues, **ROUNDING
        )


def test_scaling_the_loss_scales_the_eigenvalues_and_keeps_the_divergence(mlp):
    before, after = (block_spectra(objective_of(mlp, scale), "neuron") for scale in (1.0, 1000.0))
    for name in before:
        torch.testing.assert_close(after[name].eigenvalues, 1000 * before[name].eigenvalues, atol=1e-9, rtol=1e-9)
    for axis in ("log", "linear"):
        torch.testing.assert_close(after.js_divergence(axis=axis), before.js_divergence(axis=axis), atol=1e-6, rtol=0)
    old, new = before.heterogeneity(), after.heterogeneity()
    assert math.isclose(old.scale_ratio, new.scale_ratio, rel_tol=1e-9)
    assert (old.largest, old.smallest, old.most_different) == (new.largest, new.smallest, new.most_different)


def test_softmax_regression_in_closed_form():
    """The block of class i is mean(p_i (1 − p_i) x xᵀ)."""
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(50, 6, generator=rng, dtype=torch.float64)
    model = nn.Linear(6, 4, bias=False).double()
    spectra = block_spectra(objective_of((model, (x, torch.randint(0, 4, (50,), generator=rng)))), "neuron")
    p = model(x).softmax(1)
    for i in range(4):
        block = (x.T * (p[:, i] * (1 - p[:, i]))) @ x / len(x)
        torch.testing.assert_close(spectra[f"neuron{i}"].eigenvalues, torch.linalg.eigvalsh(block), **ROUNDING)


@pytest.mark.parametrize("dense_limit", [0, None], ids=["sampled", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_without_curvature_is_zero(dtype, dense_limit):
    """The loss does not depend on the bias of the keys: softmax takes away what all scores share."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).to(dtype)
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(20, 5, 8, dtype=dtype)
    objective = Objective(attention, lambda m, batch: m(batch, batch, batch, need_weights=False)[0].sin().mean(), x)
    blocks = [
        Block("key bias", [("in_proj_bias", (slice(8, 16),))]),
        Block("value bias", [("in_proj_bias", (slice(16, 24),))]),
        Block("queries", [("in_proj_weight", (slice(0, 8),))]),
    ]
    spectra = block_spectra(objective, blocks, dense_limit=dense_limit, num_steps=10, num_probes=2)
    zero = spectra["key bias"]
    assert zero.zero
    assert zero.exact == (dense_limit is None)
    assert zero.trace.estimate == zero.scale == zero.negative_mass == zero.effective_rank == 0.0
    assert 0 <= float(zero.top_residuals[0]) < 1e-6 * spectra["value bias"].scale
    assert not spectra["value bias"].zero
    assert not spectra["queries"].zero
    found = spectra.heterogeneity()
    assert found.zero_blocks == ("key bias",)
    assert "key bias" not in (found.smallest, found.largest)
    assert math.isclose(found.js_divergence_max, math.log(2), rel_tol=1e-9)


def test_an_operator_of_zeros():
    layout = Layout(("a", "b"), (torch.Size([3]), torch.Size([9])))
    op = DenseOperator(torch.zeros(12, 12, dtype=torch.float64), layout=layout)
    spectra = block_spectra(op, dense_limit=4, num_steps=2, num_probes=2)
    assert (spectra["a"].exact, spectra["b"].exact) == (True, False)
    found = spectra.heterogeneity()
    assert found.zero_blocks == ("a", "b")
    assert (found.js_divergence_mean, found.scale_ratio, found.largest, found.negative_mass) == (0.0, 1.0, None, 0.0)
    assert spectra.js_divergence().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_an_approximate_operator_has_a_higher_floor():
    class Approximate(LinearOperator):
        def matmat(self, V):
            return torch.tensor([1.0, 1.0, 1e-4, 1e-4], dtype=torch.float64).unsqueeze(1) * V

    layout = Layout(("large", "small"), (torch.Size([2]), torch.Size([2])))
    for error, zero in ((None, False), (1e-3, True)):
        op = Approximate(4, dtype=torch.float64, layout=layout, relative_error=error)
        assert block_spectra(op)["small"].zero == zero


def test_the_quadratic_of_the_paper():
    """Nine eigenvalues in three blocks: apart in one case, mixed in the other."""
    apart = block_spectra(diagonal_blocks([1, 2, 3], [99, 100, 101], [4998, 4999, 5000])).heterogeneity()
    mixed = block_spectra(diagonal_blocks([1, 99, 4998], [2, 100, 4999], [3, 101, 5000])).heterogeneity()
    assert math.isclose(apart.scale_ratio, 5000 / 3, rel_tol=1e-9)
    assert (apart.largest, apart.smallest) == ("b2", "b0")
    assert math.isclose(apart.js_divergence_mean, math.log(2), rel_tol=1e-4)
    assert math.isclose(mixed.scale_ratio, 5000 / 4998, rel_tol=1e-9)
    # Only 1, 2, 3, a third of each spectrum, lie apart by more than the smoothing.
    assert mixed.js_divergence_mean < math.log(2) / 3
    assert mixed.most_different == ("b0", "b2")


def test_distance_is_the_root_of_the_divergence():
    spectra = block_spectra(diagonal_blocks([1, 2], [3, 4], [1e3, 2e3]))
    torch.testing.assert_close(spectra.js_distance() ** 2, spectra.js_divergence())
    assert float(spectra.js_distance().max()) <= math.sqrt(math.log(2))
    assert float(spectra.js_distance(sigma=1.0)[0, 1]) < float(spectra.js_distance(sigma=0.05)[0, 1])


def test_summaries_of_a_known_spectrum():
    spectra = block_spectra(diagonal_blocks([-1.0, 1.0, 2.0], [5.0] * 4, [0.0, 0.0, 0.0, 3.0]))
    assert math.isclose(spectra["b0"].negative_mass, 1 / 4)
    assert math.isclose(spectra["b0"].effective_rank, 16 / 6)
    assert math.isclose(spectra["b1"].effective_rank, 4.0)
    assert math.isclose(spectra["b2"].effective_rank, 1.0)
    assert math.isclose(spectra.heterogeneity().negative_mass, 1 / 27)
    assert spectra["b0"].top.tolist() == pytest.approx([2.0, 1.0, -1.0])
    assert spectra["b0"].bottom.tolist() == pytest.approx([-1.0, 1.0, 2.0])
    row = spectra.to_rows()[0]
    assert (row["block"], row["size"], row["exact"], row["products"]) == ("b0", 3, True, 3)
    assert row["largest"] == pytest.approx(2.0)
    assert row["trace"] == pytest.approx(2.0)
    assert repr(spectra) == "BlockSpectra(3 blocks, 3 exact, 0 zero, products=11)"


def test_one_block_differs_from_none():
    found = block_spectra(diagonal_blocks([1.0, 2.0])).heterogeneity()
    assert (found.js_divergence_mean, found.js_divergence_max, found.most_different, found.scale_ratio) == (
        0.0,
        0.0,
        None,
        1.0,
    )


def test_another_operator_of_the_same_objective(mlp):
    objective = objective_of(mlp)
    two = torch.full((objective.num_parameters,), 2.0, dtype=torch.float64)
    halved = PreconditionedOperator(Hessian(objective), two)
    plain, half = (block_spectra(objective, "4*", operator=op) for op in (None, halved))
    torch.testing.assert_close(half["4"].eigenvalues, plain["4"].eigenvalues / 2, **ROUNDING)
    scaled = block_spectra(0.5 * Hessian(objective), "4*")
    torch.testing.assert_close(scaled["4"].eigenvalues, half["4"].eigenvalues, **ROUNDING)
    assert "4.neuron0" in block_spectra(Hessian(objective), "neuron"), "an operator of an objective knows its modules"


def test_overlapping_blocks_are_fine_for_spectra():
    op = diagonal_blocks([1.0, 2.0], [3.0])
    blocks = partition(op, {"first": "b0", "all": "*"}, overlap=True)
    spectra = block_spectra(op, blocks)
    assert spectra["all"].eigenvalues.tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_a_missed_tolerance_is_said_once_and_kept():
    rng = torch.Generator().manual_seed(5)
    op = diagonal_blocks(*(torch.randn(60, generator=rng).tolist() for _ in range(2)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectra = block_spectra(op, dense_limit=0, num_top=1, tol=1e-8, max_products=4, num_steps=5, num_probes=2)
    assert [w.category for w in caught] == [NotConvergedWarning]
    assert "2 of 2 blocks missed tol=1e-08 (b0, b1)" in str(caught[0].message)
    assert not spectra.converged
    assert float(spectra["b0"].top_residuals[0]) > 1e-8


def test_the_same_seed_gives_the_same_numbers(mlp):
    runs = [
        block_spectra(objective_of(mlp), "layer", dense_limit=0, num_steps=8, num_probes=2, seed=s) for s in (1, 1, 2)
    ]
    traces = [[s.trace.estimate for s in run.values()] for run in runs]
    assert traces[0] == traces[1] != traces[2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op: block_spectra(op, num_top=0), ValueError, "`num_top` is 0"),
        (lambda op: block_spectra(op, dense_limit=-1), ValueError, "`dense_limit` is -1"),
        (lambda op: block_spectra(op, "b7"), ValueError, "'b7' is none of parameter.*'b0'"),
        (lambda op: block_spectra(op, operator=3), TypeError, "`operator` is a int"),
        (lambda op: block_spectra(3), TypeError, "`objective` is a int"),
        (lambda op: block_spectra(DenseOperator(torch.eye(3))), ValueError, "no parameter names"),
        (lambda op: block_spectra(op, partition(nn.Linear(2, 2))), ValueError, "divides other parameters"),
        (lambda op: block_spectra(op)["b01"], KeyError, r"no block .*b01.*; near it: .*b0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(diagonal_blocks([1.0, 2.0], [3.0]))


def test_a_product_that_is_not_finite_names_the_block():
    class Broken(LinearOperator):
        def matmat(self, V):
            return V * torch.tensor([1.0, math.nan]).unsqueeze(1)

    op = Broken(2, layout=Layout(("good", "bad"), (torch.Size([1]), torch.Size([1]))))
    with pytest.raises(ValueError, match=r"block 'bad' .* NaN"):
        block_spectra(op)
