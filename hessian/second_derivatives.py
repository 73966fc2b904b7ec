r"""Layers whose derivative autograd differentiates at length, with what depends on the weights alone computed once.

A kept graph is differentiated for every vector. For GELU, SiLU, layer normalisation and softmax, autograd would go
through the formula of the first derivative each time, exponentials included; here a product takes a few passes over the
activations. Values and derivatives are the same up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

ATEN = torch.ops.aten
HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


class ShortSecondDerivatives(TorchFunctionMode):
    """While open, the functions in `SHORT` run in a form with a short second derivative, and no third one.

    Other types than plain float32 and float64 tensors keep torch's own, and so does what activation checkpointing will
    run again, when this is closed.

    Not for a loss that differentiates inside itself: its Hessian needs third derivatives.

    Args:
        enabled: False leaves torch's own everywhere.

    Attributes:
        needs_model: Something ran under activation checkpointing, or with hooks of the user's on its tensors: a pass
            backward through the graph runs the user's code.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self._enabled = enabled
        self.needs_model = False

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        short = SHORT.get(func)
        checkpointed = _checkpointed()
        self.needs_model = self.needs_model or checkpointed or func in HOOKS
        if (
            not self._enabled
            or short is None
            or checkpointed
            or not torch.is_grad_enabled()
            or not _plain(args, kwargs)
        ):
            return func(*args, **kwargs)
        result = short(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


def _checkpointed() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _plain(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether all tensors are plain ones of one type on one device and a gradient is wanted.

    Inside `torch.func` transforms and forward differentiation none is.
    """
    level = torch._C._functorch.maybe_current_level()  # type: ignore[attr-defined]
    if level is not None or forward_ad._current_level >= 0:
        return False
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return (
        any(x.requires_grad for x in tensors)
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        and len({(x.dtype, x.device) for x in tensors}) == 1
        and tensors[0].dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(tensors[0].device.type)
    )


@dataclass(frozen=True)
class Pointwise:
    """f, u f'(z) from (u, z), and f''(z), each entry by itself."""

    value: Callable[[Tensor], Tensor]
    pull_back: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


class _Pointwise(Function):
    """a = f(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, f: Pointwise) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(z, f.pull_back(torch.ones_like(z), z))
        return f.value(z)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        z, first = ctx.saved_tensors
        return (_PointwiseBackward.apply(da, z, first, ctx.f) if torch.is_grad_enabled() else da * first), None


class _PointwiseBackward(Function):
    """δz = δa f'(z)."""

    @staticmethod
    def forward(ctx: Any, da: Tensor, z: Tensor, first: Tensor, f: Pointwise) -> Tensor:
        ctx.save_for_backward(first, da * f.second(z))
        return f.pull_back(da, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        first, slope = ctx.saved_tensors
        return u * first, u * slope, None, None


def _gelu_second(z: Tensor) -> Tensor:
    """d²/dz² of z Φ(z) is (2 − z²) φ(z)."""
    return (2 - z * z) * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _tanh_gelu_second(z: Tensor) -> Tensor:
    """d²/dz² of z (1 + tanh r) / 2 with r = √(2/π) (z + 0.044715 z³)."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z**3))
    slope, bend = scale * (1 + 3 * cubic * z * z), 6 * scale * cubic * z
    return (1 - t * t) * (slope + z * bend / 2 - z * t * slope * slope)


def _silu_second(z: Tensor) -> Tensor:
    """d²/dz² of z s with s = σ(z) is s (1 − s) (2 + z (1 − 2 s))."""
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


GELU = {
    "none": Pointwise(F.gelu, ATEN.gelu_backward, _gelu_second),
    "tanh": Pointwise(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda u, z: ATEN.gelu_backward(u, z, approximate="tanh"),
        _tanh_gelu_second,
    ),
}
SILU = Pointwise(F.silu, ATEN.silu_backward, _silu_second)


class _LayerNorm(Function):
    """y = x̂ w + b with x̂ = (x − mean x) r and r = 1 / √(var x + ε), over the last dimensions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, shape, w, b, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, w, b, mean, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w, b, mean, r = ctx.saved_tensors
        dx, dw, db = (_LayerNormBackward.apply if torch.is_grad_enabled() else _layer_norm_backward)(
            dy, x, ctx.shape, w, b, mean, r
        )
        return dx, None, dw, db, None


def _layer_norm_backward(dy, x, shape, w, b, mean, r):
    return ATEN.native_layer_norm_backward(dy, x, shape, mean, r, w, b, [True, w is not None, b is not None])


class _LayerNormBackward(Function):
    r"""δx = L(δy w), δw = Σ δy x̂, δb = Σ δy with L(g) = r (g − mean g − x̂ mean(g x̂)), row by row.

    L is symmetric, and its derivative needs no more than L itself: for a cotangent u of δx, with D entries in a row,

    ∂⟨u, δx⟩ / ∂x = − r (mean(δy w x̂) L(u) + mean(u x̂) δx + x̂ ⟨u, δx⟩ / D).
    """

    @staticmethod
    def forward(ctx: Any, dy, x, shape, w, b, mean, r):
        dx, dw, db = _layer_norm_backward(dy, x, shape, w, b, mean, r)
        ctx.set_materialize_grads(False)
        ctx.shape = shape
        ctx.dims = tuple(range(x.ndim - len(shape), x.ndim))
        normal = (x - mean) * r
        weighted = dy * normal if w is None else dy * w * normal
        ctx.save_for_backward(dy, x, w, mean, r, normal, dx, -r * weighted.mean(ctx.dims, keepdim=True))
        return dx, dw, db

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u, uw, ub):  # type: ignore[override]
        dy, x, w, mean, r, normal, dx, factor = ctx.saved_tensors
        for_dy, for_x, for_w = None, None, None
        if u is not None:
            mask = [True, False, False]
            lu = ATEN.native_layer_norm_backward(u, x, ctx.shape, mean, r, None, None, mask)[0]
            for_dy = lu if w is None else lu * w
            size = math.prod(ctx.shape)
            for_x = lu * factor
            for_x.addcmul_(dx, (u * normal).sum(ctx.dims, keepdim=True).mul_(r), value=-1 / size)
            for_x.addcmul_(normal, (u * dx).sum(ctx.dims, keepdim=True).mul_(r), value=-1 / size)
            if w is not None and ctx.needs_input_grad[3]:
                for_w = (dy * lu).sum(tuple(range(dy.ndim - len(ctx.shape))))
        if uw is not None:
            mask = [True, False, False]
            from_w = ATEN.native_layer_norm_backward(dy, x, ctx.shape, mean, r, uw, None, mask)[0]
            for_dy = normal * uw if for_dy is None else for_dy + normal * uw
            for_x = from_w if for_x is None else for_x + from_w
        if ub is not None:
            for_dy = ub.expand_as(dy) if for_dy is None else for_dy + ub
        return for_dy, for_x, None, for_w, None, None, None


class _Softmax(Function):
    """y = softmax z along one dimension."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, dim: int) -> Tensor:
        y = torch.softmax(z, dim)
        ctx.dim = dim
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        apply = _SoftmaxBackward.apply if torch.is_grad_enabled() else _softmax_backward
        return apply(dy, y, ctx.dim), None


def _softmax_backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return ATEN._softmax_backward_data(dy, y, dim, y.dtype)


class _SoftmaxBackward(Function):
    """δz = y (δy − ⟨δy, y⟩)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, y: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(dy, y, dy - (dy * y).sum(dim, keepdim=True))
        return _softmax_backward(dy, y, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dy, y, centred = ctx.saved_tensors
        weighted = u * y
        share = weighted.sum(ctx.dim, keepdim=True)
        return weighted.addcmul_(y, share, value=-1), (u * centred).addcmul_(dy, share, value=-1), None


def _short_gelu(input: Tensor, *, approximate: str = "none") -> Any:
    return _Pointwise.apply(input, GELU[approximate])


def _short_silu(input: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace else _Pointwise.apply(input, SILU)


def _short_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps)


def _short_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **other: Any) -> Any:
    if dim is None or dtype is not None or other or input.ndim == 0:
        return NotImplemented
    return _Softmax.apply(input, dim)


def _short_tensor_softmax(input: Tensor, dim: int, dtype: Any = None, **other: Any) -> Any:
    return NotImplemented if dtype is not None or other or input.ndim == 0 else _Softmax.apply(input, dim)


SHORT: dict[Callable, Callable] = {
    F.gelu: _short_gelu,
    F.silu: _short_silu,
    F.layer_norm: _short_layer_norm,
    torch.layer_norm: _short_layer_norm,
    F.softmax: _short_softmax,
    torch.softmax: _short_tensor_softmax,
    Tensor.softmax: _short_tensor_softmax,
}
