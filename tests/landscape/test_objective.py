"""The objective: weighting, selection, data forms, chunking, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sharpscope import Objective
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches_of(data, *sizes):
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def test_loss_and_gradient_equal_plain_torch(problem):
    model, (x, y) = problem
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    loss = F.cross_entropy(model(x), y)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert objective.loss() == pytest.approx(float(loss), rel=1e-14)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-12, atol=1e-14)
    assert objective.num_parameters == gradient.numel()


@pytest.mark.parametrize(
    "form", ["tuple", "uneven list", "loader", "dataset", "dict", "chunks of 7", "chunks of 1", "auto chunks"]
)
def test_every_form_of_the_same_data_gives_the_same_objective(mlp, form):
    model, (x, y) = mlp
    data, options, loss = (x, y), {}, cross_entropy
    if form == "uneven list":
        data = batches_of((x, y), 32, 32, 6)
    elif form == "loader":
        data = DataLoader(TensorDataset(x, y), batch_size=32)
    elif form == "dataset":
        data = TensorDataset(x, y)
    elif form == "dict":
        data = [{"x": a, "y": b, "name": "extra"} for a, b in batches_of((x, y), 32, 32, 6)]
        loss = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"])
    elif form.startswith("chunks"):
        options["chunk_size"] = int(form.split()[-1])
    elif form == "auto chunks":
        options.update(chunk_size="auto", memory_budget=20_000)
    objective = Objective(model, loss, data, **options)
    expected = Objective(model, cross_entropy, [(x, y)])
    assert objective.num_examples == 70
    assert objective.loss() == pytest.approx(expected.loss(), rel=1e-13)
    torch.testing.assert_close(objective.gradient(), expected.gradient(), rtol=1e-11, atol=1e-13)


def test_auto_chunks_cut_the_batch_to_the_budget(mlp):
    objective = Objective(mlp[0], cross_entropy, mlp[1], chunk_size="auto", memory_budget=20_000)
    sizes = [chunk.size for chunk in objective.chunks()]
    assert sum(sizes) == 70
    assert 1 < len(sizes) <= 70


def test_ignored_labels_do_not_count(make_problem):
    model, (x, y) = make_problem("transformer")
    y = y.clone()
    y[0], y[3, 2:] = -100, -100
    whole = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y))
    pieces = Objective.supervised(model, nn.CrossEntropyLoss(), batches_of((x, y), 1, 3, 6))
    assert pieces.loss() == pytest.approx(whole.loss(), rel=1e-13)
    torch.testing.assert_close(pieces.gradient(), whole.gradient(), rtol=1e-11, atol=1e-13)


def test_class_weights_weigh_the_batches(mlp):
    model, (x, y) = mlp
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    pieces = Objective.supervised(model, criterion, batches_of((x, y), 40, 30))
    assert pieces.loss() == pytest.approx(float(criterion(model(x), y)), rel=1e-13)


def test_a_sum_is_summed(mlp):
    model, (x, y) = mlp
    criterion = nn.CrossEntropyLoss(reduction="sum")
    objective = Objective.supervised(model, criterion, batches_of((x, y), 40, 30), chunk_size=16)
    assert objective.loss() == pytest.approx(float(criterion(model(x), y)), rel=1e-13)


def test_a_mean_over_tokens_counted_as_examples_is_refused_and_cured_by_count(make_problem):
    model, (x, y) = make_problem("transformer")
    y = y.clone()
    y[0, 1:], y[1, 2:] = -100, -100
    data = batches_of((x, y), 4, 6)
    with pytest.raises(ValueError, match="not the mean over its examples.*count=lambda"):
        Objective(model, cross_entropy, data + batches_of((x, y), 3, 7)[:1]).loss()
    counted = Objective(model, cross_entropy, data, count=lambda batch: int((batch[1] != -100).sum()))
    assert counted.loss() == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-13)


def test_selection_by_name_glob_tensor_and_predicate(mlp):
    model, data = mlp
    weights = ("0.weight", "2.weight", "4.weight")
    for params in (
        list(reversed(weights)),
        "*.weight",
        [model[4].weight, model[0].weight, model[2].weight],
        lambda name, p: p.ndim == 2,
    ):
        assert Objective(model, cross_entropy, data, params=params).layout.names == weights


def test_frozen_parameters_are_left_out_and_tied_ones_come_once(make_problem):
    model, data = make_problem("transformer")
    for p in model.positions.parameters():
        p.requires_grad_(False)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), data)
    assert "positions.weight" not in objective.layout.names
    assert "head.weight" not in objective.layout.names
    assert "embedding.weight" in objective.layout.names
    assert Objective.supervised(model, nn.CrossEntropyLoss(), data, params="head.weight").layout.names == (
        "embedding.weight",
    )


def test_unused_parameters_have_zero_rows_and_are_named(mlp):
    model, data = mlp
    model.register_parameter("spare", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    objective = Objective(model, cross_entropy, data)
    assert objective.unused == ("spare",)
    assert float(objective.unflatten(objective.gradient())["spare"].abs().sum()) == 0


def test_dtype_evaluates_in_double_without_touching_the_model(make_problem):
    model, (x, y) = make_problem("cnn", torch.float32)
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), dtype=torch.float64)
    double = copy.deepcopy(model).double()
    assert objective.loss() == pytest.approx(float(F.cross_entropy(double(x.double()), y)), rel=1e-13)
    assert objective.gradient().dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_half_precision_parameters_give_float32_vectors(mlp):
    model, (x, y) = mlp
    model.bfloat16()
    objective = Objective(model, cross_entropy, (x.bfloat16(), y))
    assert objective.gradient().dtype == torch.float32
    assert objective.coarsest_eps == torch.finfo(torch.bfloat16).eps


def test_evaluations_follow_the_live_weights(mlp):
    model, data = mlp
    objective = Objective(model, cross_entropy, data)
    before = objective.loss()
    with torch.no_grad():
        model[4].bias[0] += 1.0
    assert objective.loss() != before
    assert objective.loss() == pytest.approx(float(cross_entropy(model, data)), rel=1e-14)


def test_train_mode_takes_batch_statistics_and_restores_the_running_ones(make_problem):
    model, (x, y) = make_problem("cnn")
    found = copy.deepcopy(model.state_dict())
    objective = Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), mode="train")
    value = objective.loss()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert value == pytest.approx(float(F.cross_entropy(copy.deepcopy(model).train()(x), y)), rel=1e-13)
    with pytest.raises(ValueError, match="BatchNorm takes the statistics of each batch"):
        Objective.supervised(model, nn.CrossEntropyLoss(), (x, y), mode="train", chunk_size=8).loss()


def test_closures_over_any_tensors():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for closure in (lambda x: (x**4).sum(), lambda: (x**4).sum()):
        objective = Objective.from_closure(closure, x)
        assert objective.loss() == 98.0
        assert objective.gradient().tolist() == [4.0, 32.0, 108.0]
        assert not x.requires_grad
    with pytest.raises(ValueError, match="neither 1 arguments"):
        Objective.from_closure(lambda a, b: a, x)
    with pytest.raises(ValueError, match="`tensors` is empty"):
        Objective.from_closure(lambda: x.sum(), [])
    with pytest.raises(TypeError, match="real floating"):
        Objective.from_closure(lambda x: x.sum(), torch.arange(3))


def test_fingerprint_changes_with_everything_but_the_weights(mlp):
    model, (x, y) = mlp
    base = Objective(model, cross_entropy, (x, y)).fingerprint()
    with torch.no_grad():
        model[0].weight += 1
    assert Objective(model, cross_entropy, (x, y)).fingerprint() == base
    others = [
        Objective(model, cross_entropy, (x + 1, y)),
        Objective(model, cross_entropy, (x, y), params="0.*"),
        Objective(model, cross_entropy, (x, y), mode="train"),
        Objective(model, cross_entropy, (x, y), dtype=torch.float32),
        Objective(model, lambda model, batch: 2 * F.cross_entropy(model(batch[0]), batch[1]), (x, y)),
    ]
    prints = {objective.fingerprint() for objective in others}
    assert len(prints) == len(others)
    assert base not in prints


REFUSALS = {
    "no module": (lambda m, d: Objective("model", cross_entropy, d), TypeError, "`model` is a str"),
    "no loss": (lambda m, d: Objective(m, None, d), TypeError, "`loss` is a NoneType"),
    "zero parameters": (lambda m, d: Objective(nn.ReLU(), cross_entropy, d), ValueError, "zero parameters"),
    "empty selection": (lambda m, d: Objective(m, cross_entropy, d, params=[]), ValueError, "selects no parameter"),
    "unknown name": (lambda m, d: Objective(m, cross_entropy, d, params="0.weigth"), ValueError, "near it: '0.weight'"),
    "foreign tensor": (
        lambda m, d: Objective(m, cross_entropy, d, params=[torch.ones(2)]),
        ValueError,
        "no parameter of `model`",
    ),
    "mode": (lambda m, d: Objective(m, cross_entropy, d, mode="evaluate"), ValueError, "near: 'eval'"),
    "chunk": (lambda m, d: Objective(m, cross_entropy, d, chunk_size=0), ValueError, "`chunk_size` is 0"),
    "dtype": (lambda m, d: Objective(m, cross_entropy, d, dtype=torch.int64), ValueError, "`dtype` is torch.int64"),
    "reduction": (lambda m, d: Objective(m, cross_entropy, d, reduction="avg"), ValueError, "`reduction` is 'avg'"),
    "budget": (lambda m, d: Objective(m, cross_entropy, d, memory_budget=-1), ValueError, "`memory_budget` is -1"),
    "iterator": (lambda m, d: Objective(m, cross_entropy, iter([d])), TypeError, r"pass list\(data\)"),
    "list of tensors": (lambda m, d: Objective(m, cross_entropy, list(d)), ValueError, "one batch or several"),
    "empty list": (lambda m, d: Objective(m, cross_entropy, []), ValueError, "empty list"),
    "number": (lambda m, d: Objective(m, cross_entropy, 3), TypeError, "`data` is a int"),
    "empty loader": (
        lambda m, d: Objective(m, cross_entropy, DataLoader(TensorDataset(d[0][:0], d[1][:0]))).loss(),
        ValueError,
        "yielded no batch",
    ),
    "empty batch": (lambda m, d: Objective(m, cross_entropy, (d[0][:0], d[1][:0])).loss(), ValueError, "no example"),
    "vector loss": (
        lambda m, d: Objective(m, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), d).loss(),
        ValueError,
        r"shape \[70\]",
    ),
    "float loss": (lambda m, d: Objective(m, lambda m, b: 1.0, d).loss(), TypeError, "returned a float"),
    "detached": (
        lambda m, d: Objective(m, lambda m, b: cross_entropy(m, b).detach(), d).gradient(),
        ValueError,
        "does not require grad",
    ),
    "all frozen": (
        lambda m, d: Objective(m.requires_grad_(False), cross_entropy, d),
        ValueError,
        "all are frozen",
    ),
    "no reduction": (
        lambda m, d: Objective.supervised(m, nn.CrossEntropyLoss(reduction="none"), d),
        ValueError,
        "reduction='none'",
    ),
    "no pair": (lambda m, d: Objective.supervised(m, nn.MSELoss(), d[0]).loss(), TypeError, "not a pair"),
    "negative count": (
        lambda m, d: Objective(m, cross_entropy, d, count=lambda batch: -1).loss(),
        ValueError,
        "`count` gave -1",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_argument_value_and_cure(mlp, case):
    call, kind, message = REFUSALS[case]
    with pytest.raises(kind, match=message):
        call(*mlp)


def test_nan_dropout_and_shuffling_are_three_messages(mlp):
    model, (x, y) = mlp
    broken = x.clone()
    broken[40] = float("nan")
    with pytest.raises(ValueError, match="loss of batch 1 is nan; the batch itself holds 5 non-finite numbers"):
        Objective(model, cross_entropy, batches_of((broken, y), 32, 32, 6)).loss()
    noisy = nn.Sequential(model[:4], nn.Dropout(0.3), model[4])
    with pytest.raises(ValueError, match=r"dropout is active in \['1'\]"):
        Objective(noisy, cross_entropy, (x, y), mode="train").loss()
    with pytest.raises(ValueError, match="dropout is active"):
        Objective(noisy, cross_entropy, (x, y), mode="keep").loss()
    assert Objective(noisy, cross_entropy, (x, y)).loss() == pytest.approx(float(cross_entropy(model, (x, y))))
    shuffled = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match="the loader shuffles, drops or augments"):
        Objective(model, cross_entropy, shuffled).loss()
    with pytest.raises(ValueError, match="not deterministic"):
        Objective(model, lambda m, b: F.cross_entropy(m(b[0] + 0.1 * torch.randn_like(b[0])), b[1]), (x, y)).loss()


def test_dropout_that_leaves_the_loss_alone_is_still_noticed(mlp):
    model, (x, y) = mlp
    noisy = nn.Sequential(model[:4], nn.Dropout(0.3), model[4])
    nn.init.zeros_(model[4].weight)
    with pytest.raises(ValueError, match="dropout is active"):
        Objective(noisy, cross_entropy, (x, y), mode="train").loss()


def test_a_loader_that_shuffles_but_visits_everything_is_fine(mlp):
    model, (x, y) = mlp
    objective = Objective(model, cross_entropy, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    assert objective.loss() == pytest.approx(float(cross_entropy(model, (x, y))), rel=1e-13)
