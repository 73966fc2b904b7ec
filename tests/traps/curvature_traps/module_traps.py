"""Traps in the model: layers whose second derivatives, statistics or randomness go wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import oracle
from .adapter import Adapter
from .checks import (
    matrix_of,
    right_empirical_fisher,
    right_gauss_newton,
    right_gradient_covariance,
    right_hessian,
    same_matrix,
)
from .models import Attention, Checkpointed, Normalised, classification, cut, labelled, mlp
from .outcome import WrongAnswer, trap
from .problem import Problem


def _with_batch_norm() -> nn.Sequential:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    with torch.no_grad():
        norm.running_mean = torch.randn(5)
        norm.running_var = 0.5 + torch.rand(5)
    return model


@trap("BatchNorm in eval mode", "modules")
def batch_norm_in_eval_mode(tool: Adapter) -> str:
    """With running statistics the loss is a mean over examples: batches equal one of all."""
    return right_hessian(tool, classification(_with_batch_norm(), batches=cut(labelled())))


@trap("BatchNorm in train mode", "modules")
def batch_norm_in_train_mode(tool: Adapter) -> str:
    """Asked for the training-mode loss on one batch: its Hessian goes through the statistics of the batch."""
    return right_hessian(tool, classification(_with_batch_norm(), mode="train"))


def _with_dropout(mode: str) -> Problem:
    body = mlp()
    return classification(nn.Sequential(body[0], body[1], nn.Dropout(0.5), body[2]), mode=mode)


def _read_twice(tool: Adapter, problem: Problem) -> Tensor:
    """The tool's matrix, once it has proved to be the same at a second read."""
    operator = tool.hessian(problem)
    first, second = (matrix_of(tool, operator, problem) for _ in range(2))
    moved = float((first - second).norm() / second.norm())
    if moved > 1e-3:
        raise WrongAnswer(f"answers without a word; two reads of its matrix differ by {moved:.0%}")
    return second


@trap("dropout left active", "modules", refusal="dropout|determinis|random")
def dropout_left_active(tool: Adapter) -> str:
    """The model was left in train mode: give the Hessian without dropout, or refuse because the loss is random."""
    problem = _with_dropout("eval")
    truth = oracle.hessian(problem)
    problem.model.train()
    return same_matrix(_read_twice(tool, problem), truth)


@trap("dropout asked for", "modules", refusal="dropout|determinis|random")
def dropout_asked_for(tool: Adapter) -> str:
    """The training-mode loss of a network with dropout is random and has no Hessian: refuse and say why."""
    _read_twice(tool, _with_dropout("train"))
    raise WrongAnswer("answers without a word, with dropout frozen or left out")


def _sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    return torch.randn(12, 6, 4), torch.randint(0, 3, (12,))


def _attending() -> Problem:
    torch.manual_seed(12)
    whole = _sequences()
    return Problem(Attention(plain=False), nn.CrossEntropyLoss(), [whole], whole, reference=Attention(plain=True))


@trap("default attention kernel", "modules")
def default_attention_kernel(tool: Adapter) -> str:
    """F.scaled_dot_product_attention as it is: its fused CPU kernel has no second derivative, the math kernel has."""
    return right_hessian(tool, _attending())


@trap("default attention kernel, Gauss-Newton", "modules")
def default_attention_kernel_gauss_newton(tool: Adapter) -> str:
    """The same for Jacobian products, which the fused kernel does not have either."""
    return right_gauss_newton(tool, _attending())


class _Encoder(nn.Module):
    """torch's own multi-head attention, which reaches the same kernel another way, into 3 classes."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            qkv = x @ self.attention.in_proj_weight.T + self.attention.in_proj_bias
            q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))  # [b, heads, t, 2]
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 2.0**0.5, dim=-1) @ v
            mixed = self.attention.out_proj(mixed.transpose(1, 2).flatten(2))
        else:
            mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(mixed.mean(dim=1))


@trap("nn.MultiheadAttention", "modules")
def multihead_attention(tool: Adapter) -> str:
    """torch's attention module in eval mode, with its fast path and its fused kernel."""
    torch.manual_seed(12)
    model, reference = _Encoder(plain=False), _Encoder(plain=True)
    whole = _sequences()
    return right_hessian(tool, Problem(model, nn.CrossEntropyLoss(), [whole], whole, reference=reference))


@trap("non-reentrant checkpointing", "modules")
def non_reentrant_checkpointing(tool: Adapter) -> str:
    """Activation checkpointing runs the forward pass again inside the backward pass, and again for each product."""
    body = mlp()
    return right_hessian(tool, classification(Checkpointed(body), batches=cut(labelled()), reference=body))


@trap("compiled module", "modules")
def compiled_module(tool: Adapter) -> str:
    """A torch.compile'd model (backend aot_eager): compiled backward graphs refuse a second derivative."""
    body = mlp()
    return right_hessian(tool, classification(torch.compile(body, backend="aot_eager"), reference=body))  # type: ignore[arg-type]


@trap("compiled module, inductor", "modules", slow=True)
def compiled_module_inductor(tool: Adapter) -> str:
    """The same with the default backend, which generates and compiles C++ on a CPU."""
    body = mlp()
    return right_hessian(tool, classification(torch.compile(body), reference=body))  # type: ignore[arg-type]


def _normalised(dtype: torch.dtype = torch.float64) -> Problem:
    data = labelled(24, dtype)
    reference = Normalised(plain=True)
    return Problem(Normalised().to(dtype), nn.CrossEntropyLoss(), cut(data, (12, 12)), data, reference=reference)


@trap("LayerNorm, every engine", "modules")
def layer_norm_every_engine(tool: Adapter) -> str:
    """Each of the tool's engines gives Hessian products through LayerNorm, to 1e-3 in the rows of its weight and bias:
    one vector at a time and many at once."""
    truth = oracle.hessian(_normalised())
    norm = slice(25, 35)  # weight and bias of the LayerNorm
    V = torch.randn(len(truth), 6, dtype=torch.float64)
    true_rows = (truth @ V)[norm]
    worst = 0.0
    for engine in tool.engines():
        operator = tool.hessian(_normalised(), engine)
        one_by_one = torch.stack([tool.product(operator, v) for v in V.unbind(dim=1)], dim=1)
        for how, products in (("one by one", one_by_one), ("at once", tool.products(operator, V))):
            error = float((products.detach()[norm] - true_rows).norm() / true_rows.norm())
            if error > 1e-3:
                raise WrongAnswer(f"engine {engine}, vectors {how}: the rows of LayerNorm are off by {error:.1%}")
            worst = max(worst, error)
    return f"{', '.join(tool.engines())}: rows of LayerNorm off by at most {worst:.1g}"


@trap("LayerNorm, Gauss-Newton", "modules")
def layer_norm_gauss_newton(tool: Adapter) -> str:
    """The generalised Gauss-Newton matrix through LayerNorm."""
    return right_gauss_newton(tool, _normalised())


@trap("LayerNorm, empirical Fisher", "modules")
def layer_norm_empirical_fisher(tool: Adapter) -> str:
    """The mean outer product of per-example gradients through LayerNorm, two batches."""
    return right_empirical_fisher(tool, _normalised())


@trap("LayerNorm, gradient covariance", "modules")
def layer_norm_gradient_covariance(tool: Adapter) -> str:
    """The centred covariance of per-example gradients through LayerNorm, two batches."""
    return right_gradient_covariance(tool, _normalised())
