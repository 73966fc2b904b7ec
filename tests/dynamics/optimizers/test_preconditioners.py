"""P in the coordinates of an objective, against the tensors that it is made of."""

import pytest
import torch
from sharpscope.dynamics.optimizers import PSGD, stability_threshold_of
from sharpscope.dynamics.optimizers.block_diagonal_root import BlockDiagonalRoot
from sharpscope.dynamics.optimizers.combined import CombinedOptimizer
from sharpscope.dynamics.optimizers.preconditioners import preconditioner_of
from sharpscope.dynamics.optimizers.torch_geometry import NoPreconditionerError
from sharpscope.hessian import Hessian
from sharpscope.landscape.objective import Objective
from torch import nn, optim


@pytest.fixture
def case():
    """A tanh network in float64 with its objective."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))
    return model, Objective.supervised(model, nn.functional.cross_entropy, data)


def stepped(optimizer, objective, steps=3):
    for _ in range(steps):
        for p, g in zip(objective.parameters.values(), objective.layout.split(objective.gradient()), strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


def test_next_and_current_are_those_of_adam(case):
    model, objective = case
    optimizer = stepped(optim.Adam(model.parameters(), lr=1e-2), objective)
    states = [optimizer.state[p] for p in model.parameters()]
    v = torch.cat([s["exp_avg_sq"].reshape(-1) for s in states])
    g = objective.gradient()
    current = (1 - 0.9**3) * ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    following = (1 - 0.9**4) * (((0.999 * v + 0.001 * g**2) / (1 - 0.999**4)).sqrt() + 1e-8)
    torch.testing.assert_close(preconditioner_of(optimizer, objective, which="current").diagonal, current)
    P = preconditioner_of(optimizer, objective)
    torch.testing.assert_close(P.diagonal, following)
    torch.testing.assert_close(P.inverse(g), g / following)
    assert P.threshold == pytest.approx(3800.0)
    assert P.num_not_held == 0
    assert P.zero_share == 0.0


def test_operators_have_the_spectrum_of_the_dense_ones(case):
    model, objective = case
    groups = [{"params": list(model[0].parameters()), "lr": 0.03}, {"params": list(model[2].parameters())}]
    optimizer = stepped(optim.RMSprop(groups, lr=0.01, weight_decay=0.3), objective)
    P = preconditioner_of(optimizer, objective)
    H = Hessian(objective)
    dense, D = H.dense(), P.diagonal
    eigenvalues = torch.linalg.eigvals(dense / D[:, None]).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(P.operator(H).dense()), eigenvalues, rtol=1e-9, atol=1e-9)
    # The step x ← x − η P⁻¹ (H + λ) x, with η of each group, crosses −1 where the ratio is 1.
    lr = torch.tensor([0.03] * 36 + [0.01] * 21, dtype=torch.float64)
    eye = torch.eye(len(D), dtype=torch.float64)
    step = (lr / D)[:, None] * (dense + 0.3 * eye)
    largest = float(torch.linalg.eigvals(step).real.max())
    assert float(torch.linalg.eigvalsh(P.ratio_operator(H).dense())[-1]) == pytest.approx(largest / 2, rel=1e-9)
    assert P.threshold is None


def test_what_the_optimizer_does_not_hold_does_not_move(case):
    model, objective = case
    P = preconditioner_of(optim.Adam(model[2].parameters(), lr=0.1), objective)
    assert P.num_not_held == 36
    assert P.diagonal[:36].isinf().all()
    assert not P.moves[:36].any()
    assert (P.inverse(torch.ones(57, dtype=torch.float64))[:36] == 0).all()
    # The spectrum is that of the block that moves, and zeros.
    H = Hessian(objective)
    block = H.dense()[36:, 36:] / P.diagonal[36:].sqrt() / P.diagonal[36:, None].sqrt()
    torch.testing.assert_close(
        torch.linalg.eigvalsh(P.operator(H).dense())[-1], torch.linalg.eigvalsh(block)[-1], rtol=1e-9, atol=0
    )
    with pytest.raises(ValueError, match="holds none"):
        preconditioner_of(optim.Adam([torch.ones(2, requires_grad=True)]), objective)


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop, optim.Adagrad, optim.NAdam])
def test_dead_units_are_found_and_left_out(kind):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[0].bias[:3] = -100.0  # three units never fire
    data = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 2, (30,))
    objective = Objective.supervised(model, nn.functional.cross_entropy, data)
    optimizer = stepped(kind(model.parameters()), objective)
    dead = 3 * 4 + 3 + 3 * 2  # rows and biases of the units, their outgoing weights
    P = preconditioner_of(optimizer, objective)
    assert P.zero_share == pytest.approx(dead / objective.num_parameters)
    assert int(P.moves.count_nonzero()) == objective.num_parameters - dead
    assert P.num_not_held == 0
    kept = preconditioner_of(optimizer, objective, idle="keep")
    assert kept.moves.all()
    assert kept.zero_share == P.zero_share
    torch.testing.assert_close(kept.diagonal, P.diagonal)
    # With weight decay in the gradient they have one.
    decayed = stepped(kind(model.parameters(), weight_decay=0.1), objective)
    assert preconditioner_of(decayed, objective).zero_share == 0.0


def test_optimizers_that_do_not_say_what_is_idle():
    """The general rule: P is eps, the gradient zero, and so is what the state keeps for each entry."""

    class Mine(optim.Adam):
        def preconditioner(self, p, gradient=None):
            v = self.state[p]["exp_avg_sq"] if p in self.state else torch.zeros_like(p)
            return (v + gradient**2).sqrt() + 1e-8

        def threshold_of_group(self, group):
            return 2.0

        def coupled_weight_decay(self, group):
            return 0.0

    x = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    objective = Objective.from_closure(lambda x: (scale * x**2).sum() / 2, [x])
    optimizer = Mine([x])
    assert preconditioner_of(optimizer, objective).moves.tolist() == [True, False, False, False]
    x.grad = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert preconditioner_of(optimizer, objective).moves.tolist() == [True, True, False, False]


def test_roots_that_are_no_diagonals_are_put_in_their_places(case):
    model, objective = case
    matrices, others = [model[2].weight, model[0].weight], [model[0].bias, model[2].bias]
    pair = CombinedOptimizer([optim.Muon(matrices, lr=0.1), optim.Adam(others, lr=0.2)])
    P = preconditioner_of(pair, objective)
    assert isinstance(P.root, BlockDiagonalRoot)
    assert P.diagonal is None
    assert P.threshold_root is None
    R = P.root.apply(torch.eye(57, dtype=torch.float64))
    torch.testing.assert_close(P.root.transposed(torch.eye(57, dtype=torch.float64)), R.T)
    g = objective.gradient()
    steps = objective.layout.split(P.inverse(g))
    # Muon's first step along the gradient itself keeps its singular vectors.
    for step, gradient in zip(steps[::2], objective.layout.split(g)[::2], strict=True):
        U, _, V = torch.linalg.svd(gradient, full_matrices=False)
        found = U.T @ step @ V.T
        torch.testing.assert_close(found, torch.diag(found.diagonal()))
        assert (found.diagonal() > 0).all()
    for step, gradient in zip(steps[1::2], objective.layout.split(g)[1::2], strict=True):
        torch.testing.assert_close(step, gradient / (0.1 * (gradient.abs() + 1e-8)))


def test_psgd_is_read_as_one_matrix(case):
    model, objective = case
    optimizer = PSGD(model.parameters(), kind="lra", lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward(create_graph=True)
        return loss

    torch.manual_seed(0)
    data = torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))
    for _ in range(3):
        optimizer.step(closure)
    P = preconditioner_of(optimizer, objective, which="current")
    g = objective.gradient()
    expected = optimizer.precondition([part.clone() for part in objective.layout.split(g)])
    torch.testing.assert_close(P.inverse(g), torch.cat([part.reshape(-1) for part in expected]))
    assert P.threshold is not None


def test_objective_in_another_precision(case):
    model, _ = case
    model.float()
    data = torch.randn(20, 5), torch.randint(0, 3, (20,))
    exact = Objective.supervised(model, nn.functional.cross_entropy, data, dtype=torch.float64)
    P = preconditioner_of(optim.Adam(model.parameters()), exact)
    assert P.diagonal.dtype == torch.float64
    torch.testing.assert_close(P.diagonal, 0.1 * (exact.gradient().abs() + 1e-8), rtol=1e-9, atol=0)


def test_errors_name_the_cure(case):
    model, objective = case
    adam = optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="has not made a step"):
        preconditioner_of(adam, objective, which="current")
    with pytest.raises(ValueError, match="`which` is 'last'"):
        preconditioner_of(adam, objective, which="last")
    with pytest.raises(ValueError, match="`idle` is 'drop'"):
        preconditioner_of(adam, objective, idle="drop")
    with pytest.raises(NoPreconditionerError, match="take the plain curvature"):
        preconditioner_of(optim.LBFGS(model.parameters()), objective)
    with pytest.raises(ValueError, match="gradient is not finite"):
        preconditioner_of(adam, objective, gradient=torch.full((57,), torch.nan, dtype=torch.float64))
    zero = torch.zeros(57, dtype=torch.float64)
    without_eps = optim.Adam(model.parameters(), eps=0.0)
    assert preconditioner_of(without_eps, objective, gradient=zero).zero_share == 1.0
    with pytest.raises(ValueError, match="must be positive"):
        preconditioner_of(without_eps, objective, gradient=zero, idle="keep")


def test_an_infinite_preconditioner_stands_still(case):
    """As that of a sign method, |m|/0, where the sign is zero."""
    model, objective = case

    class Signs(optim.SGD):
        def preconditioner(self, p, gradient=None):
            return torch.where(gradient > 0, 1.0, torch.inf)

        def threshold_of_group(self, group):
            return None

        def coupled_weight_decay(self, group):
            return 0.0

    P = preconditioner_of(Signs(model.parameters()), objective)
    g = objective.gradient()
    assert torch.equal(P.moves, g > 0)
    assert torch.equal(P.inverse(g), g.clamp(min=0.0))
    assert P.num_not_held == int((g <= 0).sum())


def read_preconditioner(optimizer):
    return preconditioner_of(optimizer, Objective.from_closure(torch.sum, torch.ones(2)))


@pytest.mark.parametrize("read", [stability_threshold_of, read_preconditioner])
def test_what_is_no_optimizer_is_refused(read):
    with pytest.raises(TypeError, match="`optimizer` is a str; pass the optimizer in training"):
        read("Adam")


def test_what_is_no_objective_is_refused(case):
    model, objective = case
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="`objective` is a Sequential; give an Objective"):
        preconditioner_of(optimizer, model)
    with pytest.raises(ValueError, match=r"`gradient` has shape \[3\]"):
        preconditioner_of(optimizer, objective, gradient=torch.zeros(3))
