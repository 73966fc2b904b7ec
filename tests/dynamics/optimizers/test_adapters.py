"""For every optimizer of torch.optim P is exactly what its step divides by, and the threshold where it diverges."""

import copy
import warnings

import pytest
import torch
from sharpscope.dynamics.optimizers.adapters import adapted
from sharpscope.dynamics.optimizers.combined import CombinedOptimizer
from sharpscope.dynamics.optimizers.recurrences import recurrence_threshold
from sharpscope.dynamics.optimizers.torch_adam import nadam_weights
from sharpscope.dynamics.optimizers.torch_geometry import NoPreconditionerError
from sharpscope.hessian import Root
from torch import nn, optim

# name: class, options, what of the step P⁻¹ is applied to, from state after the step, old state, seen gradient
ADAPTIVE = {
    "sgd": (optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "heavy ball": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3}),
    "nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "asgd": (optim.ASGD, {"lr": 0.1, "lambd": 0.7, "alpha": 0.6, "weight_decay": 0.2}),
    "adam": (optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.03}),
    "adam, decay": (optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.3}),
    "adam, amsgrad": (optim.Adam, {"lr": 0.01, "betas": (0.8, 0.5), "amsgrad": True}),
    "adam, maximize": (optim.Adam, {"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "adam, tensor lr": (optim.Adam, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False}),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.4}),
    "adamax": (optim.Adamax, {"lr": 0.01, "betas": (0.7, 0.9), "weight_decay": 0.2, "eps": 0.01}),
    "nadam": (optim.NAdam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2}),
    "nadam, decoupled": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "radam": (optim.RAdam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2}),
    "radam, decoupled": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.1, "weight_decay": 0.2}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "eps": 0.02, "weight_decay": 0.2}),
    "rmsprop, centred": (optim.RMSprop, {"lr": 0.01, "alpha": 0.7, "centered": True}),
    "rmsprop, momentum": (optim.RMSprop, {"lr": 0.01, "alpha": 0.7, "momentum": 0.8}),
    "adadelta": (optim.Adadelta, {"lr": 0.5, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.2}),
    "adafactor": (optim.Adafactor, {"lr": 0.1, "weight_decay": 0.2, "d": 1.5}),
}
NO_GEOMETRY = {
    "rprop": (optim.Rprop, {"lr": 0.01}),
    "lbfgs": (optim.LBFGS, {"lr": 0.1}),
    "sparse adam": (optim.SparseAdam, {"lr": 0.1}),
}


def parameters():
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 3, 2)]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def driven(optimizer, group, p, old, before, g):
    """What P⁻¹ is applied to in a step, from the state that it left; and the weights that it was subtracted from."""
    state, name = optimizer.state[p], type(optimizer).__name__
    decay = float(group.get("weight_decay", 0.0))
    decoupled = name in ("AdamW", "Adafactor") or group.get("decoupled_weight_decay")
    start = before * (1 - float(group["lr"]) * decay) if decoupled else before
    if group.get("maximize"):
        g = -g
    if not decoupled:
        g = g + decay * before
    if name == "ASGD":
        return g + group["lambd"] * before, start
    if name == "SGD":
        if not group["momentum"]:
            return g, start
        buffer = state["momentum_buffer"]
        return (g + group["momentum"] * buffer if group["nesterov"] else buffer), start
    if name == "NAdam":
        along_gradient, along_momentum = nadam_weights(group, *old)
        return along_gradient * g + along_momentum * state["exp_avg"], start
    return state.get("exp_avg", g), start


@pytest.fixture
def float64_counts():
    """torch keeps step counts and products of β in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_counts")
@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_step_divides_by_the_preconditioner(name):
    kind, options = ADAPTIVE[name]
    params = parameters()
    optimizer = kind([{"params": params[:1]}, {"params": params[1:], "lr": options["lr"] / 2}], **options)
    torch.manual_seed(1)
    for _ in range(12):
        scale = 10 ** torch.randn(())
        for p in params:
            p.grad = scale * torch.randn_like(p)
        before = [p.detach().clone() for p in params]
        told = [adapted(optimizer).preconditioner(p, p.grad) for p in params]
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer", torch.zeros_like(p)) for p in params]
        buffers = [None if b is None else b.clone() for b in buffers]
        states = [optimizer.state.get(p, {}) for p in params]
        old = [(int(s.get("step", 0)), float(s.get("mu_product", 1.0))) for s in states]
        optimizer.step()
        for i, (p, P) in enumerate(zip(params, told, strict=True)):
            group = optimizer.param_groups[0 if i == 0 else 1]
            m, start = driven(optimizer, group, p, old[i], before[i], p.grad)
            expected = start - float(group["lr"]) * m / P
            if kind is optim.RMSprop and group["momentum"]:  # the buffer has taken in P⁻¹ g already
                expected = expected - float(group["lr"]) * group["momentum"] * buffers[i]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-14)
            if kind not in (optim.Adadelta, optim.Adafactor):
                last = adapted(optimizer).preconditioner(p)
                torch.testing.assert_close(last, P, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_reading_changes_nothing(name):
    kind, options = ADAPTIVE[name]
    params = parameters()
    optimizer = kind(params, **options)
    for stage in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        state, keys = copy.deepcopy(optimizer.state_dict()), set(optimizer.state)
        geometry = adapted(optimizer)
        for p in params:
            geometry.preconditioner(p, p.grad)
            geometry.is_idle(p, p.grad)
            if stage and kind is not optim.Adafactor:
                geometry.preconditioner(p)
        geometry.threshold_of_group(optimizer.param_groups[0])
        assert set(optimizer.state) == keys
        after = optimizer.state_dict()
        for i, saved in state["state"].items():
            for key, value in saved.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, after["state"][i][key])
                else:
                    assert value == after["state"][i][key]
        optimizer.step()


def freeze(optimizer, p, level):
    """State after very many steps with a second moment `level`, which the next steps change by rounding only."""
    state = optimizer.state[p]
    kind = type(optimizer)
    # So late that no bias is left to correct; Adafactor's relative step falls with the count.
    state["step"] = torch.tensor(1e4 if kind is optim.Adafactor else 1e30)
    if kind in (optim.Adam, optim.AdamW, optim.RAdam, optim.NAdam):
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), level.clone()
    if optimizer.param_groups[0].get("amsgrad"):
        state["max_exp_avg_sq"] = 4 * level
    if kind is optim.NAdam:
        state["mu_product"] = torch.tensor(0.0)
    if kind is optim.Adamax:
        state["exp_avg"], state["exp_inf"] = torch.zeros_like(p), level.sqrt() * 1e3
    if kind is optim.Adagrad:
        state["sum"] = level * 1e6
    if kind is optim.RMSprop:
        state["square_avg"], state["momentum_buffer"] = level.clone(), torch.zeros_like(p)
        state["grad_avg"] = torch.zeros_like(p)
    if kind is optim.Adadelta:
        state["square_avg"], state["acc_delta"] = level.clone(), level.flip(0).clone()
    if kind is optim.Adafactor:
        state["variance"] = level.clone()


HELD = 1 - 1e-13
THRESHOLDS = {
    "heavy ball": (optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "dampening": (optim.SGD, {"momentum": 0.5, "dampening": 0.4}),
    "asgd": (optim.ASGD, {"lambd": 0.01, "weight_decay": 0.02, "alpha": 0.0}),
    "adam": (optim.Adam, {"betas": (0.9, HELD)}),
    "adam, decay": (optim.Adam, {"betas": (0.8, HELD), "weight_decay": 0.05}),
    "adam, amsgrad": (optim.Adam, {"betas": (0.5, HELD), "amsgrad": True}),
    "adamw": (optim.AdamW, {"betas": (0.9, HELD), "weight_decay": 1.0}),
    "adamax": (optim.Adamax, {"betas": (0.9, 1 - 1e-12)}),
    "nadam": (optim.NAdam, {"betas": (0.9, HELD), "momentum_decay": 10.0}),
    "nadam, decoupled": (
        optim.NAdam,
        {"betas": (0.7, HELD), "momentum_decay": 10.0, "weight_decay": 1.0, "decoupled_weight_decay": True},
    ),
    "radam": (optim.RAdam, {"betas": (0.9, HELD)}),
    "adagrad": (optim.Adagrad, {"weight_decay": 0.05}),
    "rmsprop": (optim.RMSprop, {"alpha": HELD}),
    "rmsprop, momentum": (optim.RMSprop, {"alpha": HELD, "momentum": 0.9, "weight_decay": 0.05}),
    "rmsprop, centred": (optim.RMSprop, {"alpha": HELD, "centered": True, "momentum": 0.5}),
    "adadelta": (optim.Adadelta, {"rho": HELD}),
    # The relative step is held by ε₂ above the weights, the clipping by a large d.
    "adafactor": (optim.Adafactor, {"eps": (None, 1.0), "d": 1e30, "beta2_decay": -4.0}),
    "adafactor, decay": (optim.Adafactor, {"eps": (None, 1.0), "d": 1e30, "beta2_decay": -4.0, "weight_decay": 2.0}),
}


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_divergence_on_a_quadratic_sets_in_at_the_threshold(name, seed):
    """Weights start at 1e-9, so that their squares do not move a held second moment."""
    kind, options = THRESHOLDS[name]
    generator = torch.Generator().manual_seed(seed)
    n, lr = 6, 0.005
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A @ A.T + torch.eye(n, dtype=torch.float64)
    level = 10 ** torch.randn(n, generator=generator, dtype=torch.float64)

    def growth(scale):
        x = (1e-9 * torch.ones(n, dtype=torch.float64)).requires_grad_()
        optimizer = kind([x], lr=lr, **options)
        if kind is not optim.SGD and kind is not optim.ASGD:
            freeze(optimizer, x, level)
        geometry, group = adapted(optimizer), optimizer.param_groups[0]
        P = geometry.preconditioner(x, torch.zeros_like(x))
        decay = geometry.coupled_weight_decay(group)
        threshold = geometry.threshold_of_group(group)
        R = P.rsqrt()
        # H with the wanted largest eigenvalue of P^-1/2 (H + λ) P^-1/2
        M = A / torch.linalg.eigvalsh(A)[-1] * threshold * scale
        H = M / R / R[:, None] - decay * torch.eye(n, dtype=torch.float64)
        peaks = []
        for _ in range(3):
            peak = 0.0
            for _ in range(600):
                x.grad = H @ x.detach()
                optimizer.step()
                peak = max(peak, float((x.detach() / R).norm()))
                if peak > 1e-3:
                    return 1.0
            peaks.append(peak)
        return peaks[2] / peaks[1] - 1.0

    assert growth(0.99) < 0
    assert growth(1.01) > 0


def test_thresholds_are_the_published_ones():
    p = [torch.ones(1, requires_grad=True)]
    group = optim.Adam(p, lr=1e-3, betas=(0.9, 0.999)).param_groups[0]
    assert adapted(optim.Adam(p)).threshold_of_group(group) == pytest.approx(38e3)
    assert recurrence_threshold(0.5) == 4.0
    assert recurrence_threshold(0.1, beta=0.9) == pytest.approx(2 * 1.9 / 0.1)
    assert recurrence_threshold(0.1, beta=0.9, along_gradient=1, along_momentum=0.9) == pytest.approx(
        2 * 1.9 / (0.1 * 2.8)
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("along_gradient", "along_momentum"), [(0.0, 1.0), (1.0, 0.5), (0.4, 0.6), (1.0, 0.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_companion_matrix_leaves_the_unit_circle_at_the_threshold(beta, along_gradient, along_momentum, weight_decay):
    lr, gain = 0.2, 1.7
    threshold = recurrence_threshold(
        lr,
        beta=beta,
        gain=gain,
        along_gradient=along_gradient,
        along_momentum=along_momentum,
        weight_decay=weight_decay,
    )

    def radius(h):
        # (m, x) of the next step from those of this one
        to_m = [beta, gain * h]
        keep = 1 - lr * weight_decay - lr * along_gradient * h
        step = torch.tensor([to_m, [-lr * along_momentum * to_m[0], keep - lr * along_momentum * to_m[1]]])
        return float(torch.linalg.eigvals(step.double()).abs().max())

    assert radius(threshold * (1 - 1e-5)) < 1 < radius(threshold * (1 + 1e-5))
    assert all(radius(threshold * share) < 1 for share in (0.01, 0.3, 0.7, 0.95))


@pytest.mark.parametrize("name", NO_GEOMETRY)
def test_rules_without_a_fixed_geometry_say_so(name):
    kind, options = NO_GEOMETRY[name]
    p = torch.ones(3, requires_grad=True)
    optimizer = kind([p], **options)
    geometry = adapted(optimizer)
    assert geometry.preconditioner(p, torch.ones(3)) is None
    assert geometry.threshold_of_group(optimizer.param_groups[0]) is None


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rule", [None, "match_rms_adamw"])
def test_muon_is_a_polynomial_of_its_momentum(shape, nesterov, rule):
    torch.manual_seed(3)
    p = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    optimizer = optim.Muon([p], lr=0.1, nesterov=nesterov, weight_decay=0.0, adjust_lr_fn=rule)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        before = p.detach().clone()
        R = adapted(optimizer).preconditioner(p, p.grad)
        assert isinstance(R, Root)
        optimizer.step()
        m = optimizer.state[p]["momentum_buffer"]
        U = torch.lerp(p.grad, m, 0.95) if nesterov else m
        step = R.transposed(R.apply(U.reshape(-1, 1))).reshape(shape)
        # Newton-Schulz in float64, and torch's own in bfloat16.
        X = U / U.norm()
        for _ in range(5):
            XX = X @ X.T
            X = 3.4445 * X + (-4.7750 * XX + 2.0315 * XX @ XX) @ X
        ratio = max(1.0, shape[0] / shape[1]) ** 0.5 if rule is None else 0.2 * max(shape) ** 0.5
        torch.testing.assert_close(step, X * ratio, rtol=0, atol=1e-10)
        taken = (before - p.detach()) / 0.1
        assert float((taken - step).norm() / step.norm()) < 0.03
    if nesterov:
        with pytest.raises(NoPreconditionerError, match="nesterov"):
            adapted(optimizer).preconditioner(p)


def test_current_needs_a_step():
    p = torch.ones(3, requires_grad=True)
    for kind in (optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.RMSprop, optim.Adadelta):
        with pytest.raises(ValueError, match="has not made a step"):
            adapted(kind([p])).preconditioner(p)


def test_idle_coordinates_are_those_without_second_moment():
    for kind in (optim.Adam, optim.AdamW, optim.NAdam, optim.Adamax, optim.RMSprop, optim.Adadelta, optim.Adagrad):
        p = torch.ones(4, requires_grad=True)
        optimizer = kind([p], weight_decay=0.0)
        p.grad = torch.tensor([0.0, 1.0, 0.0, 0.0])
        optimizer.step()
        idle = adapted(optimizer).is_idle(p, torch.tensor([0.0, 0.0, 1e-3, 0.0]))
        assert idle.tolist() == [True, False, False, True], kind
        assert adapted(optimizer).is_idle(p).tolist() == [True, False, True, True], kind


def test_unknown_optimizer_is_the_identity_and_says_so_once():
    class Mine(optim.SGD):
        pass

    p = torch.ones(3, requires_grad=True)
    optimizer = Mine([p], lr=0.1)
    with pytest.warns(UserWarning, match="geometry of Mine is not known"):
        geometry = adapted(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(optimizer)
    assert torch.equal(geometry.preconditioner(p), torch.ones(3))
    assert geometry.threshold_of_group(optimizer.param_groups[0]) is None


def test_combined_optimizers_answer_for_their_own():
    model = nn.Linear(3, 2)
    parts = [optim.SGD([model.weight], lr=0.1), optim.Adam([model.bias], lr=0.01)]
    geometry = adapted(CombinedOptimizer(parts))
    g = torch.tensor([3.0, -4.0])
    assert torch.equal(geometry.preconditioner(model.weight, model.weight.detach()), torch.ones(2, 3))
    torch.testing.assert_close(geometry.preconditioner(model.bias, g), 0.1 * (g.abs() + 1e-8))
    thresholds = [geometry.threshold_of_group(group) for group in CombinedOptimizer(parts).param_groups]
    assert thresholds == pytest.approx([20.0, 3800.0])
