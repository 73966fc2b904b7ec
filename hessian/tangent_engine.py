"""Forward over reverse: the directional derivative of the gradient, for one vector or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from ..landscape.evaluation import Chunk
from .engines import Engine, NotTwiceDifferentiable

# Vectors carried through one vmapped pass: memory grows with it.
VMAPPED_VECTORS = 8


class PlainMeanSquares(TorchFunctionMode):
    """Writes the mean of F.mse_loss out: forward mode through its backward fails in torch 2.13 ("ZeroTensors")."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.mse_loss and _takes_plain_mean(kwargs):
            input, target = args if len(args) == 2 else (kwargs["input"], kwargs["target"])
            return (input - target).square().mean()
        return func(*args, **kwargs)


def _takes_plain_mean(options: dict) -> bool:
    others = ("size_average", "reduce", "weight")
    return options.get("reduction", "mean") == "mean" and all(options.get(name) is None for name in others)


class ForwardOverReverse(Engine):
    """H v = d/dε ∇L(θ + ε v) at ε = 0 by `torch.func`; several vectors go through vmap together.

    Nothing is kept between products, so memory stays near that of a gradient. The order is vmap(jvp(grad)):
    jvp(jacrev) and jvp(vmap(grad)) are wrong through layer_norm in torch 2.13.
    """

    name = "forward-over-reverse"

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        total = torch.zeros_like(V)
        with self.objective.evaluation() as theta:
            primals = tuple(theta[i].detach() for i in subset)
            for chunk in self.objective.chunks():
                for first in range(0, V.shape[1], VMAPPED_VECTORS):
                    part = V[:, first : first + VMAPPED_VECTORS]
                    try:
                        products = self._products(chunk, theta, primals, subset, part)
                    except RuntimeError as error:
                        if "saved tensor hooks" not in str(error):
                            raise
                        raise NotTwiceDifferentiable(
                            f"engine {self.name!r} cannot run activation checkpointing, which torch.func does not "
                            "support: use engine='double-backward'"
                        ) from error
                    total[:, first : first + part.shape[1]] += chunk.weight * products
        return total

    def _products(
        self,
        chunk: Chunk,
        theta: tuple[Tensor, ...],
        primals: tuple[Tensor, ...],
        subset: Sequence[int],
        V: Tensor,
    ) -> Tensor:
        objective = self.objective

        def product(*tangents: Tensor) -> tuple[Tensor, ...]:
            # The stand-ins stay until the backward pass is over: checkpointed layers run forward again in it.
            with ExitStack() as stack:
                stack.enter_context(PlainMeanSquares())

                def loss(*own: Tensor) -> Tensor:
                    everything = list(t.detach() for t in theta)
                    for i, tensor in zip(subset, own, strict=True):
                        everything[i] = tensor
                    stack.enter_context(objective.replaced(everything))
                    return objective.raw_loss(chunk, everything)

                return jvp(grad(loss, argnums=tuple(range(len(primals)))), primals, tangents)[1]

        if V.shape[1] == 1:
            products = product(*objective.split(V[:, 0], primals))
            return objective.join(products, primals).detach().unsqueeze(1)
        columns = [objective.split(V[:, j], primals) for j in range(V.shape[1])]
        stacked = [torch.stack(pieces) for pieces in zip(*columns, strict=True)]  # each [m, *shape]
        products = vmap(product)(*stacked)
        flat = [p.reshape(V.shape[1], -1).to(objective.device, objective.dtype) for p in products]
        return torch.cat(flat, dim=1).T.detach()
