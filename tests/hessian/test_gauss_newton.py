"""GGN, Fisher and gradient covariance against per-example Jacobians written out."""

import pytest
import torch
import torch.nn.functional as F
from sharpscope import GGN, Fisher, GradientCovariance, Hessian, Objective
from torch import nn


def uneven(data):
    rows = len(data[0])
    sizes = (rows // 2, rows // 3, rows - rows // 2 - rows // 3)
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def assert_equal(operator, exact, rtol=1e-9, atol=1e-11):
    """The same matrix, judged by its action on random vectors."""
    V = torch.randn(operator.shape[0], 4, dtype=operator.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(operator @ V, exact @ V, rtol=rtol, atol=atol)


def flat_gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, model.parameters(), strict=True)]
    )


def jacobian(model, x):
    """d z / d θ, [outputs, n], by one backward pass per output."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z = model(x)
        return torch.stack([flat_gradient(entry, model) for entry in z.reshape(-1)]), z


def dense_ggn(model, data, criterion):
    J, z = jacobian(model, data[0])
    z = z.detach()
    H = torch.autograd.functional.hessian(lambda z: criterion(z, data[1]), z).reshape(z.numel(), z.numel())
    return J.T @ H @ J


def example_gradients(model, data):
    rows = []
    for x, y in zip(*data, strict=True):
        rows.append(flat_gradient(F.cross_entropy(model(x[None]), y[None]), model))
    return torch.stack(rows)


def test_ggn_is_jt_h_j(problem):
    model, data = problem
    exact = dense_ggn(model, data, F.cross_entropy)
    for options in ({}, {"chunk_size": 7}, {"chunk_size": 7, "memory_budget": 1}):
        ggn = GGN(Objective.supervised(model, nn.CrossEntropyLoss(), uneven(data), **options))
        assert_equal(ggn, exact)


def test_ggn_of_a_linear_model_is_its_hessian(mlp):
    _, data = mlp
    model = nn.Linear(5, 3).double()
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    assert_equal(GGN(objective), Hessian(objective))


CRITERIA = {
    "categorical": (nn.CrossEntropyLoss(), lambda y: y),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)), lambda y: y),
    "gaussian": (nn.MSELoss(), lambda y: F.one_hot(y, 3).double()),
    "bernoulli": (nn.BCEWithLogitsLoss(), lambda y: F.one_hot(y, 3).double()),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_fisher_equals_the_ggn_for_likelihoods(mlp, name, reduction):
    model, (x, y) = mlp
    criterion, encode = CRITERIA[name]
    criterion = type(criterion)(reduction=reduction, **({"weight": criterion.weight} if name == "weighted" else {}))
    objective = Objective.supervised(model, criterion, uneven((x, encode(y))))
    assert_equal(Fisher(objective), GGN(objective))


def test_exact_fisher_of_sequences_with_ignored_labels(make_problem):
    model, (x, y) = make_problem("transformer")
    y = y.clone()
    y[0, 2:] = -100
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), uneven((x, y)))
    assert_equal(Fisher(objective), GGN(objective))


@pytest.mark.parametrize("name", ["categorical", "gaussian", "bernoulli"])
def test_monte_carlo_fisher_converges_at_the_square_root_rate(mlp, name):
    model, (x, y) = mlp
    criterion, encode = CRITERIA[name]
    objective = Objective.supervised(model, criterion, uneven((x, encode(y))), params="4.*")
    exact = Fisher(objective).dense()
    errors = []
    for num_samples in (4, 64):
        samples = [Fisher(objective, "monte-carlo", num_samples=num_samples, seed=s).dense() for s in range(6)]
        errors.append(torch.stack([(sample - exact).norm() for sample in samples]).mean())
    # 16 times the samples: a quarter of the error; six repeats leave the ratio some 25 per cent of noise.
    assert 2.5 < float(errors[0] / errors[1]) < 6.5
    # The mean of independent estimates approaches the truth itself: no bias.
    assert float((torch.stack(samples).mean(0) - exact).norm()) < float(errors[1])


def test_monte_carlo_labels_do_not_depend_on_the_chunking(mlp):
    make = lambda **options: Fisher(
        Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1], **options), "monte-carlo", num_samples=3
    )
    assert_equal(make(), make(chunk_size=9))


def test_empirical_fisher_and_covariance_against_example_gradients(problem):
    model, data = problem
    gradients = example_gradients(model, data)
    second_moment = gradients.T @ gradients / len(gradients)
    mean = gradients.mean(0)
    for options in ({}, {"chunk_size": 4}):
        objective = Objective.supervised(model, nn.CrossEntropyLoss(), uneven(data), **options)
        assert_equal(Fisher(objective, "empirical"), second_moment)
        assert_equal(GradientCovariance(objective), second_moment - torch.outer(mean, mean))


def test_covariance_of_a_general_loss_and_after_a_change_of_weights(mlp):
    model, data = mlp
    objective = Objective(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), data)
    covariance = GradientCovariance(objective)
    covariance @ torch.ones(covariance.shape[0], dtype=torch.float64)
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    gradients = example_gradients(model, data)
    exact = torch.cov(gradients.T, correction=0)
    assert_equal(covariance, exact)


def test_products_leave_no_gradient_behind(mlp):
    model, data = mlp
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    for operator in (GGN(objective), Fisher(objective), Fisher(objective, "empirical"), GradientCovariance(objective)):
        with torch.inference_mode():
            operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    assert all(p.grad is None for p in model.parameters())


def test_a_jacobian_that_cannot_be_differentiated_is_noticed(first_order_square, mlp):
    model, data = mlp
    predict = lambda model, x: first_order_square(model(x)) + model(x)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, predict=predict)
    with pytest.raises(RuntimeError, match=r"J v is wrong through .*FirstOrderSquare"):
        GGN(objective) @ torch.ones(objective.num_parameters, dtype=torch.float64)


def test_refusals(mlp):
    model, (x, y) = mlp
    supervised = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    general = Objective(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), (x, y))
    with pytest.raises(ValueError, match=r"Objective\.supervised"):
        GGN(general)
    with pytest.raises(ValueError, match=r"Objective\.supervised"):
        Fisher(general)
    with pytest.raises(ValueError, match="near: 'empirical'"):
        Fisher(supervised, "empiric")
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        Fisher(supervised, "monte-carlo", num_samples=0)
    with pytest.raises(ValueError, match="smooths its labels"):
        Fisher(Objective.supervised(model, nn.CrossEntropyLoss(label_smoothing=0.1), (x, y)))
    with pytest.raises(ValueError, match="not known as a negative log-likelihood"):
        Fisher(Objective.supervised(model, nn.MultiMarginLoss(), (x, y)))
    with pytest.raises(ValueError, match="has no examples"):
        GradientCovariance(Objective.from_closure(lambda w: w.sum() ** 2, torch.ones(2))).dense()
    output = nn.ModuleDict({"m": model})
    output.forward = lambda x: {"logits": model(x)}
    with pytest.raises(TypeError, match="give `predict`"):
        GGN(Objective.supervised(output, lambda z, y: F.cross_entropy(z["logits"], y), (x, y))).dense()


def test_covariance_of_a_sum_is_n_times_that_of_the_mean(mlp):
    model, data = mlp
    gradients = example_gradients(model, data)
    exact = len(gradients) * torch.cov(gradients.T, correction=0)  # Σ (g − ḡ)(g − ḡ)ᵀ, each example weighing 1
    for options in ({}, {"chunk_size": 9}):
        objective = Objective.supervised(model, nn.CrossEntropyLoss(reduction="sum"), uneven(data), **options)
        assert_equal(GradientCovariance(objective), exact)
    last = Objective.supervised(model, nn.CrossEntropyLoss(reduction="sum"), data, params="4.*")
    values = torch.linalg.eigvalsh(GradientCovariance(last).dense())
    assert float(values[0]) >= -1e-12 * float(values[-1])


def test_flattened_predictions_are_cut_by_example(make_problem):
    model, (x, y) = make_problem("transformer")
    y = y.clone()
    y[0, 2:], y[3, 1:] = -100, -100  # examples then weigh by their labels
    predict = lambda model, x: model(x).transpose(1, 2).reshape(-1, 11)  # [b · length, vocabulary]
    split = lambda batch: (batch[0], batch[1].reshape(-1))
    gradients = example_gradients(model, (x, y))
    weights = (y != -100).double().sum(1) / (y != -100).sum()
    second_moment = gradients.T @ (weights.unsqueeze(1) * gradients)
    mean = weights @ gradients
    for data, options in (((x, y), {}), (uneven((x, y)), {}), ((x, y), {"chunk_size": 3})):
        objective = Objective.supervised(model, nn.CrossEntropyLoss(), data, predict=predict, split=split, **options)
        assert_equal(Fisher(objective, "empirical"), second_moment)
        assert_equal(GradientCovariance(objective), second_moment - torch.outer(mean, mean))
        # Rows of one example stay together whatever the chunks; the metric is the same as for [b, classes, length].
        assert_equal(Fisher(objective), dense_ggn(model, (x, y), F.cross_entropy))


def test_losses_that_mix_examples_have_no_gradients_by_example(mlp):
    model, data = mlp
    standardised = lambda z: (z - z.mean(0)) / (1 + z.var(0, correction=0))
    supervised = Objective.supervised(model, lambda z, y: F.cross_entropy(standardised(z), y), data)
    general = Objective(model, lambda m, b: F.cross_entropy(m(b[0]) - m(b[0]).mean(0), b[1]), data)
    for objective in (supervised, general):
        for operator in (Fisher(objective, "empirical"), GradientCovariance(objective)):
            with pytest.raises(ValueError, match="mixes examples"):
                operator @ torch.ones(objective.num_parameters, dtype=torch.float64)
    v = torch.ones(general.num_parameters, dtype=torch.float64)
    assert bool(torch.isfinite(Hessian(general) @ v).all())


@pytest.mark.parametrize("kind", ["exact", "monte-carlo"])
def test_fisher_of_ignored_labels_beyond_the_classes_with_class_weights(mlp, kind):
    model, (x, y) = mlp
    y = y.clone()
    y[::3] = 255
    by_class = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weight=by_class, ignore_index=255)
    objective = Objective.supervised(model, criterion, uneven((x, y)), params="4.*")
    kept = y != 255
    last = nn.Linear(8, 3).double()
    last.load_state_dict(model[4].state_dict())
    J, z = jacobian(last, model[:4](x[kept]).detach())
    p = z.detach().softmax(1)
    share = by_class[y[kept]] / by_class[y[kept]].sum()
    H = torch.block_diag(*(s * (torch.diag(q) - torch.outer(q, q)) for s, q in zip(share, p, strict=True)))
    exact = J.T @ H @ J
    if kind == "exact":
        assert_equal(Fisher(objective), exact)
        assert_equal(GGN(objective), exact)
        return
    fisher = Fisher(objective, kind, num_samples=400).dense()
    # 400 draws of some 47 labels: about 1 / sqrt(400) of the matrix, and far less of its trace.
    assert float((fisher - exact).norm() / exact.norm()) < 0.15


def test_every_seed_draws_its_own_labels(mlp):
    objective = Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1], params="4.*")
    dense = lambda seed: Fisher(objective, "monte-carlo", seed=seed).dense()
    seeds = (0, 1, -1, -2, 2**61 - 1, 2**61)
    matrices = [dense(seed) for seed in seeds]
    for i, matrix in enumerate(matrices):
        assert torch.equal(matrix, dense(seeds[i]))
        assert all(not torch.allclose(matrix, other) for other in matrices[:i])


def test_no_columns_give_no_columns(mlp):
    objective = Objective.supervised(mlp[0], nn.CrossEntropyLoss(), mlp[1])
    n = objective.num_parameters
    for operator in (GGN(objective), Fisher(objective), Fisher(objective, "empirical"), GradientCovariance(objective)):
        assert (operator @ torch.zeros(n, 0, dtype=torch.float64)).shape == (n, 0)


def test_data_changed_in_place_between_products_is_noticed(mlp):
    model, (x, y) = mlp
    ggn = GGN(Objective.supervised(model, nn.CrossEntropyLoss(), (x, y)))
    ggn @ torch.ones(ggn.shape[0], dtype=torch.float64)
    x.data.mul_(1.5)
    assert_equal(ggn, dense_ggn(model, (x, y), F.cross_entropy))
