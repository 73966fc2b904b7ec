"""Runs of products at fixed weights: the same numbers, without a look at the weights before every product."""

import pytest
import torch
from sharpscope import GGN, Hessian, Objective, top_eigenvalues
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Runs its layers again in every backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Dropout(0.5), nn.Linear(5, 4))
        self.outer = nn.Linear(4, 3)
        self.runs = 0

    def run(self, x):
        self.runs += 1
        return self.inner(x)

    def forward(self, x):
        return self.outer(checkpoint(self.run, x, use_reentrant=False))


@pytest.fixture
def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()
    batches = [(torch.randn(k, 4, dtype=torch.float64), torch.randint(0, 3, (k,))) for k in (5, 3)]
    return Objective.supervised(model, nn.CrossEntropyLoss(), batches)


@pytest.fixture
def looks(objective, monkeypatch):
    """How often the weights were looked at."""
    counted = []
    look = Objective.state_token

    def counting(self):
        if self._fixed_token is None:
            counted.append(1)
        return look(self)

    monkeypatch.setattr(Objective, "state_token", counting)
    return counted


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_products_are_the_same_and_the_weights_are_looked_at_once(objective, looks, kind):
    op = kind(objective)
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    expected = [op @ v, op @ (2 * v)]
    looks.clear()
    with op.fixed(), op.fixed():
        found = [op @ v, op @ (2 * v)]
    assert len(looks) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("wrapped", [lambda op: op + op, lambda op: op * 2.0])
def test_wrappers_hand_it_on(objective, looks, kind, wrapped):
    op = wrapped(kind(objective))
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    op @ v
    looks.clear()
    with op.fixed():
        op @ v
        op @ v
    assert len(looks) == 1


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_change_after_the_run_is_seen(objective, kind):
    op = kind(objective)
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    with op.fixed():
        op @ v
    objective.model[0].weight.data.mul_(1.5)
    assert torch.equal(op @ v, kind(objective) @ v)


def test_an_error_inside_ends_it(objective):
    op = Hessian(objective)
    v = torch.randn(objective.num_parameters, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"), op.fixed():
        op @ (v * torch.inf)
    objective.model[0].weight.data.mul_(1.5)
    assert torch.equal(op @ v, Hessian(objective) @ v)


def test_an_algorithm_is_one_run(objective, looks):
    op = Hessian(objective)
    found = top_eigenvalues(op, 2, coarse=False)
    assert found.products > 3
    assert len(looks) <= 2


def test_activation_checkpointing_finds_the_model_as_it_was_evaluated():
    torch.manual_seed(0)
    model = Checkpointed().double().train()
    data = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    op = Hessian(Objective.supervised(model, nn.CrossEntropyLoss(), data))
    v = torch.randn(op.shape[0], dtype=torch.float64)
    plain = nn.Sequential(model.inner, model.outer).eval()
    expected = Hessian(Objective.supervised(plain, nn.CrossEntropyLoss(), data)) @ v
    model.train()
    op @ v
    with op.fixed():
        found = op @ v
    # Dropout would be on if the layers ran again as the model stands outside an evaluation.
    assert model.training
    assert model.inner.training
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
