"""Many symmetric Lanczos recurrences at once, over one flat vector that holds them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import lanczos_rounded
from ._dispatch import choose
from .accurate import project
from .lanczos_state import State

DTYPES = (torch.float32, torch.float64)


class NonFiniteProduct(ValueError):
    """A product had NaN or infinite entries; `recurrence` and `step` say which."""

    def __init__(self, recurrence: int, step: int) -> None:
        super().__init__(
            f"`matvec` gave recurrence {recurrence} NaN or infinite entries in step {step}; "
            "check that the operator is finite there, or work in float64"
        )
        self.recurrence, self.step = recurrence, step


@dataclass(frozen=True)
class LanczosRuns:
    """A_b Q_bᵀ = Q_bᵀ T_b + r_b e_kᵀ for every recurrence b, with k = `steps[b]` and T_b tridiagonal.

    Attributes:
        offsets: Recurrence b owns the entries offsets[b] to offsets[b + 1] − 1 [B + 1], int64, on the CPU.
        alpha: Diagonals [B, m], float64; 0 beyond the steps of a recurrence.
        beta: Off-diagonals [B, m − 1], float64, positive; 0 from entry steps[b] − 1.
        residual_norm: ‖r_b‖ [B], float64; rounding noise where the space became invariant.
        steps: Steps made [B], int64, 1 to m.
        basis: Row j holds q_j of every recurrence [m, n], times its `unit`; 0 from row steps[b].
        unit: Powers of two [B], float64, on the CPU; 1 unless the basis is rounded to float16.
    """

    offsets: Tensor
    alpha: Tensor
    beta: Tensor
    residual_norm: Tensor
    steps: Tensor
    basis: Tensor
    unit: Tensor

    def vectors(self, b: int) -> Tensor:
        """Rows q_j of recurrence b, times unit[b], shape [m, its length]: a view."""
        return self.basis[:, int(self.offsets[b]) : int(self.offsets[b + 1])]

    def vector(self, b: int, j: int) -> Tensor:
        """q_j of recurrence b [its length], in float32 at least."""
        q = self.vectors(b)[j]
        return q if q.dtype in DTYPES else q.float() / self.unit[b].item()

    def orthogonality(self, b: int) -> float:
        """Largest |q_i · q_k| for the last vector q_k of recurrence b, where the loss of orthogonality is largest."""
        Q, last = self.vectors(b), int(self.steps[b]) - 1
        if last == 0:
            return 0.0
        return float(project(Q[:last], Q[last], rough=Q.dtype not in DTYPES).abs().max()) / float(self.unit[b]) ** 2


def batched_lanczos(
    matvec: Callable[[Tensor], Tensor],
    offsets: Tensor | Sequence[int],
    num_steps: int,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    basis_dtype: torch.dtype | None = None,
) -> LanczosRuns:
    """At most `num_steps` of Lanczos for every diagonal block of a symmetric block diagonal operator, in lockstep.

    A vector passes classical Gram-Schmidt twice against all earlier ones of its own recurrence, so the bases stay
    orthonormal to rounding. A recurrence ends where its remainder is noise, at most 8 eps of the largest ‖A q‖ it has
    seen, and at the latest when its vectors span its entries; its part of the flat vector is 0 from then on. What a
    recurrence gives does not depend on its neighbours, bit for bit, if its products do not. Holds m + 2 vectors [n].

    On a GPU no step waits for the device, so the vector work can be captured in a CUDA graph. Products that are not
    finite leave NaN in `alpha` or `residual_norm` there; on a CPU they raise.

    Args:
        matvec: The product [n] with a flat vector [n], one call for a step of all recurrences; in the dtype and on the
            device of its argument, which is a row of the basis: not to be written to.
        offsets: Recurrence b owns the entries offsets[b] to offsets[b + 1] − 1 [B + 1]; from 0, ascending.
        num_steps: m, at least 1.
        start: First vectors [n], non-zero for every recurrence, of any length; their dtype and device are those of the
            run. None draws random signs.
        seed: Of the signs; the global random state is not touched.
        dtype, device: Of the run, without `start`; float32 or float64.
        basis_dtype: torch.float16 halves the memory of a float32 run, in torch operations. Rounding a stored vector
            changes its inner products by about 3e-4 / √n only, because the errors of its entries are independent; the
            two latest vectors, of which a product holds large multiples, are kept unrounded. None, or the dtype of the
            run, rounds nothing.

    Raises:
        NonFiniteProduct: on a CPU, a ValueError with the recurrence and the step.
        ValueError: arguments, or a product of another shape, dtype or device.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.1; Giraud, Langou and Rozložník, The loss
    of orthogonality in the Gram-Schmidt orthogonalization process, 2005, for the two passes.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"`num_steps` is {num_steps!r}; it must be an int of at least 1")
    if not callable(matvec):
        raise TypeError(f"`matvec` is a {type(matvec).__name__}; pass a function that multiplies a vector [n]")
    bounds = _checked_offsets(offsets)
    with torch.inference_mode(False), torch.no_grad():
        start = _signs(int(bounds[-1]), seed, dtype, device) if start is None else _checked_start(start, bounds)
        check_basis_dtype(basis_dtype, start.dtype)
        state = State.empty(bounds, num_steps, start.dtype, start.device, basis_dtype)
        path = choose("lanczos", start.device) if state.recent is None else lanczos_rounded
        work = path.VectorWork(state)
        work.begin(start)
        del start
        on_cpu = state.basis.device.type == "cpu"
        for j in range(num_steps):
            work.step(_product(matvec, state.row(j)), j)
            if on_cpu:
                _check_finite(state, j)
                if not bool(state.open.any()):
                    state.basis[j + 1 :].zero_()
                    break
        return _runs(state)


def _runs(state: State) -> LanczosRuns:
    last = (state.steps - 1).unsqueeze(1)
    made = torch.arange(len(state.basis) - 1, device=last.device) < last
    return LanczosRuns(
        offsets=torch.from_numpy(state.bounds),
        alpha=state.alpha,
        beta=torch.where(made, state.remainder[:, :-1], 0.0),
        residual_norm=state.remainder.gather(1, last).squeeze(1),
        steps=state.steps,
        basis=state.basis,
        unit=state.unit,
    )


def _product(matvec: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    writes = q._version
    w = matvec(q)
    if q._version != writes:
        raise ValueError("`matvec` wrote to its argument, a row of the basis; it must return a tensor of its own")
    if not isinstance(w, Tensor):
        raise TypeError(f"`matvec` returned a {type(w).__name__}; it must return a torch tensor of shape [{len(q)}]")
    if (w.shape, w.dtype, w.device) != (q.shape, q.dtype, q.device):
        raise ValueError(
            f"`matvec` returned {w.dtype} {list(w.shape)} on {w.device}; it must return what it was given, "
            f"{q.dtype} {list(q.shape)} on {q.device}"
        )
    return _plain(w)


def _plain(x: Tensor) -> Tensor:
    """Values that lie in memory as they are: paths read it through its address."""
    x = x.detach().resolve_neg().contiguous()
    return torch.empty_like(x).copy_(x) if x._is_zerotensor() else x


def _check_finite(state: State, j: int) -> None:
    fine = torch.isfinite(state.alpha[:, j]) & torch.isfinite(state.remainder[:, j])
    if not bool(fine.all()):
        raise NonFiniteProduct(int((~fine).nonzero()[0]), j)


def _checked_offsets(offsets: Tensor | Sequence[int]) -> np.ndarray:
    given = offsets.detach().cpu().numpy() if isinstance(offsets, Tensor) else np.asarray(offsets)
    if given.ndim != 1 or len(given) < 2 or given.dtype.kind not in "iu":
        raise ValueError(
            f"`offsets` is {given.dtype} of shape {list(given.shape)}; it must be integers [B + 1] for B >= 1"
        )
    bounds = given.astype(np.int64)
    if bounds[0] != 0:
        raise ValueError(f"`offsets` begins with {bounds[0]}; it must begin with 0")
    empty = np.flatnonzero(np.diff(bounds) < 1)
    if len(empty):
        b = int(empty[0])
        raise ValueError(
            f"`offsets` gives recurrence {b} the entries {bounds[b]} to {bounds[b + 1]}; every one needs an entry, "
            "so offsets must ascend: leave empty blocks out"
        )
    return bounds


def _checked_start(start: Tensor, bounds: np.ndarray) -> Tensor:
    if not isinstance(start, Tensor):
        raise TypeError(f"`start` is a {type(start).__name__}; pass a torch tensor of shape [{bounds[-1]}], or None")
    if start.shape != (int(bounds[-1]),):
        raise ValueError(f"`start` has shape {list(start.shape)}; `offsets` end at {bounds[-1]}, so it must be that")
    _check_dtype("start", start.dtype)
    start = _plain(start)
    lengths = torch.from_numpy(np.diff(bounds)).to(start.device)
    largest = torch.segment_reduce(start.abs(), "max", lengths=lengths, unsafe=True).cpu()
    if not bool(torch.isfinite(largest).all()):
        b = int((~torch.isfinite(largest)).nonzero()[0])
        raise ValueError(f"`start` has NaN or infinite entries in recurrence {b}; all must be finite")
    if not bool((largest > 0).all()):
        b = int((largest == 0).nonzero()[0])
        raise ValueError(f"`start` is zero in recurrence {b}; Lanczos needs a direction, a random one for instance")
    return start


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"`{name}` is {dtype}; Lanczos works in torch.float32 and torch.float64: convert it")


def check_basis_dtype(basis_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    allowed = {torch.float32: (None, torch.float32, torch.float16), torch.float64: (None, torch.float64)}[dtype]
    if basis_dtype not in allowed:
        raise ValueError(
            f"`basis_dtype` is {basis_dtype}; a run in {dtype} keeps its basis in {dtype}"
            f"{' or torch.float16' if dtype == torch.float32 else ''}: leave it out"
        )


def _signs(n: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Random signs [n] from a generator of their own."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` is {dtype!r}; pass torch.float32 or torch.float64")
    _check_dtype("dtype", dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    signs = torch.empty(n, dtype=torch.int8, device=generator.device).random_(0, 2, generator=generator)
    return signs.to(dtype).mul_(2).sub_(1)
