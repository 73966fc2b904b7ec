"""Plans: products, memory, refusals. Seconds are checked by the benchmarks."""

import inspect

import pytest
import torch
from sharpscope import (
    Hessian,
    Objective,
    block_spectra,
    diagonal,
    frobenius_norm,
    solve,
    spectral_density,
    top_eigenvalues,
    trace,
)
from sharpscope.hessian import lockstep, planners
from sharpscope.hessian.operator import DiagonalOperator
from sharpscope.landscape import memory
from sharpscope.landscape.memory import InsufficientMemory
from sharpscope.landscape.peak_memory import peak_bytes
from torch import nn

CPU = torch.device("cpu")
ALGORITHMS = [top_eigenvalues, spectral_density, trace, frobenius_norm, diagonal, solve, block_spectra]


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 10))
    x = torch.randn(512, 64)
    data = x, (x @ torch.randn(64, 10)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    objective.loss()
    return objective


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_plan_takes_the_arguments_of_its_algorithm(algorithm):
    planned, called = inspect.signature(algorithm.plan), inspect.signature(algorithm)
    assert planned.parameters == called.parameters
    with pytest.raises(TypeError, match="colour"):
        algorithm.plan(*[None] * sum(p.default is p.empty for p in called.parameters.values()), colour="red")


@pytest.mark.parametrize(
    ("algorithm", "options", "products"),
    [
        (spectral_density, {"num_steps": 10, "num_probes": 3}, 30),
        (trace, {"num_probes": 20}, 20),
        (trace, {"num_probes": 20, "method": "xtrace"}, 20),
        (trace, {"num_probes": 60, "method": "xtrace"}, 60),
        (trace, {"num_probes": 60, "method": "hutch++"}, 60),
        (frobenius_norm, {"num_probes": 20}, 20),
        (diagonal, {"num_probes": 20}, 20),
    ],
)
def test_products_and_memory_are_as_planned(objective, algorithm, options, products):
    plan = algorithm.plan(Hessian(objective), **options)
    op = Hessian(objective)
    made = []
    matmat = op.matmat
    op.matmat = lambda V: made.append(V.shape[1]) or matmat(V)
    peak = peak_bytes(lambda: algorithm(op, **options), CPU).peak
    assert plan.products == products == sum(made)
    assert plan.most_products is None
    assert plan.fits
    assert plan.bytes == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("num", [1, 6])
def test_eigenvalues_on_a_part_of_the_examples_foretell_the_products(objective, num):
    # A basis so short that all of it is written to, which is when the memory of a CPU is taken.
    options = {"basis_size": num + 6}
    plan = top_eigenvalues.plan(Hessian(objective), num, **options)
    op = Hessian(objective)
    found = []
    peak = peak_bytes(lambda: found.append(top_eigenvalues(op, num, **options)), CPU).peak
    assert plan.products == pytest.approx(found[0].products, rel=0.5)
    assert found[0].products <= plan.most_products
    assert plan.bytes == pytest.approx(peak, rel=0.15)


def test_block_spectra_count_small_blocks_exactly(objective):
    plan = block_spectra.plan(objective, "parameter", dense_limit=300, num_steps=10, num_probes=2, num_top=1)
    small = [256, 128, 10]
    large = 64 * 256, 256 * 128, 128 * 10
    search = planners.PROVED_PRODUCTS_PER_PAIR * 2
    assert plan.products == sum(small) + len(large) * (20 + search)
    assert plan.spent >= 6


def test_a_plan_that_does_not_fit_says_what_would(objective, monkeypatch):
    # Room for the products, and for a few vectors.
    needed = trace.plan(Hessian(objective), num_probes=2).bytes
    monkeypatch.setattr(planners, "available_bytes", lambda device: needed)
    plan = trace.plan(Hessian(objective), method="xtrace", num_probes=500)
    assert not plan.fits
    assert "does NOT fit" in str(plan)
    assert "num_probes" in str(plan)


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch):
    op = DiagonalOperator(torch.linspace(1, 2, 100_000))
    room = 30 * 400_000
    for module in (memory, lockstep):
        monkeypatch.setattr(module, "available_bytes", lambda device: room)
    with pytest.raises(InsufficientMemory, match=r"22 steps would fit.*num_steps.*float16"):
        spectral_density(op, num_steps=100, num_probes=1, basis_dtype=torch.float32)
    assert spectral_density(op, num_steps=22, num_probes=1, basis_dtype=torch.float32).products == 22
    with pytest.raises(InsufficientMemory, match="spectral_density`, which need products"):
        op.dense()


@pytest.mark.parametrize(
    ("algorithm", "options", "named"),
    [
        (trace, {"num_probes": -3}, "num_probes"),
        (trace, {"method": "x"}, "method"),
        (diagonal, {"num_probes": 0}, "num_probes"),
        (frobenius_norm, {"num_probes": 0}, "num_probes"),
        (spectral_density, {"num_steps": -1}, "num_steps"),
        (spectral_density, {"deflate": -1}, "deflate"),
        (spectral_density, {"deflate": 10**6}, "deflate"),
        (spectral_density, {"basis_dtype": "half"}, "basis_dtype"),
    ],
)
@pytest.mark.parametrize("n", [161, 4401])
def test_a_plan_and_its_algorithm_refuse_the_same(algorithm, options, named, n):
    op = DiagonalOperator(torch.linspace(1, 2, n))
    for call in (algorithm, algorithm.plan):
        with pytest.raises((ValueError, TypeError), match=f"`{named}`"):
            call(op, **options)


def test_a_budget_is_called_one(objective):
    hessian = Hessian(objective)
    assert "at most 2000 products" in str(spectral_density.plan(hessian, tol=1e-2))
    assert "at most 1000 products" in str(solve.plan(hessian, torch.ones(hessian.shape[0]), damping=3.0))
