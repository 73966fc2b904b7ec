r"""Per-example gradients from one ordinary backward pass: what goes into each operation and what comes back out of it.

For an operation whose rows belong to examples, such as y = x Wᵀ, the gradient of example i is built from its rows of x
and of ∂L/∂y alone. The operations are seen as they are called, whatever module, tied weight or function calls them.
They get parameters without history, so that a backward pass makes no gradient of parameters at all; one that is used
anywhere else, still receives one and is reported.

Source: Goodfellow, Efficient Per-Example Gradient Computations, 2015; Dangel, Kunstner and Hennig, BackPACK, 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .per_example_parts import Convolutions, Lookups, OuterProducts, Rows, Squares, each, reduced, sides
from .per_example_sums import ChunkSums, Part

# What makes the part of a parameter from the gradient of an output.
Made = list[tuple[int, Callable[[Tensor], Part]]]
MATRIX_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
SUMS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)


# Functions that move entries along an axis by values.
BY_VALUE = {
    getattr(place, name)
    for name in (
        "gather",
        "index_select",
        "take_along_dim",
        "sort",
        "msort",
        "topk",
        "index_add",
        "index_copy",
        "scatter",
    )
    for place in (torch, Tensor)
    if hasattr(place, name)
}


def _may_reorder(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call may put rows of the first axis in an order that depends on values."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(index, Tensor | list)
    if func not in BY_VALUE or not isinstance(args[0] if args else None, Tensor):
        return False
    axes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)]
    return not axes or 0 in axes or -args[0].ndim in axes


class NotSeparable(Exception):
    """The rows of an operation do not belong to examples, or are no longer what they were."""


class _Anchor(torch.autograd.Function):
    """The same tensor, on the way to `root`: makes an output differentiable that depends on nothing differentiable."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].new_zeros(())


class Recorder(TorchFunctionMode):
    """Active during a forward pass, it sees every use of the parameters; `backward` then fills the sums.

    Args:
        theta: The parameters as the model uses them.
        sums: Where their per-example gradients go.
    """

    def __init__(self, theta: Sequence[Tensor], sums: ChunkSums) -> None:
        super().__init__()
        self._sums, self._b = sums, sums.size
        self._index = {id(t): k for k, t in enumerate(theta)}
        self._root = torch.zeros((), device=theta[0].device, requires_grad=True)
        self._expected = [0] * len(theta)
        self._waiting: list[list[Part]] = [[] for _ in theta]
        self._others: set[int] = set()
        # Rows of a table that all examples read, such as positions: the output, its table, what was read.
        self._shared: dict[int, tuple[Tensor, int, Tensor, int]] = {}
        self._tables: dict[int, int] = {}
        self._rank_one: set[int] = set()
        # What was called, with which axes, and which parameters made outputs of which shapes.
        self.uses: list[tuple] = []
        self.reorders = False

    def others(self, loss: Tensor) -> set[int]:
        """Parameters that the loss also reaches in ways that are not known here; nothing is added for them."""
        seen: set[object] = set()
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            k = self._index.get(id(getattr(node, "variable", None)))
            if k is not None:
                self._others.add(k)
            waiting.extend(parent for parent, _ in node.next_functions)
        return self._others

    def mostly_dense(self, others: Sequence[int]) -> bool:
        """Whether most entries are in matrices whose moments need no gradient of an example."""
        sizes = [self._sums.width(k) for k in range(len(self._expected))]
        return 2 * sum(sizes[k] for k in self._rank_one - set(others)) > sum(sizes)

    def backward(self, loss: Tensor) -> None:
        """One backward pass; each parameter is added as soon as all its uses have been reached.

        Raises:
            NotSeparable: the examples' shares cannot be told from what came back.
        """
        torch.autograd.grad(loss, self._root, allow_unused=True)
        self._shared.clear()  # outputs whose hooks know this recorder: without them the graph goes at once
        for k, parts in enumerate(self._waiting):
            if parts:
                self._sums.add(k, parts)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.uses.append((func, *(a for a in (*args, *kwargs.values()) if isinstance(a, int | str))))
        self.reorders = self.reorders or _may_reorder(func, args, kwargs)
        rule = RULES.get(func)
        if rule is not None:
            try:
                result = rule(self, func, *args, **kwargs)
            except TypeError:  # arguments that the rule does not know
                result = None
            if result is not None:
                return result
        return func(*args, **kwargs)

    def own(self, tensor: object) -> int | None:
        """Which of the parameters a tensor is."""
        return self._index.get(id(tensor))

    def per_example(self, tensor: Tensor) -> Tensor:
        """[b·k, ..., e] as [b, rows of an example, e], in the type of the sums."""
        return self._sums.cast(tensor).reshape(self._b, -1, tensor.shape[-1])

    def batched(self, tensor: Tensor) -> bool:
        """Whether the first axis may be that of the examples, with one or more rows for each."""
        return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % self._b == 0

    def watch(self, output: Tensor, inputs: Sequence[Tensor], made: Made) -> Tensor:
        """The output, whose gradient will give the parts of some parameters.

        Args:
            inputs: What the parts are made of, which must not change until then.
            made: For each of the parameters, what makes its part from the output's gradient.
        """
        if not output.requires_grad:
            output = _Anchor.apply(output, self._root)  # type: ignore[assignment]
        self.uses.append((tuple(k for k, _ in made), output.shape))
        for k, _ in made:
            self._expected[k] += 1
        waiting = [made]
        versions = [tensor._version for tensor in inputs]

        def arrived(gradient: Tensor) -> None:
            if versions != [tensor._version for tensor in inputs]:
                raise NotSeparable("an input was changed in place")
            for k, make in waiting.pop():
                if k in self._others:
                    continue
                self._waiting[k].append(make(gradient))
                if len(self._waiting[k]) == self._expected[k]:
                    parts, self._waiting[k] = self._waiting[k], []
                    self._sums.add(k, parts)

        output.register_hook(arrived)
        return output

    def linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        k, j = self.own(weight), self.own(bias)
        if (k is None and j is None) or input.ndim < 2 or not self.batched(input):
            return None
        a, made, squares = input.detach(), [], Squares()
        if k is not None:
            made.append((k, lambda d: OuterProducts(self.per_example(d), self.per_example(a), squares)))
            self._note_rank(k, input)
        if j is not None:
            made.append((j, lambda d: Rows(reduced(self._sums.cast(d), self._b, d.shape[-1:]), squares)))
        return self.watch(func(input, _plain(weight), _plain(bias)), [a], made)

    def matrix_product(self, func: Any, input: Tensor, other: Tensor) -> Tensor | None:
        return self._times(func, None, input, other)

    def biased_product(self, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor | None:
        return self._times(func, input, mat1, mat2)

    def _times(self, func: Any, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor | None:
        """x W (+ bias) with W [p, q]."""
        k, j = self.own(weight), self.own(bias)
        if (k is None and j is None) or min(x.ndim, weight.ndim) < 2 or weight.ndim > 2 or not self.batched(x):
            return None
        a, made = x.detach(), []
        if k is not None:
            made.append((k, lambda d: OuterProducts(self.per_example(a), self.per_example(d))))
            self._note_rank(k, x)
        if j is not None:
            assert bias is not None
            shape = bias.shape
            made.append((j, lambda d: Rows(reduced(self._sums.cast(d), self._b, shape))))
        arguments = (x, _plain(weight)) if bias is None else (_plain(bias), x, _plain(weight))
        return self.watch(func(*arguments), [a], made)

    def _note_rank(self, k: int, input: Tensor) -> None:
        if input.ndim == 2 and input.shape[0] == self._b:
            self._rank_one.add(k)

    def convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        k, j = self.own(weight), self.own(bias)
        if (k is None and j is None) or input.ndim != weight.ndim or not self.batched(input):
            return None
        a, made, axes, shape = input.detach(), [], weight.ndim - 2, weight.shape
        if k is not None:
            steps, gaps = each(stride, axes), each(dilation, axes)
            around = sides(padding, tuple(shape[2:]), gaps)
            rows = input.shape[0] // self._b
            made.append(
                (
                    k,
                    lambda d: Convolutions(
                        self._sums.cast(a), self._sums.cast(d), shape, steps, around, gaps, groups, rows
                    ),
                )
            )
        if j is not None:
            broadcast = torch.Size((shape[0],) + (1,) * axes)
            made.append((j, lambda d: Rows(reduced(self._sums.cast(d), self._b, broadcast))))
        output = func(input, _plain(weight), _plain(bias), stride, padding, dilation, groups)
        return self.watch(output, [a], made)

    def embedding(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        k = self.own(weight)
        if k is None or max_norm is not None or scale_grad_by_freq or sparse or input.ndim == 0:
            return None
        output = func(input, _plain(weight), padding_idx)
        skipped = -1 if padding_idx is None else padding_idx % len(weight)
        make = lambda d: self._looked_up(input, d, skipped, len(weight))  # noqa: E731
        output = self.watch(output, [input], [(k, make)])
        self._shared[id(output)] = (output, k, input, skipped)
        self._tables[k] = len(weight)
        return output

    def _looked_up(self, indices: Tensor, gradient: Tensor, skipped: int, num_rows: int) -> Lookups:
        if not self.batched(indices):
            raise NotSeparable("rows of a table that all examples share went into an unknown operation")
        indices = indices.reshape(self._b, -1)
        rows = self.per_example(gradient)
        return Lookups(indices, rows.masked_fill((indices == skipped).unsqueeze(2), 0), num_rows)

    def layer_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        output = lambda w, b: func(input, normalized_shape, w, b, eps)  # noqa: E731
        normal = lambda a: F.layer_norm(a, normalized_shape, eps=eps)  # noqa: E731
        return self._scaled(input, weight, bias, output, normal)

    def rms_norm(
        self, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor | None:
        output = lambda w, b: func(input, normalized_shape, w, eps)  # noqa: E731
        normal = lambda a: F.rms_norm(a, normalized_shape, eps=eps)  # noqa: E731
        return self._scaled(input, weight, None, output, normal)

    def group_norm(
        self,
        func: Any,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor | None:
        output = lambda w, b: func(input, num_groups, w, b, eps)  # noqa: E731
        normal = lambda a: F.group_norm(a, num_groups, eps=eps)  # noqa: E731
        return self._scaled(input, weight, bias, output, normal, channels=True)

    def batch_norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        if training or running_mean is None or running_var is None:
            return None
        output = lambda w, b: func(input, running_mean, running_var, w, b, False, momentum, eps)  # noqa: E731
        normal = lambda a: F.batch_norm(a, running_mean, running_var, eps=eps)  # noqa: E731
        return self._scaled(input, weight, bias, output, normal, channels=True)

    def _scaled(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Callable[[Any, Any], Tensor],
        normal: Callable[[Tensor], Tensor],
        channels: bool = False,
    ) -> Tensor | None:
        """normal(input) · weight + bias, along the last axes or along the axis of channels."""
        k, j = self.own(weight), self.own(bias)
        if (k is None and j is None) or not self.batched(input):
            return None
        a, made = input.detach(), []
        own = weight if k is not None else bias
        assert own is not None
        shape = torch.Size((*own.shape, *(1,) * (input.ndim - 2))) if channels else own.shape
        if k is not None:
            made.append((k, lambda d: Rows(reduced(self._sums.cast(d) * self._sums.cast(normal(a)), self._b, shape))))
        if j is not None:
            made.append((j, lambda d: Rows(reduced(self._sums.cast(d), self._b, shape))))
        return self.watch(output(_plain(weight), _plain(bias)), [a], made)

    def sum(self, func: Any, x: Any, y: Any) -> Tensor | None:
        return self._broadcast(func, x, y, product=False)

    def product(self, func: Any, x: Any, y: Any) -> Tensor | None:
        return self._broadcast(func, x, y, product=True)

    def _broadcast(self, func: Any, x: Any, y: Any, product: bool) -> Tensor | None:
        """A parameter, or rows of a table that all examples share, added to or multiplied with every example."""
        mine, other = (x, y) if self._spreads(x, y) else (y, x)
        if not self._spreads(mine, other):
            return None
        factor = other.detach() if product else None
        shape, shared, own = mine.shape, self._shared.get(id(mine)), self.own(mine)
        owner = own if shared is None else shared[1]
        assert owner is not None
        out = func(mine.detach(), other) if mine is x else func(other, mine.detach())

        def summed(d: Tensor) -> Tensor:
            d = self._sums.cast(d)
            return reduced(d if factor is None else d * self._sums.cast(factor), self._b, shape)

        def make(d: Tensor) -> Part:
            if shared is None:
                return Rows(summed(d))
            _, _, indices, skipped = shared
            spread = indices.reshape(1, -1).expand(self._b, -1)
            rows = summed(d).view(self._b, -1, shape[-1])
            return Lookups(spread, rows.masked_fill((spread == skipped).unsqueeze(2), 0), self._tables[owner])

        return self.watch(out, [] if factor is None else [factor], [(owner, make)])

    def _spreads(self, mine: Any, other: Any) -> bool:
        """Whether `mine` is the same for all examples of `other`."""
        if not (isinstance(mine, Tensor) and isinstance(other, Tensor)):
            return False
        if (self.own(mine) is None and id(mine) not in self._shared) or self.own(other) is not None:
            return False
        alone = mine.ndim < other.ndim or (mine.ndim == other.ndim and mine.shape[0] == 1 < other.shape[0])
        return alone and self.batched(other) and torch.broadcast_shapes(mine.shape, other.shape) == other.shape

    def expand(self, func: Any, mine: Tensor, *sizes: Any) -> Tensor | None:
        k = self.own(mine)
        if k is None:
            return None
        shape, out = mine.shape, func(mine.detach(), *sizes).clone()
        if out.shape[0] != self._b or (mine.ndim == out.ndim and shape[0] != 1):
            return None
        return self.watch(out, [], [(k, lambda d: Rows(reduced(self._sums.cast(d), self._b, shape)))])


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: Recorder.linear,
    F.embedding: Recorder.embedding,
    F.layer_norm: Recorder.layer_norm,
    F.rms_norm: Recorder.rms_norm,
    F.group_norm: Recorder.group_norm,
    F.batch_norm: Recorder.batch_norm,
    torch.addmm: Recorder.biased_product,
    torch.Tensor.expand: Recorder.expand,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), Recorder.convolution),
    **dict.fromkeys(MATRIX_PRODUCTS, Recorder.matrix_product),
    **dict.fromkeys(SUMS, Recorder.sum),
    **dict.fromkeys(PRODUCTS, Recorder.product),
}
