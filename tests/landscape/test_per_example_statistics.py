"""Signal to noise, noise scale, alignment, covariance and tails against loops over the examples."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from sharpscope import GradientCovariance, Hessian, Objective, partition, per_example_statistics
from sharpscope.landscape.per_example_noise import noise_scale_of
from torch import nn

CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def looped(model, data):
    """g_i [N, n], one backward pass per example; every example weighs the same."""
    x, y = data
    rows = []
    for i in range(len(x)):
        found = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def moments(G):
    """Mean and unbiased variance by entry, summed example by example."""
    N = len(G)
    mean = sum(g / N for g in G)
    return mean, sum((g - mean) ** 2 for g in G) / (N - 1)


@pytest.fixture
def found(problem):
    model, data = problem
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    return model, objective, per_example_statistics(objective), looped(model, data)


def test_variance_and_signal_to_noise(found):
    _, objective, statistics, G = found
    assert statistics.method == "factors"
    assert not statistics.sketched
    mean, variance = moments(G)
    torch.testing.assert_close(statistics.gradients, G, rtol=1e-10, atol=1e-10 * float(G.abs().max()))
    torch.testing.assert_close(statistics.variance(), variance, rtol=1e-10, atol=1e-10 * float(variance.max()))
    ratios = torch.where(variance > 0, mean**2 / variance, 0.0)
    used = (G != 0).any(0)
    # Ratios of the others are rounding; so are all gradients of the biases of keys, which softmax does not see.
    seen = (mean.abs() > 1e-4 * variance.sqrt()) & (variance > 1e-24 * variance.max())
    torch.testing.assert_close(statistics.snr("element")[seen], ratios[seen], rtol=1e-10, atol=0)
    assert statistics.snr() == pytest.approx(float(sum(mean**2) / sum(variance)), rel=1e-10)
    means = statistics.snr("parameter", "mean")
    for name, at in zip(objective.layout.names, torch.arange(len(mean)).split(objective.layout.sizes), strict=True):
        if "qkv.bias" not in name:
            expected = float(sum(ratios[at][used[at]]) / used[at].sum())
            assert means[name] == pytest.approx(expected, rel=1e-10)
    if not any("qkv" in name for name in means):
        assert statistics.snr(definition="mean") == pytest.approx(float(sum(ratios[used]) / used.sum()), rel=1e-10)
    spread = math.sqrt(float(((mean - mean.mean()) ** 2).sum()) / (len(mean) - 1))
    assert statistics.snr(definition="spatial") == pytest.approx(float(mean.norm()) / (spread + 1e-8), rel=1e-10)
    for by in ("parameter", "layer", "neuron"):
        divided = partition(objective, by)
        blocks = statistics.snr(by=divided if by == "neuron" else by)
        assert list(blocks) == list(divided)
        spatial = statistics.snr(by=divided, definition="spatial", eps=0.0)
        for name, block in divided.items():
            at = block.indices(objective.layout)
            assert blocks[name] == pytest.approx(float(sum(mean[at] ** 2) / sum(variance[at])), rel=1e-10)
            if len(at) > 2:
                assert spatial[name] == pytest.approx(float(mean[at].norm() / mean[at].std()), rel=1e-10)


def test_ratio_of_second_moments(found):
    model, _, statistics, G = found
    sizes, rows = [p.numel() for p in model.parameters()], statistics.snr("parameter", "second_moment", dims=(1,))
    whole = statistics.snr("parameter", "second_moment")
    pieces = (G**2).mean(0).split(sizes)
    for (name, p), v in zip(model.named_parameters(), pieces, strict=True):
        v = v.view(p.shape)
        ratio = float(v.mean() ** 2 / ((v - v.mean()) ** 2).mean())
        assert whole[name] == pytest.approx(ratio, rel=1e-10)
        if p.ndim == 1:
            assert name not in rows
        elif p.ndim == 2:
            each = [float(r.mean() ** 2 / ((r - r.mean()) ** 2).mean()) for r in v]
            each = [e for e in each if math.isfinite(e)]
            assert rows[name] == pytest.approx(sum(each) / len(each), rel=1e-10)


def test_inner_products_covariance_and_noise_scale(found):
    _, objective, statistics, G = found
    N, n = G.shape
    gram = torch.stack([torch.stack([(a * b).sum() for b in G]) for a in G])
    torch.testing.assert_close(statistics.inner_products(), gram, rtol=1e-10, atol=1e-10 * float(gram.max()))
    V = torch.randn(n, 2, dtype=torch.float64)
    mean, variance = moments(G)
    expected = sum(
        torch.outer(g - mean, (g - mean) @ V) if V.ndim == 1 else (g - mean)[:, None] * ((g - mean) @ V) for g in G
    )
    expected = expected / (N - 1)
    torch.testing.assert_close(
        statistics.covariance_product(V), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max())
    )
    torch.testing.assert_close(
        statistics.covariance_product(V[:, 0]), expected[:, 0], rtol=1e-10, atol=1e-10 * float(expected.abs().max())
    )
    biased = GradientCovariance(objective) @ V
    torch.testing.assert_close(
        statistics.covariance_product(V), biased * N / (N - 1), rtol=1e-10, atol=1e-9 * float(biased.abs().max())
    )

    def scale(which):
        """From pairs: |G|² is the mean of g_i · g_j over i ≠ j."""
        K = gram[which][:, which]
        m = len(K)
        squared = float(K.sum() - K.trace()) / (m * (m - 1))
        trace = float(K.trace()) / m - squared
        return trace / squared if squared > 0 else math.inf, trace, squared

    noise = statistics.noise_scale()
    estimate, trace, squared = scale(range(N))
    assert noise.trace == pytest.approx(trace, rel=1e-10)
    assert noise.trace == pytest.approx(float(variance.sum()), rel=1e-10)
    assert noise.squared_norm == pytest.approx(squared, rel=1e-10, abs=1e-10 * trace)
    assert noise.estimate == pytest.approx(estimate, rel=1e-10)
    left_out = torch.tensor([scale([j for j in range(N) if j != i])[0] for i in range(N)])
    if bool(left_out.isfinite().all()):
        assert noise.stderr == pytest.approx(math.sqrt((N - 1) * float(left_out.var(correction=0))), rel=1e-4)
    assert noise.low <= noise.estimate <= noise.high
    cheap = per_example_statistics(objective, collect="sums").noise_scale()
    assert cheap.estimate == pytest.approx(noise.estimate, rel=1e-10)
    assert math.isnan(cheap.stderr)
    assert math.isnan(cheap.low)


def test_alignment(found):
    _, _, statistics, G = found
    N = len(G)

    def measured(rows):
        pairs = [(a, b) for a, b in itertools.permutations(rows, 2)]
        inner = [float(a @ b) for a, b in pairs]
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        diversity = sum(float(g @ g) for g in rows) / float(sum(rows) @ sum(rows))
        return sum(cosines) / len(pairs), diversity, sum(p < 0 for p in inner) / len(pairs), min(inner), min(cosines)

    alignment = statistics.alignment()
    cosine, diversity, share, least, least_cosine = measured(list(G))
    assert alignment.mean_cosine == pytest.approx(cosine, rel=1e-10)
    assert alignment.diversity == pytest.approx(diversity, rel=1e-10)
    assert alignment.negative_share == pytest.approx(share)
    assert alignment.confusion == pytest.approx(max(0.0, -least), rel=1e-10)
    assert alignment.least_cosine == pytest.approx(least_cosine, rel=1e-10)
    assert alignment.num_examples == N
    assert (alignment.cosine_error, alignment.undecided_share, alignment.confusion_error) == (0.0, 0.0, 0.0)
    if N > 12:
        return  # the jackknife by loops on the small problem only
    left_out = torch.tensor([measured([g for j, g in enumerate(G) if j != i])[:3] for i in range(N)])
    errors = ((N - 1) * left_out.var(0, correction=0)).sqrt().tolist()
    assert alignment.mean_cosine_stderr == pytest.approx(errors[0], rel=1e-5)
    assert alignment.diversity_stderr == pytest.approx(errors[1], rel=1e-5)
    assert alignment.negative_share_stderr == pytest.approx(errors[2], rel=1e-5)


def test_noise_scale_with_curvature():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(20, 3).double() + 1, torch.ones(20, dtype=torch.long)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    statistics, G, H = per_example_statistics(objective), looped(model, data), Hessian(objective).dense()
    K = G @ H @ G.T
    squared = float(K.sum() - K.trace()) / (20 * 19)
    trace = float(K.trace()) / 20 - squared
    found = statistics.noise_scale(Hessian(objective))
    assert (found.trace, found.squared_norm) == pytest.approx((trace, squared), rel=1e-10)
    plain, identity = statistics.noise_scale(), statistics.noise_scale(torch.eye(len(H), dtype=torch.float64))
    for name in ("estimate", "stderr", "trace", "squared_norm", "low", "high"):
        assert getattr(identity, name) == pytest.approx(getattr(plain, name), rel=1e-10)


class Slope(nn.Module):
    """Loss θ · x, so that an example's gradient is the example."""

    def __init__(self, n):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x):
        return x @ self.theta


def of_samples(x, **options):
    objective = Objective.supervised(Slope(x.shape[1]), lambda z, t: z.mean(), (x, x), check=False)
    return per_example_statistics(objective, **options)


@pytest.mark.parametrize(
    ("scale", "size", "low", "high"), [(4.0, 10, 0.935, 0.97), (60.0, 200, 0.935, 0.99), (1e9, 10, 0.98, 1.0)]
)
def test_intervals_cover_the_true_noise_scale(scale, size, low, high):
    """2000 draws of 40 Gaussian examples with |G| = 1, tr Σ = B: 95 % within three binomial deviations (1.5 %).

    Where the gradient is hardly told from 0, the jackknife's variance of |G|² is up to twice the true one and the
    interval too wide.
    """
    random = torch.Generator().manual_seed(0)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    covered, deviations, finite = 0, [], 0
    for _ in range(2000):
        x = torch.randn(40, size, generator=random, dtype=torch.float64) * math.sqrt(scale / size)
        x[:, 0] += 1
        mean = x.mean(0)
        noise = noise_scale_of(weights, x.square().sum(1), float(mean @ mean), x @ mean, 0.95)
        covered += noise.low <= scale <= noise.high
        finite += math.isfinite(noise.high)
        assert noise.low <= noise.estimate <= noise.high
        deviations.append(noise.trace - scale * noise.squared_norm)
    assert low <= covered / 2000 <= high
    assert (finite == 2000) == (scale == 4)
    # Both parts are unbiased: the mean of tr Σ − B |G|² is 0 within its error.
    spread = torch.tensor(deviations)
    assert abs(float(spread.mean())) < 3.5 * float(spread.std()) / math.sqrt(2000)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num", "chunk"), [(20, None), (300, None), (400, 7), (3000, None)])
def test_identical_examples_have_no_noise_that_is_resolved(num, chunk, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5)).to(kind)
    x, y = torch.randn(1, 30, dtype=kind).expand(num, 30), torch.randn(1, 5, dtype=kind).expand(num, 5)
    statistics = per_example_statistics(Objective.supervised(model, nn.MSELoss(), (x, y), chunk_size=chunk))
    noise = statistics.noise_scale()
    assert noise.trace >= 0
    assert noise.low == 0 <= noise.estimate <= noise.high <= 600 * torch.finfo(kind).eps
    moved = statistics.mean != 0
    assert bool(statistics.snr("element")[moved].isnan().all())
    assert bool((statistics.snr("element")[~moved] == 0).all())
    for definition in ("mean", "ratio"):
        assert math.isnan(statistics.snr(definition=definition))
        assert all(math.isnan(value) for value in statistics.snr("parameter", definition).values())


def test_variances_below_rounding_are_left_out_of_the_mean():
    """In float32 a column of spread 1e-4 about 1 has no variance left that is not rounding."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=random, dtype=torch.float64)
    x[:, 0], x[:, 1] = 1 + 1e-4 * x[:, 0], 1 + 0.1 * x[:, 1]
    model = Slope(6).float()
    objective = Objective.supervised(model, lambda z, t: z.mean(), (x.float(), x), check=False)
    ratios = x.mean(0).square() / x.var(0)
    found = per_example_statistics(objective)
    assert bool((found.snr("element").isnan() == torch.tensor([True] + 5 * [False])).all())
    assert found.snr(definition="mean") == pytest.approx(float(ratios[1:].mean()), rel=1e-3)
    exact = of_samples(x)
    torch.testing.assert_close(exact.snr("element"), ratios, rtol=1e-6, atol=0)
    assert exact.snr(definition="mean") == pytest.approx(float(ratios.mean()), rel=1e-6)


def test_an_indefinite_curvature_may_make_the_scale_negative():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=random, dtype=torch.float64) * torch.tensor([0.1, 1.0])
    x[:, 0] += 3
    H = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    noise = of_samples(x).noise_scale(H)
    assert noise.trace == pytest.approx(float(x[:, 0].var() - x[:, 1].var()))
    assert noise.low <= noise.estimate < 0 <= noise.high


def test_error_of_alignment_is_that_of_new_examples():
    random = torch.Generator().manual_seed(1)
    values, errors = [], []
    for _ in range(200):
        x = torch.randn(30, 8, generator=random, dtype=torch.float64)
        x[:, 0] += 1
        found = of_samples(x).alignment()
        values.append((found.mean_cosine, found.diversity, found.negative_share))
        errors.append((found.mean_cosine_stderr, found.diversity_stderr, found.negative_share_stderr))
    spread, stated = torch.tensor(values).std(0), torch.tensor(errors).square().mean(0).sqrt()
    assert bool(((stated / spread - 1).abs() < 0.25).all()), stated / spread


def test_closed_forms_of_alignment():
    equal = of_samples(torch.ones(5, 3).double()).alignment()
    assert (equal.mean_cosine, equal.negative_share, equal.confusion) == pytest.approx((1.0, 0.0, 0.0))
    assert equal.diversity == pytest.approx(1 / 5)
    orthogonal = of_samples(torch.eye(4).double()).alignment()
    assert orthogonal.mean_cosine == 0
    assert orthogonal.diversity == pytest.approx(1.0)
    x = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 3.0]]).double()
    opposed = of_samples(x).alignment()
    assert opposed.num_examples == 3
    assert opposed.negative_share == pytest.approx(1 / 3)
    assert opposed.mean_cosine == pytest.approx(-1 / 3)
    assert (opposed.confusion, opposed.least_cosine) == pytest.approx((2.0, -1.0))
    assert opposed.diversity == pytest.approx(14 / 10)


def test_tail_index_of_examples():
    """Cauchy gradients have tail index 1, Gaussian ones 2."""
    random = torch.Generator().manual_seed(2)
    gaussian = torch.randn(400, 12, generator=random, dtype=torch.float64)
    cauchy = gaussian / torch.randn(400, 12, generator=random, dtype=torch.float64)
    for x, alpha in ((gaussian, 2.0), (cauchy, 1.0)):
        found = of_samples(x).tail_index()
        assert found.whole.low <= alpha <= found.whole.high
        assert float(found) == found.parameters["theta"].estimate == pytest.approx(alpha, abs=0.15)
    scaled = cauchy * torch.logspace(-3, 3, 12, dtype=torch.float64)
    assert float(of_samples(scaled).tail_index()) == pytest.approx(float(of_samples(cauchy).tail_index()), rel=1e-10)
    assert len(of_samples(cauchy).tail_index(columns=5, method="hill").whole.columns) == 5
    for options in ({"columns": 2.5}, {"columns": 0}, {"size": 2.5}, {"shuffles": 1.5}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
            of_samples(cauchy).tail_index(**options)


def test_tail_index_by_parameter(mlp):
    model, data = mlp
    model = nn.Sequential(model, nn.Linear(3, 3).double())
    model.spare = nn.Linear(2, 2).double()
    objective = Objective(model, lambda m, b: F.cross_entropy(m[1](m[0](b[0])), b[1]), data)
    statistics = per_example_statistics(objective)
    tails = statistics.tail_index()
    assert set(tails.skipped) == {"spare.weight", "spare.bias"}
    assert set(tails.parameters) | set(tails.skipped) == set(objective.layout.names)
    estimates = sorted(t.estimate for t in tails.parameters.values())
    assert estimates[len(estimates) // 2 - 1] <= tails.median <= estimates[len(estimates) // 2]


def test_sums_have_the_scatter_of_means(mlp):
    model, data = mlp
    mean = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    total = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(reduction="sum"), data))
    torch.testing.assert_close(mean.variance(), total.variance(), rtol=1e-10, atol=1e-15)
    assert mean.snr() == pytest.approx(total.snr(), rel=1e-10)
    a, b = mean.noise_scale(), total.noise_scale()
    assert (a.estimate, a.stderr, a.low, a.high) == pytest.approx((b.estimate, b.stderr, b.low, b.high), rel=1e-10)
    assert mean.alignment().mean_cosine == pytest.approx(total.alignment().mean_cosine, rel=1e-12)
    assert mean.alignment().diversity == pytest.approx(total.alignment().diversity, rel=1e-10)


def test_unequal_weights(mlp):
    """Σ p_i g_i g_iᵀ − ḡ ḡᵀ over 1 − Σ p_i², and its trace, with class weights as p."""
    model, (x, y) = mlp
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64))
    p = criterion.weight[y] / criterion.weight[y].sum()
    statistics, G = per_example_statistics(Objective.supervised(model, criterion, (x, y))), looped(model, (x, y))
    assert statistics.method == "factors"
    torch.testing.assert_close(statistics.gradients, G, rtol=1e-10, atol=1e-12)
    mean = p @ G
    C = ((G - mean).T * p) @ (G - mean) / (1 - p @ p)
    v = torch.randn(G.shape[1], dtype=torch.float64)
    torch.testing.assert_close(statistics.covariance_product(v), C @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(statistics.variance(), C.diagonal(), rtol=1e-10, atol=1e-14)
    noise = statistics.noise_scale()
    assert noise.trace == pytest.approx(float(C.trace()), rel=1e-10)
    assert noise.squared_norm == pytest.approx(float(mean @ mean - (p @ p) * C.trace()), rel=1e-10)
    expected = float((p**2 * (G**2).sum(1)).sum() / (mean @ mean))
    assert statistics.alignment().diversity == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("classes", [3, 150])
def test_label_smoothing_and_many_classes(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    x, y = torch.randn(12, 5).double(), torch.randint(0, classes, (12,))
    y[3] = -100
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(classes, dtype=torch.float64) + 0.5)
    statistics = per_example_statistics(Objective.supervised(model, criterion, (x, y)))
    assert statistics.method == "factors"
    kept = [i for i in range(12) if i != 3]
    rows = []
    for i in kept:
        found = torch.autograd.grad(criterion(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    G = torch.stack(rows)
    torch.testing.assert_close(statistics.gradients, G, **CLOSE)
    torch.testing.assert_close(statistics.inner_products(), G @ G.T, **CLOSE)
    whole = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    torch.testing.assert_close(statistics.mean, torch.cat([g.reshape(-1) for g in whole]), **CLOSE)


def test_one_example_and_two(mlp):
    model, (x, y) = mlp
    one = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), (x[:1], y[:1])))
    for function in (one.variance, one.snr, one.noise_scale, one.alignment):
        with pytest.raises(ValueError, match="at least two examples"):
            function()
    with pytest.raises(ValueError, match="at least two examples"):
        one.covariance_product(one.mean)
    with pytest.raises(ValueError, match="at least 16 examples"):
        one.tail_index()
    assert one.snr("parameter", "spatial")["0.weight"] > 0  # over entries: one gradient is enough
    two = per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), (x[:2], y[:2])))
    assert math.isnan(two.noise_scale().stderr)
    assert math.isnan(two.alignment().mean_cosine_stderr)


def test_noise_of_the_forward_pass_is_refused():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    data = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    with pytest.raises(ValueError, match="[Dd]ropout"):
        per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data, mode="train"))
    assert per_example_statistics(Objective.supervised(model, nn.CrossEntropyLoss(), data)).alignment()


def test_options_that_do_not_exist(mlp):
    model, data = mlp
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    statistics = per_example_statistics(objective, collect="sums")
    for options, match in (
        ({"collect": "some"}, "`collect` is 'some'"),
        ({"memory_budget": 0}, "`memory_budget` is 0"),
        ({"memory_budget": True}, "`memory_budget` is True"),
    ):
        with pytest.raises(ValueError, match=match):
            per_example_statistics(objective, **options)
    for function in (statistics.alignment, statistics.tail_index, statistics.inner_products):
        with pytest.raises(ValueError, match="collect='all'"):
            function()
    with pytest.raises(ValueError, match="`gradients` needs"):
        assert statistics.gradients
    other = partition(nn.Linear(2, 2))
    for arguments, match in (
        (("whole", "other"), "`definition` is 'other'"),
        (("head",), r"partition\(objective, 'head'\)"),
        (("element", "spatial"), "`by` is 'element'"),
        (("nonsense",), "`by`: 'nonsense' is none of"),
        (("whole", "second_moment"), "by='parameter'"),
        ((other,), "other parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            statistics.snr(*arguments)
    for eps in (-1, math.nan, "1"):
        with pytest.raises(ValueError, match="`eps` is"):
            statistics.snr("parameter", "spatial", eps=eps)
    with pytest.raises(ValueError, match="only 'second_moment' takes it"):
        statistics.snr("parameter", dims=(0,))
    with pytest.raises(ValueError, match="`confidence` is 95"):
        statistics.noise_scale(confidence=95)


@pytest.mark.parametrize("curvature", [3.0, torch.eye(2)])
def test_a_curvature_of_something_else_is_refused(curvature):
    model = nn.Linear(3, 2)
    statistics = per_example_statistics(
        Objective.supervised(model, nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
    )
    with pytest.raises(ValueError, match=r"(?s)`curvature` is .*give an operator"):
        statistics.noise_scale(curvature)
