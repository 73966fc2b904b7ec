"""One pass serves all statistics, within the memory it is given; what does not fit is sketched, with a stated error."""

import math

import pytest
import torch
from sharpscope import Objective, per_example_statistics
from sharpscope.landscape.memory import InsufficientMemory
from sharpscope.landscape.peak_memory import peak_bytes
from sharpscope.landscape.per_example_rows import GradientRows
from torch import nn

MB = 1_000_000


def dense():
    model = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
    return model, (torch.randn(128, 20), torch.randint(0, 5, (128,)))


def convolutional():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 16, 10)),
    )
    return model, (torch.randn(48, 3, 8, 8), torch.randint(0, 10, (48,)))


def made(build):
    torch.manual_seed(0)
    model, data = build()
    return Objective.supervised(model, nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize(("collect", "chunks"), [("all", 1), ("sums", 1), ("all", 4)])
def test_one_pass_serves_all(collect, chunks, make_problem, monkeypatch):
    model, data = make_problem("transformer")
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, chunk_size=math.ceil(10 / chunks))
    per_example_statistics(objective, collect=collect)  # one more example of each kind of batch is verified, once
    forward, backward, grad = [], [], torch.autograd.grad
    hook = model.register_forward_hook(lambda *a: forward.append(1))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or grad(*a, **k))
    statistics = per_example_statistics(objective, collect=collect)
    assert (len(forward), len(backward)) == (chunks, chunks)
    statistics.snr()
    statistics.snr("layer", "mean")
    statistics.snr("parameter", "second_moment")
    statistics.noise_scale()
    if collect == "all":
        statistics.alignment()
        statistics.covariance_product(statistics.mean)
        with pytest.raises(ValueError, match="at least 16 examples"):
            statistics.tail_index()
    assert (len(forward), len(backward)) == (chunks, chunks)
    hook.remove()


@pytest.mark.parametrize(
    ("build", "method", "budgets"),
    [
        (dense, "auto", (1 * MB, 3 * MB)),
        (convolutional, "auto", (0.5 * MB, 1 * MB, 4 * MB)),
        (convolutional, "vmap", (0.5 * MB, 4 * MB)),
    ],
)
def test_memory_stays_under_the_budget(build, method, budgets):
    objective = made(build)
    expected = per_example_statistics(objective, method=method)
    if build is convolutional:
        free = peak_bytes(lambda: per_example_statistics(objective, method=method), objective.device).peak
        assert free > 2 * budgets[0]
    for budget in map(int, budgets):
        found = []

        def run(budget=budget, found=found):
            found.append(per_example_statistics(objective, memory_budget=budget, method=method))

        assert peak_bytes(run, objective.device).peak <= budget
        torch.testing.assert_close(found[0].mean, expected.mean, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[0].second_moment, expected.second_moment, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[0].norms, expected.norms, rtol=1e-4, atol=1e-7)
        assert found[0].noise_scale().estimate == pytest.approx(expected.noise_scale().estimate, rel=1e-3)


def test_memory_of_a_transformer_stays_under_the_budget(make_problem):
    model, data = make_problem("transformer")
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    for budget in (100_000, 300_000):
        assert (
            peak_bytes(lambda b=budget: per_example_statistics(objective, memory_budget=b), objective.device).peak
            <= budget
        )


def test_a_budget_that_holds_nothing_is_refused():
    objective = made(dense)
    with pytest.raises(InsufficientMemory, match="`memory_budget` is 1000 bytes; .* need at least") as refused:
        per_example_statistics(objective, memory_budget=1000)
    least = int(str(refused.value).split("at least ")[1].split(":")[0])
    with pytest.raises(InsufficientMemory):
        per_example_statistics(objective, memory_budget=least - 1)
    found = []
    assert (
        peak_bytes(lambda: found.append(per_example_statistics(objective, memory_budget=least)), objective.device).peak
        <= least
    )
    assert found[0].sketched


def test_batches_that_may_not_be_cut_are_refused(mlp):
    model, (x, y) = mlp
    labels = torch.stack([y, torch.where(torch.arange(70) % 3 == 0, y, -100)], 1)
    skipping = lambda m, b: nn.functional.cross_entropy(m(b[0]).unsqueeze(2).expand(-1, -1, 2), b[1])
    centred = lambda m, b: nn.functional.cross_entropy(m(b[0] - b[0].mean(0)), b[1][:, 0])
    for loss in (skipping, centred):
        with pytest.raises(ValueError, match="`memory_budget` is 10000000, for which batches would have to be cut"):
            per_example_statistics(Objective(model, loss, (x, labels)), memory_budget=10 * MB)
    plain = Objective(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), (x, y))
    found, expected = per_example_statistics(plain, memory_budget=MB), per_example_statistics(plain)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-10, atol=1e-13)


def test_outer_products_are_kept_as_factors():
    """A dense layer with one row per example: exact where the gradients themselves are far larger than the budget."""
    objective = made(dense)
    rows_take = 128 * objective.num_parameters * 4
    statistics = per_example_statistics(objective, memory_budget=rows_take // 2)
    assert not statistics.sketched
    exact = per_example_statistics(objective).inner_products()
    torch.testing.assert_close(statistics.inner_products(), exact, rtol=1e-4, atol=1e-7)


def test_sketch_is_unbiased_with_the_stated_variance():
    """Over 400 sketches: mean within its error, variance (‖a‖² ‖b‖² + (a · b)²) / s at most, and not far below."""
    torch.manual_seed(0)
    theta = [torch.zeros(40), torch.zeros(7), torch.zeros(60)]
    a, b = torch.randn(107, dtype=torch.float64), torch.randn(107, dtype=torch.float64)
    b += 0.5 * a
    found, stated = [], []
    for seed in range(400):
        rows = GradientRows(theta, torch.float64, 2, 900, seed)
        first = 0
        for k, t in enumerate(theta):
            rows.put(k, torch.stack([a, b])[:, first : first + t.numel()], torch.tensor([0, 1]))
            first += t.numel()
        rows.close(2)
        assert not rows.exact
        found.append(rows.inner_products(slice(None), slice(None)))
        stated.append(rows.variances(slice(None), slice(None)))
        along = rows.times(a)
        assert float(along[0]) == pytest.approx(float(found[-1][0, 0]))
        assert float(along[1]) == pytest.approx(float(found[-1][1, 0]))
    products, variance = torch.stack(found)[:, 0, 1], float(torch.stack(stated)[:, 0, 1].mean())
    assert abs(float(products.mean() - a @ b)) < 3.5 * float(products.std()) / 20
    assert 0.6 < float(products.var()) / variance < 1.2  # var of 400 has 7 %; what `stated` knows of a · b, 10 %


def test_sketched_alignment_lies_within_its_stated_errors():
    objective = made(convolutional)
    exact = per_example_statistics(objective)
    truth = exact.alignment()
    inner, norms = exact.inner_products(), exact.norms.double()
    off = ~torch.eye(48, dtype=torch.bool)
    for seed in range(4):
        statistics = per_example_statistics(objective, memory_budget=int(0.6 * MB), seed=seed)
        assert statistics.sketched
        found = statistics.alignment()
        wrong = (statistics.inner_products() - inner) / norms.outer(norms)
        assert float(wrong[off].square().mean()) ** 0.5 < 1.1 * found.cosine_error
        assert found.cosine_error < 0.5
        assert abs(found.mean_cosine - truth.mean_cosine) < 3 * found.mean_cosine_stderr
        assert abs(found.negative_share - truth.negative_share) <= found.undecided_share
        assert abs(found.confusion - truth.confusion) <= found.confusion_error
        assert found.diversity == pytest.approx(truth.diversity, rel=1e-4)
        assert statistics.noise_scale().stderr == pytest.approx(exact.noise_scale().stderr, rel=0.5)
        tails = statistics.tail_index(columns=4)
        assert tails.whole.low <= exact.tail_index(columns=4, seed=1).whole.high
        with pytest.raises(ValueError, match="raise `memory_budget`"):
            assert statistics.gradients


def test_sketch_error_of_the_mean_cosine_is_seen_in_its_scatter():
    """Sixty sketches of one set of rows: the scatter of Σ c_i c_j g_i · g_j is what is stated, but for a fifth."""
    torch.manual_seed(1)
    G = torch.randn(20, 300, dtype=torch.float64) + 0.2
    sums, stated = [], []
    for seed in range(60):
        rows = GradientRows([torch.zeros(300)], torch.float64, 20, 20 * 24 * 40, seed)
        rows.put(0, G, torch.arange(20))
        rows.close(20)
        K = rows.inner_products(slice(None), slice(None))
        sums.append(float(K.sum() - K.trace()))
        stated.append(rows.pair_sum_error(torch.ones(20)))
    sums = torch.tensor(sums)
    assert 0.6 < float(sums.std()) / (sum(stated) / 60) < 1.25
    assert abs(float(sums.mean()) - float((G @ G.T).sum() - G.square().sum())) < 3.5 * float(sums.std()) / 60**0.5


@pytest.mark.parametrize("memory", [10**6, 400])
def test_factors_that_turn_into_rows(memory):
    """A layer that sees one row per example in one batch and several in the next."""
    torch.manual_seed(0)
    left, right, more = torch.randn(3, 6).double(), torch.randn(3, 5).double(), torch.randn(2, 30).double()
    rows = GradientRows([torch.zeros(30)], torch.float64, 5, memory)
    assert rows.put_outer(0, left, right, torch.arange(3)) == (memory == 10**6)
    if memory == 400:
        rows.put(0, (left[:, :, None] * right[:, None]).flatten(1), torch.arange(3))
    rows.put(0, more, torch.tensor([3, 4]))
    rows.close(5)
    G = torch.cat([(left[:, :, None] * right[:, None]).flatten(1), more])
    assert rows.exact == (memory == 10**6)
    if rows.exact:
        torch.testing.assert_close(rows.inner_products(slice(None), slice(None)), G @ G.T)
        torch.testing.assert_close(rows.rows(slice(1, 4)), G[1:4])
    torch.testing.assert_close(rows.columns(0, 1), G[:, rows._drawn(0, 1)])


def test_sequences_of_one_and_of_several_rows(make_problem):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]).mean(1), b[1])
    batches = [(torch.randn(4, t, 6).double(), torch.randint(0, 3, (4,))) for t in (1, 5, 1)]
    objective = Objective(model, loss, batches, count=lambda b: len(b[1]))
    found, expected = per_example_statistics(objective), per_example_statistics(objective, method="loop")
    assert found.method == "factors"
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.inner_products(), expected.inner_products(), rtol=1e-10, atol=1e-13)
