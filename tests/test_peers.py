"""The harness that compares tools: true errors, who met the tolerance, ratios and tables. Without any peer."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import peers
from peer_jobs import report
from peer_jobs.cases import RECIPES, Case
from peer_jobs.jobs import JOBS, top_job
from peer_jobs.measure import Outcome, Rules, Sample, Stopwatch, contest
from peer_jobs.networks import mlp
from peer_jobs.reference import SPARE, Exact, eigenvalue_error, eigenvalue_reference, flat, relative_error
from peer_jobs.tools import find_tools, toy_tool

RULES = Rules(rounds=2, seconds=10, limit=1e6)


def toy(batches=1):
    torch.manual_seed(0)
    model = mlp((6, 5, 4), nn.Tanh)
    data = [(torch.randn(12, 6), torch.randint(0, 4, (12,))) for _ in range(batches)]
    return Case("toy", model, nn.CrossEntropyLoss(), data)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Times mean nothing here."""
    monkeypatch.setattr("peer_jobs.measure.SHORTEST", 1e-3)
    monkeypatch.setattr("peer_jobs.measure.gc.collect", lambda: None)


_dense: dict[str, torch.Tensor] = {}


def dense(case):
    """The float64 Hessian [n, n] by torch's own nested Jacobians."""
    key = case.double().fingerprint()
    if key not in _dense:
        _dense[key] = nested_jacobians(case.double())
    return _dense[key]


def nested_jacobians(case):
    shapes = [p.shape for p in case.parameters]
    names = [name for name, _ in case.model.named_parameters()]

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        weights = {name: part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)}
        outputs = [torch.func.functional_call(case.model, weights, (x,)) for x, _ in case.batches]
        return sum(case.criterion(z, y) for z, (_, y) in zip(outputs, case.batches, strict=True)) / len(outputs)

    return torch.autograd.functional.hessian(loss, flat([p.detach() for p in case.parameters]))


@pytest.fixture(scope="module")
def spectrum():
    values = torch.linalg.eigvalsh(dense(toy()))
    return values[values.abs().argsort(descending=True)]


def exact_tool(name="exact", *, factor=1.0, ours=False):
    """Answers from the dense matrix, times a factor."""

    def hvp(case, v):
        H = dense(case).float() * factor
        return lambda: H @ v

    def top(case, k, tol, seed, stopwatch):
        values = torch.linalg.eigvalsh(dense(case))
        return values[values.abs().argsort(descending=True)][:k] * factor, 7

    return toy_tool(name, ours=ours, hvp=hvp, top=top)


def test_reference_products_are_those_of_the_dense_matrix():
    case = toy(batches=2)
    H, v = dense(case), torch.randn(case.num_parameters)
    exact = Exact(case)
    assert relative_error(exact.hvp(v), H @ v.double()) < 1e-12
    of_blocks, start = torch.zeros(len(v), dtype=torch.float64), 0
    for p in case.parameters:
        part = slice(start, start := start + p.numel())
        of_blocks[part] = H[part, part] @ v[part].double()
    assert relative_error(exact.blocks(v), of_blocks) < 1e-12


def test_reference_gauss_newton_product_is_that_of_the_jacobian():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    case = Case("linear", nn.Linear(3, 2), nn.MSELoss(), [(x, y)])
    # Linear in its weights: the Gauss-Newton matrix is the Hessian.
    v = torch.randn(case.num_parameters)
    exact = Exact(case)
    assert relative_error(exact.ggn(v), exact.hvp(v)) < 1e-12
    bent = Case("bent", nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.MSELoss(), [(x, y)]).double()
    outputs = bent.model(bent.batches[0][0]).flatten()
    rows = [flat(torch.autograd.grad(z, bent.parameters, retain_graph=True)) for z in outputs]
    J = torch.stack(rows)
    assert relative_error(Exact(bent).ggn(v), J.T @ (J @ v.double()) * 2 / len(outputs)) < 1e-12


def test_reference_eigenvalues_are_the_dense_ones_and_are_kept(tmp_path, spectrum, monkeypatch):
    found = eigenvalue_reference(toy(), 10, tmp_path)
    assert len(found) == 10 + SPARE
    assert (found - spectrum[: 10 + SPARE]).abs().max() < 1e-9 * spectrum[0].abs()
    monkeypatch.setattr("peer_jobs.reference.by_scipy", None)
    assert torch.equal(eigenvalue_reference(toy(), 10, tmp_path), found)
    other = toy()
    with torch.no_grad():
        other.parameters[0][0, 0] += 1
    with pytest.raises(TypeError):  # other weights have another reference
        eigenvalue_reference(other, 10, tmp_path)


def test_references_that_disagree_certify_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("peer_jobs.reference.by_sharpscope", lambda case, count: torch.ones(count))
    with pytest.raises(RuntimeError, match="differ by"):
        eigenvalue_reference(toy(), 10, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ([4.0, -3.0], 0.0),
        ([-3.0, 4.0], 0.0),
        ([4.0, -2.8], 0.05),
        ([4.0, 3.0], 0.25),  # no eigenvalue at 3: the nearest that is free is 2
        ([4.0, 2.0], 0.25),  # -3 was passed over
        ([4.0, 4.0], 0.5),  # one eigenvalue, given twice: 4 and 2 are nearest
        ([4.0, math.nan], math.inf),
        ([], math.inf),
    ],
)
def test_error_of_eigenvalues(found, error):
    exact = torch.tensor([4.0, -3.0, 2.0, 1.0], dtype=torch.float64)
    assert eigenvalue_error(torch.tensor(found), exact) == pytest.approx(error, abs=1e-7)


def test_values_of_equal_modulus_may_change_places():
    exact = torch.tensor([4.0, 1.0, -0.9999, 0.5], dtype=torch.float64)
    assert eigenvalue_error(torch.tensor([4.0, -0.9999]), exact) < 1e-4


def test_wrong_values_are_marked_and_do_not_count_as_best_peer(tmp_path):
    ours, honest, wrong = exact_tool("ours", ours=True), exact_tool("honest"), exact_tool("wrong", factor=1.01)
    tools = [ours, honest, wrong, toy_tool("absent")]
    columns = {"toy": top_job(2, 1e-3).run(toy(), tools, RULES, tmp_path)}
    outcomes = columns["toy"]
    assert [outcomes[name].met for name in ("ours", "honest", "wrong")] == [2, 2, 0]
    assert outcomes["wrong"].samples[0].error == pytest.approx(0.01, rel=1e-5)
    assert outcomes["honest"].samples[0].products == 7
    found = report.ratios(columns, tools)["ours"]["every round"]
    assert found["peers"] == {"toy": "honest"}
    assert found["geometric mean"] == pytest.approx(found["ratios"]["toy"])
    marks = []
    lines = report.table("gradients", columns, tools, marks)
    assert len(lines) == 5  # what a tool does not offer has no row
    assert "✗ 0/2, error 1e-02" in lines[-1]
    assert "✗" not in "".join(lines[:-1])


def test_products_are_judged_against_float64(tmp_path):
    tools = [exact_tool("ours", ours=True), exact_tool("wrong", factor=1.002)]
    outcomes = JOBS["hvp"].run(toy(), tools, RULES, tmp_path)
    assert outcomes["ours"].met_always()
    assert outcomes["wrong"].met == 0
    assert outcomes["wrong"].samples[0].error == pytest.approx(0.002, rel=1e-3)
    assert report.best_peer(outcomes, tools, always=True) is None
    assert report.ratio(outcomes, "ours", None) is None


def test_a_tool_that_fails_leaves_its_error_and_the_others_go_on(tmp_path):
    def hvp(case, v):
        raise ArithmeticError("no such product\nsecond line")

    tools = [exact_tool("ours", ours=True), toy_tool("broken", hvp=hvp)]
    columns = {"toy": JOBS["hvp"].run(toy(), tools, RULES, tmp_path)}
    assert len(columns["toy"]["ours"].samples) == 2
    marks = []
    assert "fails (1)" in report.table("gradients", columns, tools, marks)[-1]
    assert marks == ["ArithmeticError: no such product"]


def test_only_what_follows_a_restart_is_counted_and_long_runs_end():
    def burn(seconds):
        watch = Stopwatch()
        while watch.read()[0] < seconds:
            pass

    def grown():
        def run(number, stopwatch):
            burn(0.1)
            stopwatch.restart()
            burn(0.01)

        return run

    def endless():
        return lambda number, stopwatch: burn(60)

    outcomes = contest(
        {"grown": grown, "endless": endless},
        lambda: burn(0.01),
        lambda result: (0.0, None),
        0.0,
        Rules(rounds=2, seconds=10, limit=20),
    )
    assert all(sample.cpu < 0.08 for sample in outcomes["grown"].samples)
    assert report.cell(outcomes["endless"], []) == "more than 20"
    assert not outcomes["endless"].met_always()


def test_quantiles_and_who_met_mostly():
    samples = [Sample(g, 0, 0, error) for g, error in ((1.0, 0.0), (2.0, 0.0), (9.0, 1.0))]
    outcome = Outcome(samples, tolerance=0.5)
    assert outcome.quantile(0.5) == 2.0
    assert outcome.met_mostly()
    assert not outcome.met_always()
    assert not Outcome([Sample(1, 0, 0, math.nan)], tolerance=1).met_mostly()
    assert not Outcome([], tolerance=1).met_always()
    assert report.cell(outcome, []) == "2.00 [1.50, 5.50] ✗ 2/3, error 1e+00"


def test_whole_report(tmp_path):
    tools = [exact_tool("ours", ours=True), exact_tool("peer"), toy_tool("absent")]
    columns = {"toy": JOBS["hvp"].run(toy(), tools, RULES, tmp_path)}
    facts = report.provenance(1, "quick", tools, {"gone_tool": "ImportError: no module"})
    models = {"toy": {"about": "a toy", "parameters": 59, "examples": 12, "gradient_seconds": 1e-3}}
    scales = {"parameters": ("By parameters", columns)}
    text = report.markdown(facts, models, {"hvp": columns}, scales, tools)
    for expected in ("One Hessian-vector product", "(peer)", "gone_tool", "By parameters", "| toy | 59 | 12 | 1.0 |"):
        assert expected in text
    columns["toy"]["absent"] = Outcome([Sample(1, 1, 1, math.inf)])
    record = json.loads(report.as_json(facts, models, {"hvp": columns}, scales, tools), parse_constant=pytest.fail)
    assert record["jobs"]["hvp"]["outcomes"]["toy"]["absent"]["samples"][0]["error"] is None
    outcome = record["jobs"]["hvp"]["outcomes"]["toy"]["peer"]
    assert outcome["met"] == 2
    assert {"cpu", "wall", "gradients", "error"} <= set(outcome["samples"][0])
    assert record["provenance"]["torch"] == torch.__version__


def test_sharpscope_is_always_found_and_limits_cover_the_jobs():
    tools, missing = find_tools()
    assert tools[0].name == "sharpscope"
    assert tools[0].ours
    assert len(tools) + len(missing) >= 6
    assert set(peers.QUICK) == set(peers.FULL) == set(JOBS)
    with pytest.raises(SystemExit, match="choose among"):
        peers.chosen("hvp,nothing", JOBS, "jobs")
    assert list(peers.chosen("ggn,hvp", JOBS, "jobs")) == ["ggn", "hvp"]


def test_batches_hold_the_same_examples():
    case = toy(batches=1)
    split = case.in_batches(4)
    assert len(split.batches) == 4
    whole, parts = flat(case.gradient()), flat(split.gradient())
    assert relative_error(parts, whole) < 1e-5
    assert torch.equal(case.part(4).batches[0][0], case.batches[0][0][:3])
    with pytest.raises(ValueError, match="do not divide"):
        case.in_batches(5)


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_small_and_twice_differentiable(name):
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = recipe.build().eval()
    case = Case(name, model, recipe.criterion, [recipe.draw(2, 0)])
    assert 1e5 < case.num_parameters < 1.5e6
    v = torch.randn(case.num_parameters)
    assert float(Exact(case).hvp(v).norm()) > 0
    assert torch.equal(recipe.draw(2, 0)[0], recipe.draw(2, 0)[0])
