"""The tangent of the gradient as a traced program, compiled when a run of products is long enough."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from ..kernels.accurate import norm
from ..landscape.batches import map_tensors
from ..landscape.evaluation import Chunk
from ..landscape.guard import rng_restored, without_autocast
from ..landscape.objective import Objective
from .chunk_function import chunk_function
from .engines import Engine
from .graph_engine import DoubleBackward
from .tangent_engine import PlainMeanSquares
from .tracing import Linear, TangentProgram

log = logging.getLogger("sharpscope")

# What compiling a linear program costs: seconds at all, and for each of its operations. Measured on a CPU; the
# decision to compile rests on them, no result.
COMPILE_SECONDS, COMPILE_SECONDS_PER_OPERATION = 5.0, 0.025
# Share of a product's time that compiling is expected to save.
COMPILED_SAVING = 0.25
# Traces of one engine: every shape of a chunk needs its own.
MAX_PROGRAMS = 4
# Products timed and compared of every candidate, in turn with those of the one it has to beat.
TIMED_PRODUCTS = 5
# Times that differ by less are taken for equal, and the simpler product is kept.
CLEARLY_FASTER = 0.95


class Unsuited(RuntimeError):
    """The traced product cannot be used, or is not worth it; the message says why."""


@dataclass
class Program:
    """The products of all chunks of one shape."""

    traced: TangentProgram
    gradient_norm: float  # of the chunk that it was traced on
    seconds: float  # of one double backward product of a chunk
    ratios: dict[str, float]  # time of one product over that, by kind
    run: Callable[..., tuple[Tensor, ...]]  # the fastest of its own kinds
    done: int = 0
    compiled: bool = False


@dataclass
class Piece:
    """One chunk at the current weights."""

    weight: float
    theta: tuple[Tensor, ...]
    program: Program
    linear: Linear


class Compiled(Engine):
    r"""H v = d/dε ∇L(θ + ε v) at ε = 0 by a traced program of which only what depends on v is run (`TangentProgram`).

    The program is traced once and linearised at every new θ. After enough products for it to pay, or when `expect`
    announces them, its linear part is compiled by torch.compile, and the fastest of double backward, traced and
    compiled product is kept; `reason` says which, with the ratio of their times.

    A trace holds Python's control flow, modes and random draws as they were. So at every new θ the program's own
    gradient is compared with an eager one of each chunk, and at the first use products are compared with those of
    double backward. Wherever they disagree, where the model cannot be traced or compiled, or where the intermediates
    exceed the memory budget, double backward takes over, with the reason in `reason` and one warning. Products with
    a block of parameters are always double backward's.

    Args:
        exact: The double backward to fall back on.
        only_if_faster: Leave to it also what a traced product does no faster and compiling does not pay for.
    """

    name = "compiled"

    def __init__(
        self, objective: Objective, exact: DoubleBackward | None = None, *, only_if_faster: bool = False
    ) -> None:
        super().__init__(objective)
        self.reason = "asked for; no product yet"
        self.exact = DoubleBackward(objective) if exact is None else exact
        self.refused = False
        self._only_if_faster = only_if_faster
        self._expected = 0
        self._error = 64 * objective.coarsest_eps
        self._programs: dict[Any, Program] = {}
        self._pieces: list[Piece] = []
        self._token: tuple | None = None

    @property
    def relative_error(self) -> float:
        """Rounding; more where a traced product was seen to differ by more from double backward's."""
        return self._error

    def expect(self, products: int) -> None:
        self._expected = max(0, products)

    def local_matmat(self, V: Tensor, subset: Sequence[int]) -> Tensor:
        return self.local_products([(V, subset)])[0]

    def local_products(self, parts: Sequence[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        everything = list(range(len(self.objective.layout.names)))
        whole = [i for i, (_, subset) in enumerate(parts) if list(subset) == everything]
        if whole and not self.refused:
            try:
                found = {i: self._product(parts[i][0]) for i in whole}
            except Unsuited as error:
                self._refuse(str(error))
            else:
                rest = [i for i in range(len(parts)) if i not in found]
                others = self.exact.local_products([parts[i] for i in rest]) if rest else []
                found.update(zip(rest, others, strict=True))
                return [found[i] for i in range(len(parts))]
        return self.exact.local_products(parts)

    def _refuse(self, why: str) -> None:
        self.refused, self.reason = True, f"double backward takes over: {why}"
        self._pieces, self._programs = [], {}
        log.warning("engine 'compiled': %s", self.reason)

    def _product(self, V: Tensor) -> Tensor:
        pieces = self._current()
        columns: list[Tensor] = []
        for piece in pieces:
            if self._pays(piece.program, V.shape[1]):
                self._compile(piece, V[:, 0])
            elif self._only_if_faster and not piece.program.compiled:
                self._check_faster(piece.program)
            for j in range(V.shape[1]):
                product = self._apply(piece, V[:, j])
                if len(columns) == j:
                    columns.append(product if piece.weight == 1.0 else product.mul_(piece.weight))
                else:
                    columns[j].add_(product, alpha=piece.weight)
            piece.program.done += V.shape[1]
        self._expected = max(0, self._expected - V.shape[1])
        return columns[0].unsqueeze(1) if len(columns) == 1 else torch.stack(columns, dim=1)

    def _apply(self, piece: Piece, v: Tensor) -> Tensor:
        return self._run(piece.program.run, piece, v)

    def _run(self, program: Callable[..., tuple[Tensor, ...]], piece: Piece, v: Tensor) -> Tensor:
        tangents = self.objective.split(v, piece.theta)
        try:
            with torch.no_grad(), without_autocast():
                return self.objective.join(program(*piece.linear.kept, *tangents), piece.theta)
        except Exception as error:  # whatever a compiler, or a compiled program, may raise
            raise Unsuited(_first_line(error)) from error

    def _current(self) -> list[Piece]:
        """Every chunk linearised at the current weights.

        Raises:
            Unsuited.
        """
        objective = self.objective
        token = objective.state_token()
        if token != self._token:
            self._pieces, self._token = [], None
            if objective.group is not None:
                raise Unsuited("the data are split over ranks, which have to take the same way")
            held, pieces = 0, []
            with objective.evaluation() as theta:
                for chunk in objective.chunks():
                    pieces.append(self._piece(chunk, theta))
                    held += pieces[-1].linear.num_bytes(theta)
                    if len(pieces) > 1 and held > objective.memory_budget:
                        raise Unsuited(
                            f"the intermediates of {len(pieces)} chunks take {held} bytes, more than the memory budget "
                            f"of {objective.memory_budget}"
                        )
            self._pieces, self._token = pieces, token
        return self._pieces

    def _piece(self, chunk: Chunk, theta: tuple[Tensor, ...]) -> Piece:
        objective = self.objective

        def mean_loss(chunk: Chunk, theta: Sequence[Tensor]) -> Tensor:
            with PlainMeanSquares():
                return objective.raw_loss(chunk, theta)

        loss, others = chunk_function(objective, chunk, mean_loss)
        structure = repr(map_tensors(chunk.batch, lambda _: torch.empty(0)))  # what is no tensor
        key = (structure, *((tuple(t.shape), t.stride(), t.dtype) for t in (*theta, *others)))
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) == MAX_PROGRAMS:
                raise Unsuited(f"the chunks have more than {MAX_PROGRAMS} shapes")
            program, piece = self._trace(chunk, theta, loss, others)
            self._programs[key] = program
            return piece
        try:
            linear = program.traced.linearise(theta, others)
        except Exception as error:
            raise Unsuited(f"the trace does not run on chunk {chunk.number}: {_first_line(error)}") from error
        eager = torch.autograd.grad(objective.chunk_loss(chunk, theta), theta, allow_unused=True)
        self._compare_gradients(linear, eager, theta, program.gradient_norm, chunk)
        return Piece(chunk.weight, theta, program, linear)

    def _compare_gradients(
        self, linear: Linear, eager: Sequence[Tensor | None], theta: Sequence[Tensor], scale: float, chunk: Chunk
    ) -> float:
        """‖eager gradient‖ when the program's gradient equals it up to rounding.

        Near a stationary point the gradient is a difference of large terms, and its rounding is that of the terms:
        `scale` is its norm where the program was traced.
        """
        expected = self.objective.join([None if g is None else g.detach() for g in eager], theta)
        found = self.objective.join(linear.value, theta)
        length = float(norm(expected))
        error = float(norm(found - expected))
        if not error <= 64 * self.objective.coarsest_eps * max(length, scale):
            raise Unsuited(
                f"the traced gradient of batch {chunk.number} differs from the model's own by {error:.2g} of "
                f"{length:.2g}: it depends on more than tensors (control flow, random numbers, settings)"
            )
        linear.value = ()  # as long as the weights, and not needed again
        return length

    def _trace(
        self, chunk: Chunk, theta: tuple[Tensor, ...], loss: Callable[..., Tensor], others: tuple[Tensor, ...]
    ) -> tuple[Program, Piece]:
        """Traces a chunk, and compares and times its products with double backward's."""
        gradient = grad(loss, argnums=tuple(range(len(theta))))
        try:
            traced = TangentProgram.trace(gradient, theta, others)
            linear = traced.linearise(theta, others)
        except Exception as error:  # whatever a trace of a user's model may raise
            self.objective.chunk_loss(chunk, theta)  # an error of the model's own comes out here
            try:
                TangentProgram.trace(gradient, theta, others)
            except Exception:
                raise Unsuited(f"the gradient cannot be traced: {_first_line(error)}") from error
            raise  # it does not come again: not the trace's either
        graph = replace(self.exact._build(chunk, theta), weight=1.0)
        length = self._compare_gradients(linear, graph.gradients, theta, 0.0, chunk)
        program = Program(traced, length, 0.0, {}, traced.linear)
        piece = Piece(chunk.weight, theta, program, linear)
        everything = range(len(theta))

        def double_backward(v: Tensor) -> Tensor:
            columns: list[Tensor] = []
            self.exact._add_product(columns, graph, v.unsqueeze(1), everything)
            return columns[0] if columns else torch.zeros_like(v)

        start = self.objective.join([None if g is None else g.detach() for g in graph.gradients], theta)
        program.seconds, program.ratios["traced"] = self._agree(
            double_backward, lambda v: self._apply(piece, v), start, "traced"
        )
        self._say(program)
        return program, piece

    def _agree(
        self, trusted: Callable[[Tensor], Tensor], tried: Callable[[Tensor], Tensor], start: Tensor, kind: str
    ) -> tuple[float, float]:
        """Seconds of a trusted product and the time of a tried one over them, after both agreed.

        They are compared and timed in turns along a power iteration, the first ones being for warming up; the ratio
        is the median of the turns'.

        Raises:
            Unsuited: their products differ by more than their errors.
        """
        v = start if float(norm(start)) > 0 else torch.ones_like(start)
        size, difference, seconds, ratios = 0.0, 0.0, [], []
        for _ in range(TIMED_PRODUCTS + 1):
            v = v / norm(v).to(v.dtype)
            expected, first = _timed(trusted, v)
            found, second = _timed(tried, v)
            seconds.append(first)
            ratios.append(second / max(first, 1e-9))
            size, difference = max(size, float(norm(expected))), max(difference, float(norm(found - expected)))
            if not 0 < size < math.inf:
                break
            v = expected if float(norm(expected)) > 0 else torch.ones_like(v)
        allowed = 2 * 64 * self.objective.coarsest_eps
        if math.isfinite(size) and not difference <= allowed * size:
            raise Unsuited(f"{kind} products differ by {difference / max(size, 1e-300):.2g} of their size from others")
        if size > 0:
            self._error = max(self._error, difference / size)
        return statistics.median(seconds[1:] or seconds), statistics.median(ratios[1:] or ratios)

    def _pays(self, program: Program, columns: int) -> bool:
        if program.compiled:
            return False
        products = max(self._expected, program.done, columns)
        cost = COMPILE_SECONDS + COMPILE_SECONDS_PER_OPERATION * program.traced.operations
        chunks = sum(piece.program is program for piece in self._pieces)
        return products * chunks * COMPILED_SAVING * program.seconds * min(program.ratios.values()) > cost

    def _compile(self, piece: Piece, v: Tensor) -> None:
        """Compiles the program of a piece and keeps the fastest, judged by a few products from `v` on.

        Raises:
            Unsuited: double backward is the fastest.
        """
        program = piece.program
        program.compiled = True
        compiled = torch.compile(program.traced.linear, dynamic=False, fullgraph=True)
        try:
            with rng_restored():
                self._run(compiled, piece, v)
                ratio = self._agree(
                    lambda v: self._apply(piece, v), lambda v: self._run(compiled, piece, v), v, "compiled"
                )[1]
        except Unsuited as error:
            self._say(program, f" (it could not be compiled: {error})")
        else:
            program.ratios["compiled"] = ratio * program.ratios["traced"]
            if ratio < CLEARLY_FASTER:
                program.run = compiled
            self._say(program)
        self._check_faster(program)

    def _check_faster(self, program: Program) -> None:
        if min(program.ratios.values()) >= CLEARLY_FASTER:
            raise Unsuited(f"nothing else is clearly faster; {self.reason}")

    def _say(self, program: Program, note: str = "") -> None:
        kind = min(program.ratios, key=program.ratios.__getitem__)
        self.reason = f"a {kind} product takes {program.ratios[kind]:.2f} of the time of one by double backward{note}"


def _timed(function: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, float]:
    wait = torch.cuda.synchronize if v.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    result = function(v)
    wait()
    return result, time.perf_counter() - start


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
