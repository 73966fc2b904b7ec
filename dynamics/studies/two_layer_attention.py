"""A two-layer transformer on a signal token and a noise token, and the numbers that describe its training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


class SignalNoiseTokens(NamedTuple):
    """`tokens` [n, 2, d]: y μ and ξ of each example; `labels` [n]: y = ±1."""

    tokens: Tensor
    labels: Tensor


def signal_noise_tokens(
    num: int, size: int, support: int, noise: float, *, seed: int, dtype: torch.dtype = torch.float32
) -> SignalNoiseTokens:
    """Examples X = [y μ, ξ] with μ = e_0 and a sparse ξ that says nothing of y.

    Args:
        num: Examples n; their labels are drawn with equal odds.
        size: d, of a token.
        support: Coordinates s in which a ξ is not zero, drawn anew for each example, never that of μ.
        noise: σ_p, standard deviation of those coordinates.
        seed: Another one gives fresh supports, noise and labels.

    Raises:
        ValueError: `support` is not in 1 to size − 1.

    Source: Li, Huang, Han, Zhou, Suzuki, Zhu, Chen, On the Optimization and Generalization of Two-layer Transformers
    with Sign Gradient Descent, 2025, its data.
    """
    if not 1 <= support < size:
        raise ValueError(f"`support` is {support}; the noise has `size` - 1 = {size - 1} coordinates: take 1 to that")
    random = torch.Generator().manual_seed(seed)
    labels = 2.0 * torch.randint(2, (num,), generator=random) - 1
    where = 1 + torch.rand(num, size - 1, generator=random, dtype=torch.float64).argsort(dim=1)[:, :support]
    values = noise * torch.randn(num, support, generator=random, dtype=torch.float64)
    tokens = torch.zeros(num, 2, size, dtype=torch.float64)
    tokens[:, 0, 0] = labels.double()
    tokens[:, 1].scatter_(1, where, values)
    return SignalNoiseTokens(tokens.to(dtype), labels.to(dtype))


class TwoLayerAttention(nn.Module):
    r"""f(X) = Σ_l vᵀ X softmax(Xᵀ W_Kᵀ W_Q x_l), with v the mean row of W_V,+1 minus that of W_V,−1.

    One head, trainable queries and keys, a linear value layer; l runs over both tokens as queries.

    Args:
        size: d, of a token.
        rows: Of W_Q and W_K.
        value_rows: m_v, of each W_V.
        scale: σ_0, standard deviation of all weights.
        seed: Of the weights.

    Source: Li et al. 2025, its model.
    """

    def __init__(
        self,
        size: int,
        *,
        rows: int = 100,
        value_rows: int = 20,
        scale: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def drawn(num: int) -> nn.Parameter:
            return nn.Parameter((scale * torch.randn(num, size, generator=random, dtype=torch.float64)).to(dtype))

        self.query, self.key = drawn(rows), drawn(rows)
        self.positive, self.negative = drawn(value_rows), drawn(value_rows)

    def value(self) -> Tensor:
        """v [d]."""
        return self.positive.mean(0) - self.negative.mean(0)

    def attention(self, tokens: Tensor) -> Tensor:
        """Weights [n, 2, 2] of query l on key k: s_11 at [:, 0, 0], s_21 (noise on signal) at [:, 1, 0]."""
        scores = (tokens @ self.query.mT) @ (tokens @ self.key.mT).mT
        return scores.softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """f [n] of tokens [n, 2, d]."""
        return (self.attention(tokens) @ (tokens @ self.value()).unsqueeze(-1)).sum((1, 2))


def logistic_loss(output: Tensor, labels: Tensor) -> Tensor:
    """mean log(1 + exp(−y f)), without overflow and without rounding small losses to zero."""
    return -logsigmoid(labels * output).mean()


@torch.no_grad()
def order_parameters(model: TwoLayerAttention, data: SignalNoiseTokens) -> dict[str, float]:
    """What the stages are read from, as means over examples i and neurons (rows) r.

    Returns:
        "s11", "s21": attention of the signal query and of the noise query on the signal key;
        "value_noise": ⟨v, y_i ξ_i⟩; "value_signal": ⟨v, μ⟩;
        "query_noise", "key_noise": |⟨w_r, ξ_i⟩|; "query_signal", "key_signal": |⟨w_r, μ⟩|;
        "aligned": share of pairs (r, i) in which query and key noise have one sign;
        "query_vote", "key_vote": share of rows whose ⟨w_r, μ⟩ has the sign of Σ_i ⟨w_K,r, y_i ξ_i⟩, the vote of the
        noise of all examples. A query that follows it is near 1, a key that opposes it near 0.
    """
    tokens, y = data.tokens, data.labels
    noise, signal = y[:, None] * tokens[:, 1], y[0] * tokens[0, 0]
    weights, v = model.attention(tokens), model.value()
    query, key = model.query @ noise.mT, model.key @ noise.mT  # [rows, n]
    query_signal, key_signal = model.query @ signal, model.key @ signal
    vote = key.sum(1).sign()
    found = {
        "s11": weights[:, 0, 0].mean(),
        "s21": weights[:, 1, 0].mean(),
        "value_noise": (noise @ v).mean(),
        "value_signal": signal @ v,
        "query_noise": query.abs().mean(),
        "key_noise": key.abs().mean(),
        "query_signal": query_signal.abs().mean(),
        "key_signal": key_signal.abs().mean(),
        "aligned": (query.sign() == key.sign()).double().mean(),
        "query_vote": (query_signal.sign() == vote).double().mean(),
        "key_vote": (key_signal.sign() == vote).double().mean(),
    }
    return {name: float(value) for name, value in found.items()}
