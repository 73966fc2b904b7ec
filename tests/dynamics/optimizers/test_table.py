"""Every optimizer against its oracle, and against torch's conventions: one row each."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from optimizer_rows import all_rows
from sharpscope.dynamics.optimizers import NoPreconditionerError
from sharpscope.dynamics.workloads.digits import digits
from torch import nn

ROWS = all_rows()
JUDGED = [row for row in ROWS if row.oracle is not None]
SHAPES = ((7, 5), (3,), (4, 3, 2), (1,), (11, 13), (130,))


def parameters(dtype):
    gen = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def grouped(params, second):
    return [{"params": params[:3]}, {"params": params[3:], **second}]


def bumpy_loss(params, t):
    """Curved, not convex, and another one at each step, so that no moment settles."""
    total = 0.0
    for i, p in enumerate(params):
        phase = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape)
        total = total + (0.3 * (i + 1) * p.square() + torch.sin(2 * p + phase + 0.7 * t)).sum()
    return total


def stepped(optimizer, params, loss, row):
    def closure():
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    if row.closure:
        return optimizer.step(closure)
    closure()
    return optimizer.step()


@pytest.mark.parametrize("row", JUDGED, ids=str)
def test_it_makes_the_steps_of_its_oracle(row):
    if row.package:
        pytest.importorskip(row.package)
    mine, theirs = parameters(row.dtype), parameters(row.dtype)
    ours = (row.make or (lambda p: row.by_options(p, **row.descent)))(grouped(mine, row.second_group))
    oracle = row.oracle(grouped(theirs, row.second_group))
    start = [p.detach().clone() for p in mine]
    for t in range(row.steps):
        stepped(ours, mine, lambda ps, t=t: bumpy_loss(ps, t), row)
        stepped(oracle, theirs, lambda ps, t=t: bumpy_loss(ps, t), row)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=row.tolerance, msg=lambda m, t=t: f"step {t}: {m}")
    moved = [float((p.detach() - s).abs().max()) for p, s in zip(mine, start, strict=True)]
    assert min(moved) > 100 * row.tolerance
    assert min(moved) > 0


def problem(seed=0, dtype=torch.float32):
    """Real digits, a small network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).to(dtype)
    return model, loss_of(model)


def loss_of(model):
    data, dtype = digits(200).train, model[0].weight.dtype
    return lambda params=None: F.cross_entropy(model(data.inputs.to(dtype)), data.targets)


def training(row, model, loss, optimizer, steps):
    """The loss after each step."""
    after = []
    for _ in range(steps):
        stepped(optimizer, None, loss, row)
        after.append(float(loss().detach()))
    return after


def made(row, model, **more):
    return row.by_options(list(model.parameters()), **{**row.descent, **more})


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_it_descends_on_digits(row):
    model, loss = problem()
    before = float(loss().detach())
    after = training(row, model, loss, made(row, model), 100)
    assert sum(after[-5:]) / 5 < 0.8 * before, (before, after[-5:])


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_saved_run_goes_on_bit_for_bit(row, dtype):
    whole_model, whole_loss = problem(dtype=dtype)
    training(row, whole_model, whole_loss, made(row, whole_model), 100)
    model, loss = problem(dtype=dtype)
    optimizer = made(row, model)
    training(row, model, loss, optimizer, 37)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, loss = problem(seed=1, dtype=dtype)
    resumed = made(row, again)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    kept = [v.dtype for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert kept == [v.dtype for s in resumed.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    training(row, again, loss, resumed, 63)
    assert same(weights(again), weights(whole_model))


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(row, how):
    model, loss = problem()
    optimizer = made(row, model)
    training(row, model, loss, optimizer, 5)
    pair = (model, optimizer)
    twin, again = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = weights(model)
    training(row, twin, loss_of(twin), again, 5)
    assert same(weights(model), before)
    training(row, model, loss, optimizer, 5)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_closure_runs_with_gradients_and_its_loss_is_returned(row):
    model, loss = problem()
    optimizer = made(row, model)
    expected = float(loss().detach())
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        calls.append(float(value.detach()))
        return value

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert float(returned.detach()) == calls[0] == pytest.approx(expected, rel=1e-6)
    if not row.closure:
        assert len(calls) == 1


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parameters_without_a_gradient_stay(row):
    model, loss = problem()
    model[0].bias.requires_grad_(False)
    spare = nn.Parameter(torch.ones(3, 2))
    before = model[0].bias.detach().clone()
    optimizer = row.by_options([*model.parameters(), spare], **row.descent)
    params = list(model.parameters())
    for _ in range(3):
        stepped(optimizer, params, loss, row)
    assert torch.equal(model[0].bias, before)
    assert torch.equal(spare, torch.ones(3, 2))
    assert not torch.equal(model[2].weight, problem()[0][2].weight)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_groups_have_their_own_learning_rate(row):
    model, loss = problem()
    still = weights(model[2])
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 1e-30}]
    optimizer = row.by_options(groups, **row.descent)
    for _ in range(3):
        stepped(optimizer, None, loss, row)
    if not row.draws:
        assert all(torch.allclose(p, q, atol=1e-20) for p, q in zip(weights(model[2]), still, strict=True))
    assert not torch.equal(model[0].weight, problem()[0][0].weight)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parameters_added_later_train_too(row):
    model, loss = problem()
    optimizer = row.by_options(list(model[0].parameters()), **row.descent)
    before = weights(model[2])
    for _ in range(3):
        stepped(optimizer, None, loss, row)
        model[2].zero_grad()
    assert same(weights(model[2]), before)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    for _ in range(3):
        stepped(optimizer, None, loss, row)
    assert not same(weights(model[2]), before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_schedulers_change_its_learning_rate(row):
    model, loss = problem()
    optimizer = made(row, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 3 else 1e-30)
    for step in range(6):
        before = weights(model)
        stepped(optimizer, None, loss, row)
        scheduler.step()
        if step < 3:
            assert not same(weights(model), before)
        elif not (row.draws or row.coasts):
            assert all(torch.allclose(p, q, rtol=0, atol=1e-20) for p, q in zip(weights(model), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-30 * optimizer.param_groups[0]["initial_lr"])


@pytest.mark.parametrize("row", [row for row in ROWS if not row.closure], ids=str)
def test_a_gradient_scaler_can_drive_it(row):
    model, loss = problem()
    optimizer, scaler = made(row, model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, plain_loss = problem()
    unscaled = made(row, plain)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped(unscaled, None, plain_loss, row)
    assert same(weights(model), weights(plain))  # the scale is a power of two


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_of_another_kind_are_refused_before_anything_changes(row, kind):
    first = nn.Parameter(torch.ones(4))
    if kind == "sparse":
        layer = nn.Embedding(5, 3, sparse=True)
        second, words = layer.weight, "sparse"
    else:
        second, words = nn.Parameter(torch.ones(3, dtype=torch.complex64)), "complex"
    optimizer = row.by_options([first, second], **row.descent)

    def closure():
        optimizer.zero_grad()
        out = layer(torch.tensor([0, 2])).sum() if kind == "sparse" else (second * second.conj()).real.sum()
        value = out + first.sum()
        value.backward()
        return value

    before = first.detach().clone()
    with pytest.raises(TypeError, match=words):
        optimizer.step(closure)
    assert torch.equal(first, before)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.closure], ids=str)
def test_its_step_can_be_compiled(row):
    model, loss = problem()
    plain, plain_loss = problem()
    optimizer, eager = made(row, model), made(row, plain)

    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            step()
            stepped(eager, None, plain_loss, row)
    torch._dynamo.reset()
    for p, q in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_the_monitor_reads_is_there_and_changes_nothing(row):
    model, loss = problem()
    optimizer = made(row, model)
    training(row, model, loss, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        for gradient in (None, p.grad):
            try:
                P = optimizer.preconditioner(p, gradient)
            except NoPreconditionerError:
                assert gradient is None  # some keep no copy of the gradient of their last step
                continue
            if isinstance(P, torch.Tensor):
                assert P.shape == p.shape
                assert bool((P > 0).all())
            else:
                assert P.shape[1] == p.numel()
    threshold = optimizer.stability_threshold()
    assert threshold is None or (math.isfinite(threshold) and threshold > 0)
    assert optimizer.state_bytes() >= 0
    after = optimizer.state_dict()
    assert str(before) == str(after)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_learning_rates_that_are_none_are_refused(row):
    if "lr" not in row.descent:
        pytest.skip("its learning rate has another name")
    for bad in (-0.1, math.nan, math.inf, "fast"):
        with pytest.raises((ValueError, TypeError), match="lr"):
            made(row, problem()[0], lr=bad)
