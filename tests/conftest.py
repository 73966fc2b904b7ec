"""Problems that many tests share, and the dense double-backward oracle that judges them."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# With the repository on sys.path a bare `import kernels` would find ours, and other packages do try that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]]

torch.set_num_threads(1)


class TinyTransformer(nn.Module):
    """Two pre-norm layers, causal SDPA attention, learned positions, output tied to the embedding."""

    def __init__(self, vocabulary=11, length=6, width=4, heads=2, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(TinyLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).transpose(1, 2)  # [b, vocabulary, length], as cross-entropy wants it


class TinyLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class FirstOrderSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def make_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, (torch.randn(70, 5), torch.randint(0, 3, (70,)))


def make_cnn():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(24, 4),
    )
    data = (torch.randn(40, 1, 8, 8), torch.randint(0, 4, (40,)))
    model(data[0])  # running statistics that are neither 0 nor 1
    return model.eval(), data


def make_transformer():
    torch.manual_seed(2)
    model = TinyTransformer()
    tokens = torch.randint(0, 11, (10, 7))
    return model, (tokens[:, :-1], tokens[:, 1:])


PROBLEMS = {"mlp": make_mlp, "cnn": make_cnn, "transformer": make_transformer}


def cast(problem, dtype):
    model, (inputs, targets) = problem
    return model.to(dtype), (inputs.to(dtype) if inputs.is_floating_point() else inputs, targets)


@pytest.fixture(params=PROBLEMS)
def problem(request):
    """(model, (inputs, targets)) in float64."""
    return cast(PROBLEMS[request.param](), torch.float64)


@pytest.fixture
def mlp():
    """A 70-example MLP in float64."""
    return cast(make_mlp(), torch.float64)


@pytest.fixture
def make_problem():
    """`make_problem(name, dtype)` -> (model, (inputs, targets))."""
    return lambda name, dtype=torch.float64: cast(PROBLEMS[name](), dtype)


@pytest.fixture(scope="session")
def dense_hessian():
    """`dense_hessian(loss, tensors)` -> [n, n] by one backward pass per row: the oracle, independent of the library."""

    def oracle(loss, tensors):
        tensors = list(tensors)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            value = loss()
            gradients = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
            flat = torch.cat(
                [(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(gradients, tensors, strict=True)]
            )
            rows = []
            for entry in flat:
                if not entry.requires_grad:
                    rows.append(torch.zeros_like(flat).detach())
                    continue
                row = torch.autograd.grad(entry, tensors, retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat(
                        [
                            (torch.zeros_like(t) if r is None else r).reshape(-1)
                            for r, t in zip(row, tensors, strict=True)
                        ]
                    )
                )
        return torch.stack(rows).detach()

    return oracle


@pytest.fixture(scope="session")
def first_order_square():
    """x -> x² whose backward refuses to be differentiated: a second derivative that `autograd.grad` drops silently."""
    return FirstOrderSquare.apply
