"""Coherence of examples against Hessians written out; order of thresholds; cases that are refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Objective
from sharpscope.hessian.coherence import Coherence, coherence
from sharpscope.landscape.memory import InsufficientMemory
from sharpscope.landscape.peak_memory import peak_bytes
from torch import nn


def family(copies, n=100):
    """`copies` Hessians on one axis, the others on axes of their own, all of size 2 n / copies."""
    factors = torch.zeros(n, n - copies + 1, 1, dtype=torch.float64)
    axes = torch.arange(n).sub(copies - 1).clamp(min=0)
    factors[torch.arange(n), axes] = math.sqrt(2 * n / copies)
    return factors


def random_factors(seed, n=8, k=6, r=2):
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, k, r, generator=draw, dtype=torch.float64)
    return factors * torch.rand(n, 1, 1, generator=draw, dtype=torch.float64).pow(3)


def small_net(outputs=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    return model, x


def jacobians(model, x):
    """∂z_i/∂θ [n, outputs, parameters] by one backward pass each."""
    rows = []
    for one in x:
        z = model(one[None]).reshape(-1)
        for entry in z:
            grads = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for g, p in zip(grads, model.parameters(), strict=True)
                    ]
                )
            )
    return torch.stack(rows).reshape(len(x), -1, rows[0].numel())


def dense_ggn(model, x, y, criterion):
    """H_i [n, p, p]: the criterion's Hessian by autograd between Jacobians."""
    found = []
    for J, one, target in zip(jacobians(model, x), x, y, strict=True):
        z = model(one[None]).detach()
        Q = torch.autograd.functional.hessian(lambda z, t=target: criterion(z, t[None]), z)
        found.append(J.T @ Q.reshape(z.numel(), z.numel()) @ J)
    return torch.stack(found)


def dense_hessians(model, x, y, criterion, dense_hessian):
    tensors = list(model.parameters())
    return torch.stack(
        [dense_hessian(lambda a=a, b=b: criterion(model(a[None]), b[None]), tensors) for a, b in zip(x, y, strict=True)]
    )


def by_square_roots(H):
    """S_ij = ‖H_i^½ H_j^½‖_F through matrix square roots."""
    linalg = pytest.importorskip("scipy.linalg")
    roots = [torch.as_tensor(linalg.sqrtm(h.numpy()).real) for h in H]
    return torch.stack([torch.stack([(a @ b).norm() for b in roots]) for a in roots])


def assert_equal(found, H, tol=1e-8):
    S = torch.einsum("iab,jba->ij", H, H).clamp(min=0).sqrt()
    torch.testing.assert_close(found.S, S, rtol=tol, atol=tol * float(S.max()))
    each = torch.linalg.eigvalsh(H)[:, -1]
    torch.testing.assert_close(found.example_lambda1, each, rtol=tol, atol=tol)
    assert found.lambda1 == pytest.approx(float(torch.linalg.eigvalsh(H.mean(0))[-1]), rel=tol)
    assert found.sigma == pytest.approx(float(torch.linalg.eigvalsh(S)[-1] / each.max()), rel=tol)
    assert found.trace == pytest.approx(float(H.mean(0).trace()), rel=tol)


@pytest.mark.parametrize("copies", [1, 5, 20])
def test_the_family_of_the_paper(copies):
    found = Coherence.from_factors(family(copies))
    assert found.sigma == pytest.approx(copies, abs=1e-10)
    assert found.lambda1 == pytest.approx(2.0, abs=1e-10)
    assert found.max_lambda1 == pytest.approx(200 / copies, abs=1e-10)


def test_random_factors_equal_square_roots_of_matrices():
    for seed in range(20):
        factors = random_factors(seed)
        H = factors @ factors.mT
        found = Coherence.from_factors(factors)
        assert_equal(found, H)
        torch.testing.assert_close(found.S, by_square_roots(H), rtol=1e-8, atol=2e-8)


def test_lambda1_is_bounded_by_coherence():
    """λ_1(H) ≤ σ max λ_1(H_i) / n."""
    for seed in range(200):
        found = Coherence.from_factors(random_factors(seed, n=3 + seed % 6, r=1 + seed % 3))
        assert found.lambda1 <= found.sigma * found.max_lambda1 / found.num_examples * (1 + 1e-12)


@pytest.mark.parametrize("sampling", ["bernoulli", "without_replacement"])
def test_order_of_thresholds(sampling):
    for seed in range(200):
        n = 3 + seed % 6
        found = Coherence.from_factors(random_factors(seed, n=n, k=2 + seed % 5, r=1 + seed % 3))
        t = found.thresholds(1 + seed % n, sampling)
        assert t.exact <= t.condition_d * (1 + 1e-12)
        assert t.condition_d <= t.theorem1 <= t.gradient_descent == pytest.approx(2 / found.lambda1)


def test_condition_d_without_replacement_is_reached():
    """One example of curvature t ā among equal ones on a line, t = √(1 + s): the bound is the threshold itself."""
    n, size = 40, 4
    s = size * (n - 1) ** 2 / (n - size)
    t = math.sqrt(1 + s)
    curvatures = torch.full((n,), (n - t) / (n - 1), dtype=torch.float64)
    curvatures[0] = t
    found = Coherence.from_factors(curvatures.sqrt().reshape(n, 1, 1)).thresholds(size, "without_replacement")
    assert found.exact == pytest.approx((1 + t) / t, rel=1e-10)
    assert found.exact == pytest.approx(found.condition_d, rel=1e-10)
    assert found.exact < found.gradient_descent


def test_thresholds_of_the_paper_s_family():
    """Theorem 1 on the family: λ_1 = σ / (η √(n/B − 1))."""
    t = Coherence.from_factors(family(5)).thresholds(2)
    assert t.theorem1 == pytest.approx(5 / (2 * 7), rel=1e-12)
    assert t.condition_d == pytest.approx(100 / (40 * 7), rel=1e-12)
    assert t.gradient_descent == pytest.approx(1.0, rel=1e-12)


CRITERIA = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda: torch.arange(7) % 3, 3),
    "smoothed, by class": (
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
        lambda: torch.arange(7) % 3,
        3,
    ),
    "squared error": (nn.MSELoss(), lambda: torch.randn(7, 3, dtype=torch.float64), 3),
    "half sum of squares": (
        lambda z, y: 0.5 * (z - y).square().sum(1).mean(),
        lambda: torch.randn(7, 3, dtype=torch.float64),
        3,
    ),
    "logistic": (nn.BCEWithLogitsLoss(), lambda: (torch.arange(7) % 2).double()[:, None], 1),
    "huber": (nn.HuberLoss(), lambda: torch.randn(7, 2, dtype=torch.float64), 2),
}


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("name", CRITERIA)
def test_gauss_newton_factors_equal_matrices_written_out(name, method):
    criterion, targets, outputs = CRITERIA[name]
    model, x = small_net(outputs)
    y = targets()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = coherence(Objective.supervised(model, criterion, data), method=method)
    H = dense_ggn(model, x, y, criterion)
    if name == "smoothed, by class":  # an example's share is its label's class weight
        weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[y]
        H = H * (7 * weights / weights.sum()).reshape(-1, 1, 1)
    assert_equal(found, H)
    assert found.method == method
    assert_rates(found, H)


def assert_rates(found, H):
    """The exact threshold against the map written out, on the range of H."""
    n, size = len(H), 2
    values, vectors = torch.linalg.eigh(H.mean(0))
    kept = vectors[:, values > 1e-10 * values[-1]]
    P = kept.T @ H @ kept
    k = P.shape[1]
    eye = torch.eye(k, dtype=P.dtype)
    lr = found.thresholds(size).exact
    A = eye - lr * P.mean(0)
    flat = P.reshape(n, -1)
    noise = (flat.T @ flat).reshape(k, k, k, k).permute(0, 2, 1, 3).reshape(k * k, k * k)
    T = torch.kron(A, A) + lr**2 / n**2 * (n / size - 1) * noise
    assert float(torch.linalg.eigvalsh(T)[-1]) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_positive_parts_of_true_hessians(method, dense_hessian):
    model, x = small_net(2)
    y = torch.arange(7) % 2
    criterion = nn.CrossEntropyLoss()
    found = coherence(Objective.supervised(model, criterion, (x, y)), factor="hessian_psd", method=method)
    exact = dense_hessians(model, x, y, criterion, dense_hessian)
    values, vectors = torch.linalg.eigh(exact)
    assert float(values.min()) < -0.01
    H = vectors @ (values.clamp(min=0).unsqueeze(2) * vectors.mT)
    assert_equal(found, H)
    torch.testing.assert_close(found.cut, values.clamp(max=0).norm(dim=1) / values.norm(dim=1))
    assert not torch.isnan(found.S).any()


def test_true_hessians_need_no_separate_prediction(dense_hessian):
    model, x = small_net(1)
    objective = Objective(model, lambda m, b: m(b).square().mean(), x)
    found = coherence(objective, factor="hessian_psd")
    exact = dense_hessians(model, x, x, lambda z, _: z.square().mean(), dense_hessian)
    values, vectors = torch.linalg.eigh(exact)
    assert_equal(found, vectors @ (values.clamp(min=0).unsqueeze(2) * vectors.mT))
    with pytest.raises(ValueError, match=r"Objective\.supervised"):
        coherence(objective)


def test_at_a_fit_gauss_newton_and_true_hessians_agree():
    model, x = small_net(1)
    y = model(x).detach()
    objective = Objective.supervised(model, nn.MSELoss(), (x, y))
    ggn, true = coherence(objective), coherence(objective, factor="hessian_psd")
    torch.testing.assert_close(ggn.S, true.S, rtol=1e-9, atol=1e-9)
    assert float(ggn.gradient_norms.max()) < 1e-14
    assert float(true.cut.max()) < 1e-12
    assert ggn.thresholds(2).exact == pytest.approx(true.thresholds(2).exact, rel=1e-8)


def test_gradient_residuals():
    model, x = small_net(3)
    y = torch.arange(7) % 3
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    J, z = jacobians(model, x), model(x).detach()
    exact = torch.einsum("nop,no->np", J, torch.softmax(z, 1) - F.one_hot(y, 3)).norm(dim=1)
    torch.testing.assert_close(coherence(objective).gradient_norms, exact)
    torch.testing.assert_close(coherence(objective, factor="hessian_psd").gradient_norms, exact)


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_sequences_and_images(make_problem, name):
    """A transformer with embedding, layer norm and tied weights, whose examples are sequences; a convolutional net."""
    model, (x, y) = make_problem(name)
    x, y = x[:3], y[:3]
    found = coherence(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)))
    H = dense_ggn(model, x, y, nn.CrossEntropyLoss())
    torch.testing.assert_close(found.S, torch.einsum("iab,jba->ij", H, H).sqrt(), rtol=1e-8, atol=1e-9)


def test_flattened_sequences_and_ignored_labels():
    """Logits [b · length, C] and [b, C, length] are the same; examples weigh by their labels; one has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    tokens, labels = torch.randint(0, 5, (4, 3)), torch.randint(0, 5, (4, 3))
    labels[1, :2] = -100
    labels[3] = -100
    criterion = nn.CrossEntropyLoss()
    flat = Objective.supervised(
        model, criterion, (tokens, labels.reshape(-1)), predict=lambda m, x: m(x).reshape(-1, 5)
    )
    shaped = Objective.supervised(model, criterion, (tokens, labels), predict=lambda m, x: m(x).transpose(1, 2))
    H = []
    for words, wanted in zip(tokens[:3], labels[:3], strict=True):
        J = jacobians(model, words[None])[0].reshape(3, 5, -1)[wanted >= 0]
        p = torch.softmax(model(words).detach(), 1)[wanted >= 0]
        Q = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        H.append(torch.einsum("tap,tab,tbq->pq", J, Q, J) * 3 / 7)  # n of 3, seven labels in all
    for objective in (flat, shaped):
        found = coherence(objective)
        assert found.num_examples == 3
        assert_equal(found, torch.stack(H))


def test_many_classes_by_blocks_within_the_memory_budget():
    """120 classes; factors made in blocks equal those made at once."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 120)).double()
    x, y = torch.randn(6, 20, dtype=torch.float64), torch.arange(6) * 20
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    objective.loss()
    whole = coherence(objective)
    assert_equal(whole, dense_ggn(model, x, y, nn.CrossEntropyLoss()))

    sketch = {"outputs": "sketch", "num_columns": 4}
    at_once = coherence(objective, **sketch)
    assert (at_once.outputs, whole.outputs) == ("sketch", "all")
    example = 5 * sum(p.numel() for p in model.parameters()) * 8
    budget = 9 * example  # two blocks of two examples
    assert budget < 6 * example * 2
    blocks = []
    torch.testing.assert_close(
        coherence(objective, **sketch, memory_budget=budget).S, at_once.S, rtol=1e-10, atol=1e-12
    )
    peak = peak_bytes(lambda: blocks.append(coherence(objective, **sketch, memory_budget=budget)), torch.device("cpu"))
    assert peak.peak < budget
    assert blocks[0].sigma == pytest.approx(at_once.sigma, rel=1e-10)
    with pytest.raises(InsufficientMemory, match="sketch"):
        coherence(objective, memory_budget=1 << 20)
    with pytest.raises(InsufficientMemory, match="ggn"):
        coherence(objective, factor="hessian_psd", memory_budget=1 << 20)


def test_a_sketch_estimates_products_of_different_examples_without_bias():
    model, x = small_net(6)
    y = torch.arange(7) % 6
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    exact = coherence(objective).S.square()
    draws = torch.stack(
        [coherence(objective, outputs="sketch", num_columns=2, seed=seed).S.square() for seed in range(150)]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    away = ((draws.mean(0) - exact) / error).abs()
    others = ~torch.eye(7, dtype=torch.bool)
    assert float(away[others].max()) < 4.5
    assert bool((draws.mean(0).diagonal() > exact.diagonal()).all())  # the bias that is stated
    enough = coherence(objective, outputs="sketch", num_columns=6)
    assert enough.outputs == "all"
    torch.testing.assert_close(enough.S.square(), exact)


def test_single_precision():
    model, x = small_net(3)
    y = torch.arange(7) % 3
    exact = coherence(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)))
    found = coherence(Objective.supervised(model.float(), nn.CrossEntropyLoss(), (x.float(), y)))
    assert found.sigma == pytest.approx(exact.sigma, rel=1e-4)
    assert found.thresholds(2).exact == pytest.approx(exact.thresholds(2).exact, rel=1e-3)


def test_a_single_example_and_the_whole_batch():
    model, x = small_net(3)
    one = coherence(Objective.supervised(model, nn.CrossEntropyLoss(), (x[:1], torch.tensor([1]))))
    assert one.S.shape == (1, 1)
    assert one.sigma == pytest.approx(float(one.S) / one.max_lambda1)
    for sampling in ("bernoulli", "without_replacement"):
        t = one.thresholds(1, sampling)
        assert t.exact == t.condition_d == t.theorem1 == t.gradient_descent
    whole = coherence(Objective.supervised(model, nn.CrossEntropyLoss(), (x, torch.arange(7) % 3)))
    t = whole.thresholds(7, "without_replacement")
    assert t.exact == t.gradient_descent == pytest.approx(2 / whole.lambda1)


def test_zero_hessians():
    found = Coherence.from_factors(torch.zeros(3, 2, 1))
    assert math.isnan(found.sigma)
    assert found.thresholds(1).exact == math.inf


def test_models_that_mix_or_draw():
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    normed = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    normed.train()
    in_eval = coherence(Objective.supervised(normed, nn.CrossEntropyLoss(), (x, y)))
    assert normed.training  # as it was found
    assert_equal(in_eval, dense_ggn(normed.eval(), x, y, nn.CrossEntropyLoss()))
    with pytest.raises(ValueError, match="from each batch"):
        coherence(Objective.supervised(normed, nn.CrossEntropyLoss(), (x, y), mode="train", check=False))
    dropped = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError):
        coherence(Objective.supervised(dropped, nn.CrossEntropyLoss(), (x, y), mode="train"))


def test_a_loss_that_mixes_examples_is_refused():
    model, x = small_net(2)
    objective = Objective.supervised(
        model, lambda z, y: (z - y).square().mean().sqrt(), (x, torch.zeros(7, 2).double())
    )
    with pytest.raises(ValueError, match="mixes examples"):
        coherence(objective)


def test_a_criterion_that_is_not_convex_is_refused():
    model, x = small_net(2)
    objective = Objective.supervised(model, lambda z, y: -(z - y).square().mean(), (x, torch.zeros(7, 2).double()))
    with pytest.raises(ValueError, match="hessian_psd"):
        coherence(objective)


def test_a_model_that_vmap_cannot_do_is_looped_over():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            z = self.layer(x)
            return z * 2 if float(z.sum()) > 0 else z

    torch.manual_seed(0)
    model, x = Branching().double(), torch.randn(5, 4, dtype=torch.float64)
    y = torch.arange(5) % 2
    found = coherence(
        Objective.supervised(
            model, nn.CrossEntropyLoss(reduction="sum"), [(a[None], b[None]) for a, b in zip(x, y, strict=True)]
        )
    )
    assert found.method == "loop"
    assert_equal(found, 5 * dense_ggn(model, x, y, nn.CrossEntropyLoss()))  # the objective is a sum: L = (1/n) Σ n ℓ_i


def test_nothing_after_the_gram_depends_on_the_number_of_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 20_000), nn.Tanh(), nn.Linear(20_000, 1)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    found = coherence(Objective.supervised(model, nn.MSELoss(), (x, x[:, :1])))
    num_parameters = sum(p.numel() for p in model.parameters())
    assert found.stability.coordinates.shape == (5, 5, 1)
    peak = peak_bytes(lambda: (found.thresholds(2), found.stability.radius(0.1, 2, momentum=0.5)), torch.device("cpu"))
    assert peak.peak < num_parameters


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"factor": "gnn"}, "factor"),
        ({"outputs": "most"}, "outputs"),
        ({"method": "map"}, "method"),
        ({"num_columns": 0}, "num_columns"),
        ({"factor": "hessian_psd", "outputs": "sketch"}, "outputs"),
    ],
)
def test_wrong_arguments_are_named(options, named):
    model, x = small_net(1)
    with pytest.raises(ValueError, match=f"`{named}`"):
        coherence(Objective.supervised(model, nn.MSELoss(), (x, x[:, :1])), **options)
    with pytest.raises(TypeError, match="`objective`"):
        coherence(model)
