"""PSGD as an optimizer: its pairs, its limits, what it keeps and what it says."""

import copy
import math

import pytest
import torch
from sharpscope.dynamics.optimizers.closures import needs_closure
from sharpscope.dynamics.optimizers.psgd import PSGD
from sharpscope.dynamics.optimizers.streams import generator
from sharpscope.dynamics.studies.psgd_problems import absolute_inverse, low_rank_hessian, x_shaped_hessian
from sharpscope.hessian import DenseOperator, PreconditionedOperator
from sharpscope.landscape import Objective
from torch import nn

FLOAT = torch.float64
KINDS = ("xmat", "lra", "kron")


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=FLOAT, generator=torch.Generator().manual_seed(seed))


def network(seed=0, dtype=FLOAT, dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2)).to(dtype)


X, Y = normal(20, 4, seed=1), normal(20, 2, seed=2)


def loss_of(model):
    return (model(X) - Y).square().mean()


def ordinary(model, optimizer, calls=None):
    def closure():
        optimizer.zero_grad()
        value = loss_of(model)
        value.backward()
        if calls is not None:
            calls.append(float(value.detach()))
        return value

    return closure


def inverse_of(optimizer, params):
    """P as a matrix."""
    root = optimizer.joint_preconditioner(params)
    Q = root.apply(torch.eye(root.shape[1], dtype=FLOAT))
    return Q.T @ Q


def fit(hessian, steps, **options):
    x = nn.Parameter(torch.ones(len(hessian), dtype=FLOAT))
    optimizer = PSGD([x], lr=0.0, curvature="hvp", **options)
    for _ in range(steps):
        optimizer.step(lambda: 0.5 * x @ hessian @ x)
    return inverse_of(optimizer, [x])


def test_on_an_x_shaped_quadratic_p_becomes_the_inverse_hessian():
    hessian = x_shaped_hessian(6, 20.0, seed=0)
    error = fit(hessian, 1500, kind="xmat") @ hessian - torch.eye(6, dtype=FLOAT)
    assert torch.linalg.matrix_norm(error, 2) < 1e-3


def test_on_an_indefinite_one_it_becomes_the_absolute_inverse_in_the_mean():
    hessian = x_shaped_hessian(4, 4.0, seed=0, indefinite=True)
    target = absolute_inverse(hessian)
    x = nn.Parameter(torch.ones(4, dtype=FLOAT))
    optimizer = PSGD([x], lr=0.0, curvature="hvp")
    total = torch.zeros_like(target)
    for t in range(2000):
        optimizer.step(lambda: 0.5 * x @ hessian @ x)
        if t >= 500:
            total += inverse_of(optimizer, [x]) / 1500
    # A constant rate of 0.1 leaves fluctuations of about 0.1, and a bias of their square.
    assert (total - target).norm() / target.norm() < 0.06


def test_on_a_diagonal_plus_low_rank_quadratic_it_whitens_the_hessian():
    hessian = low_rank_hessian(8, 1, seed=0)
    P = fit(hessian, 2500, kind="lra", rank=1)
    values = torch.linalg.eigvals(P @ hessian).real
    assert values.max() / values.min() < 1.05
    assert values.mean() == pytest.approx(1, abs=0.05)


def test_on_a_kronecker_quadratic_it_becomes_the_inverse_hessian():
    A, B = (M @ M.T + torch.eye(len(M), dtype=FLOAT) for M in (normal(3, 3), normal(4, 4, seed=1)))
    W = nn.Parameter(torch.ones(3, 4, dtype=FLOAT))
    optimizer = PSGD([W], lr=0.0, kind="kron", curvature="hvp")
    for _ in range(1200):
        optimizer.step(lambda: 0.5 * (W * (A @ W @ B)).sum())
    error = inverse_of(optimizer, [W]) @ torch.kron(A, B) - torch.eye(12, dtype=FLOAT)
    assert torch.linalg.matrix_norm(error, 2) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_step_of_rate_one_is_newtons(kind):
    hessian = torch.diag(torch.tensor([1.0, 10.0, 3.0, 0.3], dtype=FLOAT))
    x = nn.Parameter(torch.ones(4, dtype=FLOAT))
    optimizer = PSGD([x], lr=0.0, kind=kind, curvature="hvp", rank=1, max_skew=100.0)
    for _ in range(1500):
        optimizer.step(lambda: 0.5 * x @ hessian @ x)
    optimizer.param_groups[0].update(lr=1.0, update_probability=0.0)
    optimizer.step(lambda: 0.5 * x @ hessian @ x)
    assert x.abs().max() < 1e-2


def test_exact_steps_are_those_of_psgd_torch():
    """Its functions on Hessian products taken apart from the optimizer, at the optimizer's probes."""
    psgd = pytest.importorskip("psgd_torch.psgd")
    x = nn.Parameter(0.1 * normal(7))
    y = x.detach().clone()
    a, b = torch.full_like(y, 0.4), torch.zeros_like(y)

    def loss(z):
        return (1 - z[:-1]).square().sum() + 10 * (z[1:] - z[:-1].square()).square().sum()

    optimizer = PSGD([x], lr=0.1, curvature="hvp", init_scale=0.4, seed=3)
    for t in range(1, 201):
        optimizer.step(lambda: loss(x))
        v = torch.randn(7, dtype=FLOAT, generator=generator(3, -2, t, "cpu"))
        gradient, h = hvp(loss, y, v)
        psgd.update_precond_Xmat_math_(a, b, v, h, 0.1, "2nd", torch.finfo(FLOAT).tiny)
        y = y - 0.1 * psgd.precond_grad_Xmat_math(a, b, gradient)
        torch.testing.assert_close(x.detach(), y, rtol=0, atol=1e-12)


def hvp(loss, y, v):
    z = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z, create_graph=True)
    (h,) = torch.autograd.grad(gradient, z, v)
    return gradient.detach(), h


@pytest.mark.parametrize("kind", KINDS)
def test_three_sources_of_curvature_agree(kind):
    results = {}
    for curvature in ("hvp", "difference", "objective"):
        model = network()
        objective = Objective.supervised(model, nn.MSELoss(), [(X, Y)]) if curvature == "objective" else None
        optimizer = PSGD(model.parameters(), lr=0.1, kind=kind, curvature=curvature, objective=objective)
        for _ in range(5):
            if curvature == "hvp":
                optimizer.step(lambda model=model: loss_of(model))
            elif curvature == "difference":
                optimizer.step(ordinary(model, optimizer))
            else:
                ordinary(model, optimizer)()
                optimizer.step()
        results[curvature] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(results["objective"], results["hvp"], rtol=0, atol=1e-10)
    # Forward differences with a step of 1.5e-8: truncation and rounding of about 1e-7.
    torch.testing.assert_close(results["difference"], results["hvp"], rtol=0, atol=1e-5)
    assert not torch.equal(results["difference"], results["hvp"])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_closure_may_keep_the_graph_of_its_backward():
    one, other = network(), network()
    first, second = (PSGD(m.parameters(), lr=0.1, curvature="hvp") for m in (one, other))

    def closure():
        second.zero_grad()
        value = loss_of(other)
        value.backward(create_graph=True)
        return value

    for _ in range(3):
        first.step(lambda: loss_of(one))
        second.step(closure)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
        assert not q.grad.requires_grad


def test_a_backward_that_freed_the_graph_is_refused():
    model = network()
    optimizer = PSGD(model.parameters(), curvature="hvp")
    with pytest.raises(ValueError, match="return the loss without backward"):
        optimizer.step(ordinary(model, optimizer))
    with pytest.raises(TypeError, match="without float"):
        optimizer.step(lambda: float(loss_of(model).detach()))
    assert not optimizer.state


def test_a_loss_without_a_second_derivative_is_said_so():
    x, y = nn.Parameter(normal(3, 2)), normal(4, 2, seed=1)
    with pytest.raises(RuntimeError, match="curvature='difference'"):
        PSGD([x], curvature="hvp").step(lambda: torch.cdist(x, y, p=1.5).square().sum())


def test_the_second_call_of_a_closure_sees_the_same_dropout_and_leaves_no_trace():
    model = network(dropout=0.5, dtype=torch.float32)
    optimizer = PSGD(model.parameters(), lr=0.0, lr_preconditioner=0.1)
    masks, weights = [], []
    model[2].register_forward_hook(lambda module, args, out: masks.append((out != 0).clone()))

    def closure():
        optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
        value = model(X.float()).square().mean()
        value.backward()
        return value

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(X.float())
        once = torch.get_rng_state()
        torch.manual_seed(0)
        masks.clear()
        optimizer.step(closure)
        assert torch.equal(torch.get_rng_state(), once)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(weights[0][0], weights[1][0])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights[0], strict=True))


def test_the_gradient_at_the_weights_is_left_behind():
    model = network()
    optimizer = PSGD(model.parameters(), lr=0.0)
    optimizer.step(ordinary(model, optimizer))
    left = [p.grad.clone() for p in model.parameters()]
    ordinary(model, optimizer)()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), left, strict=True))


def test_a_closure_that_fails_at_the_second_call_leaves_the_weights():
    model = network()
    optimizer = PSGD(model.parameters())
    before = copy.deepcopy(model.state_dict())
    calls = []

    def closure():
        if calls:
            raise FloatingPointError("second")
        return ordinary(model, optimizer, calls)()

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_the_closure_is_called_once_where_nothing_is_fitted():
    model = network()
    optimizer = PSGD(model.parameters(), lr=0.01, update_probability=0.0)
    calls = []
    for expected in (2, 3, 4):  # the first step has to begin the fit
        optimizer.step(ordinary(model, optimizer, calls))
        assert len(calls) == expected


def test_only_newton_pairs_from_a_loss_need_a_closure():
    model = network()
    objective = Objective.supervised(model, nn.MSELoss(), [(X, Y)])
    assert needs_closure(PSGD(model.parameters()))
    assert needs_closure(PSGD(model.parameters(), curvature="hvp"))
    assert not needs_closure(PSGD(model.parameters(), mode="whiten"))
    assert not needs_closure(PSGD(model.parameters(), curvature="objective", objective=objective))
    with pytest.raises(TypeError, match=r"step\(closure\).*mode='whiten'"):
        PSGD(model.parameters()).step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_its_threshold_is_the_onset_of_divergence(kind, momentum, weight_decay):
    M = normal(6, 6, seed=4)
    hessian = M @ M.T + 0.1 * torch.eye(6, dtype=FLOAT)
    x = nn.Parameter(torch.ones(2, 3, dtype=FLOAT))

    def loss():
        return 0.5 * x.flatten() @ hessian @ x.flatten()

    optimizer = PSGD([x], lr=0.0, kind=kind, rank=2, curvature="hvp", momentum=momentum, weight_decay=weight_decay)
    for _ in range(30):
        optimizer.step(loss)
    optimizer.param_groups[0]["update_probability"] = 0.0
    root = optimizer.joint_preconditioner([x])
    sharpness = float(torch.linalg.eigvalsh(PreconditionedOperator(DenseOperator(hessian), root).dense()).max())
    state = copy.deepcopy(optimizer.state_dict())

    def grows(lr):
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = lr
        x.data.fill_(1.0)
        optimizer.state[x].pop("momentum", None)
        sizes = []
        for _ in range(500):
            optimizer.step(loss)
            sizes.append(float(x.detach().norm()))
        return max(sizes[-50:]) > max(sizes[200:250])

    def rate_with(threshold):
        low, high = 1e-6, 1e6
        for _ in range(100):
            middle = math.sqrt(low * high)
            found = optimizer.threshold_of_group({**optimizer.param_groups[0], "lr": middle}) or 0.0
            low, high = (middle, high) if found > threshold else (low, middle)
        return low

    assert grows(rate_with(0.98 * sharpness))
    assert not grows(rate_with(1.02 * sharpness))


def test_there_is_no_threshold_where_nothing_moves_or_groups_differ():
    model = network()
    assert PSGD(model.parameters(), lr=0.0).stability_threshold() is None
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}]
    optimizer = PSGD(groups, lr=0.1)
    assert optimizer.stability_threshold() is None
    assert optimizer.threshold_of_group(optimizer.param_groups[1]) == pytest.approx(4.0)


@pytest.mark.parametrize("kind", KINDS)
def test_preconditioners_of_parameters_are_blocks_of_the_joint_one(kind):
    model = network()
    optimizer = PSGD(model.parameters(), lr=0.1, kind=kind, curvature="hvp")
    for _ in range(20):
        optimizer.step(lambda: loss_of(model))
    params = list(model.parameters())
    P = inverse_of(optimizer, params)
    g = [normal(*p.shape, seed=i) for i, p in enumerate(params)]
    expected = torch.cat([d.flatten() for d in optimizer.precondition(g)])
    torch.testing.assert_close(P @ torch.cat([t.flatten() for t in g]), expected, rtol=1e-12, atol=1e-12)
    turned = inverse_of(optimizer, params[::-1])
    order = torch.cat([i.flatten() for i in torch.arange(len(P)).split([p.numel() for p in params])[::-1]])
    torch.testing.assert_close(turned, P[order][:, order])
    offset = 0
    for p in params:
        block = P[offset : offset + p.numel(), offset : offset + p.numel()]
        root = optimizer.preconditioner(p)
        R = root.apply(torch.eye(p.numel(), dtype=FLOAT))
        torch.testing.assert_close(R.T @ R, block)
        torch.testing.assert_close(root.transposed(torch.eye(len(R), dtype=FLOAT)), R.T)
        offset += p.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_along_the_stated_preconditioner(kind):
    model = network()
    optimizer = PSGD(model.parameters(), lr=0.3, kind=kind, weight_decay=0.1, curvature="hvp")
    params = list(model.parameters())
    for _ in range(5):
        before = torch.cat([p.detach().flatten() for p in params])
        optimizer.step(lambda: loss_of(model))
        g = torch.cat([p.grad.flatten() for p in params])
        after = torch.cat([p.detach().flatten() for p in params])
        torch.testing.assert_close(after, before * (1 - 0.03) - 0.3 * inverse_of(optimizer, params) @ g)


def test_before_the_first_fit_p_is_the_initial_scale():
    model = network()
    p = model[0].weight
    for scale, expected in ((None, 1.0), (2.0, 0.25)):
        optimizer = PSGD(model.parameters(), init_scale=scale)
        assert optimizer.joint_preconditioner([p]) is None
        assert torch.equal(optimizer.preconditioner(p, p), torch.full_like(p, expected))
        with pytest.raises(ValueError, match="pass `gradient`"):
            optimizer.preconditioner(p)


def test_the_criterion_falls_to_its_minimum():
    hessian = x_shaped_hessian(6, 20.0, seed=0)
    x = nn.Parameter(torch.ones(6, dtype=FLOAT))
    optimizer = PSGD([x], lr=0.0, curvature="hvp")
    assert optimizer.criterion is None
    values, balance = [], []
    for _ in range(1500):
        optimizer.step(lambda: 0.5 * x @ hessian @ x)
        values.append(optimizer.criterion)
        balance.append(optimizer.imbalance)
    # At P = H^-1 it is 2 v^T H v with mean 2 tr H, which 300 probes estimate to some per cent.
    assert sum(values[-300:]) / 300 == pytest.approx(2 * float(hessian.trace()), rel=0.2)
    assert max(map(abs, balance[-300:])) < 1e-6 * 2 * float(hessian.trace())


@pytest.mark.parametrize("mode", ["newton", "whiten"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_breaks_before_there_is_a_gradient(kind, mode):
    """A head of zeros: at the first step the layers below it have zero gradients; then a loss without any."""
    model = network(dtype=torch.float32)
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    optimizer = PSGD(model.parameters(), lr=0.01, kind=kind, mode=mode)

    def closure(factor=1.0):
        optimizer.zero_grad()
        value = factor * (model(X.float()) - Y.float()).square().mean()
        value.backward()
        return value

    for factor in (0.0, 1.0, 1.0, 0.0, 1.0):
        if mode == "whiten":
            closure(factor)
        optimizer.step((lambda factor=factor: closure(factor)) if mode == "newton" else None)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert float(closure().detach()) < float(Y.square().mean())


def test_damping_bounds_p_where_there_is_no_curvature():
    values = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=FLOAT)
    largest = {}
    for damping in (0.0, 0.1):
        x = nn.Parameter(torch.ones(4, dtype=FLOAT))
        optimizer = PSGD([x], lr=0.0, curvature="hvp", damping=damping)
        for _ in range(400):
            optimizer.step(lambda x=x: 0.5 * (values * x.square()).sum())
        largest[damping] = float(inverse_of(optimizer, [x]).diagonal().max())
    # Without damping P grows by a constant amount per step; with it the limit is about 1 / (0.1 mean|h|) = 25.
    assert largest[0.0] > 100
    assert largest[0.1] < 80


def test_the_order_of_tensors_is_part_of_the_state():
    model = network()
    optimizer = PSGD(model.named_parameters(), lr=0.01, mode="whiten")
    ordinary(model, optimizer)()
    optimizer.step()
    saved = optimizer.state_dict()
    turned = PSGD(list(model.named_parameters())[::-1], mode="whiten")
    with pytest.raises(ValueError, match="same order"):
        turned.load_state_dict(saved)
    nameless = PSGD(list(model.parameters())[::-1], mode="whiten")
    with pytest.raises(ValueError, match="same order"):
        nameless.load_state_dict(saved)


def test_other_tensors_in_the_vector_restart_the_couplings_and_keep_the_diagonal():
    model = network()
    params = list(model.parameters())
    optimizer = PSGD(params, lr=0.0, lr_preconditioner=0.3, mode="whiten")
    for _ in range(30):
        ordinary(model, optimizer)()
        optimizer.step()
    P = inverse_of(optimizer, params).diagonal()
    assert any(bool(optimizer.state[p]["b"].any()) for p in params)
    params[1].grad = None
    optimizer.param_groups[0]["update_probability"] = 0.0
    optimizer.step()
    rest = [p for p in params if p is not params[1]]
    torch.testing.assert_close(inverse_of(optimizer, rest), torch.diag(P[[*range(20), *range(25, 37)]]))
    assert not inverse_of(optimizer, [params[1]] + rest)[:5].any()  # it does not move, so its columns are zero


def test_a_missing_gradient_leaves_the_others_rows_of_lra_alone():
    model = network()
    params = list(model.parameters())
    optimizer = PSGD(params, lr=0.1, kind="lra", mode="whiten")
    for _ in range(3):
        ordinary(model, optimizer)()
        optimizer.step()
    ordinary(model, optimizer)()
    params[0].grad = None
    kept, before = copy.deepcopy(optimizer.state[params[0]]), params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert all(torch.equal(kept[key], optimizer.state[params[0]][key]) for key in kept)


def test_half_precision_is_fitted_in_float32():
    for mode in ("newton", "whiten"):
        model = network(dtype=torch.bfloat16)
        optimizer = PSGD(model.parameters(), lr=0.01, mode=mode, momentum=0.9)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            value = (model(X.bfloat16()) - Y.bfloat16()).float().square().mean()
            value.backward()
            return value

        first = float(closure().detach())
        for _ in range(40):
            closure()
            optimizer.step(closure if mode == "newton" else None)
        kept = {v.dtype for state in optimizer.state.values() for v in state.values()}
        assert kept == {torch.float32}
        assert float(closure().detach()) < first


def test_steps_are_clipped_together():
    model = network()
    optimizer = PSGD(model.parameters(), lr=1.0, mode="whiten", clip=0.01)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    ordinary(model, optimizer)()
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-9)


def test_the_seed_decides_and_the_global_stream_is_untouched():
    ends = []
    for seed in (0, 0, 1):
        model = network()
        optimizer = PSGD(model.parameters(), lr=0.1, seed=seed, mode="whiten")
        state = torch.get_rng_state()
        for _ in range(3):
            ordinary(model, optimizer)()
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(model[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_an_objective_must_know_every_parameter():
    model = network()
    objective = Objective.supervised(model, nn.MSELoss(), [(X, Y)], params=["0.*"])
    optimizer = PSGD(model.parameters(), curvature="objective", objective=objective)
    ordinary(model, optimizer)()
    with pytest.raises(ValueError, match="`objective` does not analyse every parameter"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "dense"}, "`kind` is 'dense'.*'xmat', 'lra', 'kron'"),
        ({"mode": "fisher"}, "`mode` is 'fisher'"),
        ({"curvature": "exact"}, "`curvature` is 'exact'"),
        ({"normalizer": "3rd"}, "`normalizer` is '3rd'"),
        ({"lr_preconditioner": 1.5}, "`lr_preconditioner` is 1.5"),
        ({"update_probability": 1.5}, "`update_probability` is 1.5"),
        ({"rank": 1.5}, "`rank` is 1.5"),
        ({"rank": -1}, "`rank` is -1"),
        ({"init_scale": 0.0}, "`init_scale` is 0"),
        ({"damping": -1.0}, "`damping` is -1"),
        ({"clip": 0.0}, "`clip` is 0"),
        ({"max_size": -1}, "`max_size` is -1"),
        ({"curvature": "objective"}, "`objective` is missing"),
        ({"objective": 3}, "`objective` is given"),
        ({"objective": 3, "curvature": "objective"}, "`objective` is a int"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        PSGD(network().parameters(), **options)


def test_one_fit_has_one_set_of_options():
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "rank": 3}]
    with pytest.raises(ValueError, match="`rank` is 3 in one group and 10 in another"):
        PSGD(groups, kind="lra")
    with pytest.raises(ValueError, match="give one for each of 4"):
        PSGD(model.parameters()).precondition([None])
