"""Products of a few long vectors that keep their digits: summed in float64, chunk by chunk.

On a CPU `torch.dot`, `torch.mv` and `torch.linalg.vector_norm` of float32 vectors lose digits with the length: 6e-4 at
1e7 entries, percents at 1e8, and some digits at 1e5 already where a few entries are large. Here sums are made in
float64, without a float64 copy longer than one chunk. Autocast does not reach in here.

Sizes: n entries in a vector, j basis vectors, m combinations of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries converted at once, over all rows. On a CPU they should stay in the cache; on a GPU launches count.
CPU_ENTRIES = 1 << 17
GPU_ENTRIES = 1 << 24
SHORTEST_CHUNK = 1 << 10
# A CPU sums so many float32 products to 1e-7 of ‖x‖ ‖y‖.
LONGEST_SUM = 1 << 14


def dot(x: Tensor, y: Tensor) -> Tensor:
    """x·y of two vectors [n] as a float64 scalar tensor; every product and sum is made in float64."""
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"`x` has shape {list(x.shape)} and `y` {list(y.shape)}; both must be one shape [n]")
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in chunks(x, rows=1):
        wide = x[part].double()
        total += torch.dot(wide, wide if y is x else y[part].double())
    return total


def norm(x: Tensor) -> Tensor:
    """‖x‖₂ of a vector [n] as a float64 scalar tensor; squares of float32 entries neither overflow nor vanish."""
    return dot(x, x).sqrt()


def project(Q: Tensor, w: Tensor, *, rough: bool = False) -> Tensor:
    """Q w [j] in float64, for a basis Q [j, n] and w [n]; every product and sum is made in float64.

    `rough` sums chunks in the dtype of Q, in a third of the time: for the first pass of Gram-Schmidt, whose errors the
    second removes.
    """
    if Q.ndim != 2 or w.shape != Q.shape[1:]:
        raise ValueError(f"`Q` has shape {list(Q.shape)} and `w` {list(w.shape)}; they must be [j, n] and [n]")
    wide = _at_least_float32(Q.dtype) if rough else torch.float64
    total = torch.zeros(Q.shape[0], dtype=torch.float64, device=Q.device)
    with torch.autocast(Q.device.type, enabled=False):
        for part in chunks(Q, rows=Q.shape[0]):
            total += Q[:, part].to(wide) @ w[part].to(wide)
    return total


def combine(Q: Tensor, c: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Qᵀ c [n] in `dtype`, by default that of Q, for a basis Q [j, n] and coefficients c [j]; or cᵀ Q [m, n] for
    c [j, m].

    A single combination is summed over j in the dtype of Q: it serves Gram-Schmidt, whose second pass removes the
    rounding. Several are summed in float64, because nothing corrects a rotated basis afterwards.
    """
    _check_coefficients(Q, c)
    out = Q.new_empty(*c.shape[1:], Q.shape[1], dtype=dtype)
    _combine_into(out, Q, c)
    return out


def rotate_(Q: Tensor, S: Tensor) -> None:
    """The first m rows of Q [j, n] become Sᵀ Q, in place, for S [j, m] with m ≤ j: a change of basis without a copy."""
    _check_coefficients(Q, S)
    _combine_into(Q[: S.shape[1]], Q, S)


def orthogonalise(Q: Tensor, w: Tensor, *, unit: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """w [n] = Qᵀ h + rest with Q rest = 0, for an orthonormal basis Q [j, n]: h [j] in float64, the rest [n], its norm.

    What is passed as Q may be the basis times a power of two, `unit`, in fewer bits than w.

    Classical Gram-Schmidt in two passes, and a third where the second took away more than it left. Two passes read the
    basis three times: a chunk is projected on while it is still in the cache. w is not written to.

    Source: Giraud, Langou, Rozloznik, The loss of orthogonality in the Gram-Schmidt orthogonalization process, 2005.
    """
    h = project(Q, w, rough=True) / unit
    rest, source, total, left = torch.empty_like(w), w, h, 0.0
    for _ in range(2):
        correction = _subtract_and_project(rest, source, Q, total / unit) / unit
        h = h + correction
        squares = _subtract_and_square(rest, Q, correction / unit)
        left = float(squares.sqrt())
        if float(torch.linalg.vector_norm(correction)) <= left:
            break
        source, total = rest, torch.zeros_like(h)
    return h, rest, left


def _subtract_and_project(rest: Tensor, w: Tensor, Q: Tensor, h: Tensor) -> Tensor:
    """rest = w − Qᵀ h, in place of `rest`; returns Q rest in float64."""
    wide = _at_least_float32(Q.dtype)
    # On a CPU chunks are short enough for sums in float32; a GPU has room for float64.
    sums = wide if Q.device.type == "cpu" else torch.float64
    coefficients, total = h.to(wide), torch.zeros_like(h)
    with torch.autocast(Q.device.type, enabled=False):
        for part in chunks(Q, rows=Q.shape[0], longest=LONGEST_SUM):
            rows = Q[:, part].to(wide)
            torch.sub(w[part], coefficients @ rows, out=rest[part])
            total += rows.to(sums) @ rest[part].to(sums)
    return total


def _subtract_and_square(rest: Tensor, Q: Tensor, h: Tensor) -> Tensor:
    """rest −= Qᵀ h, in place; returns ‖rest‖² in float64."""
    wide = _at_least_float32(Q.dtype)
    coefficients, total = h.to(wide), torch.zeros((), dtype=torch.float64, device=Q.device)
    with torch.autocast(Q.device.type, enabled=False):
        for part in chunks(Q, rows=Q.shape[0]):
            piece = rest[part]
            piece -= coefficients @ Q[:, part].to(wide)
            squared = piece.double()
            total += torch.dot(squared, squared)
    return total


def _combine_into(out: Tensor, Q: Tensor, c: Tensor) -> None:
    wide = torch.float64 if c.ndim == 2 else _at_least_float32(Q.dtype)
    coefficients = (c.mT if c.ndim == 2 else c).to(Q.device, wide)  # [m, j] or [j]
    with torch.autocast(Q.device.type, enabled=False):
        for part in chunks(Q, rows=Q.shape[0]):
            out[..., part] = coefficients @ Q[:, part].to(wide)


def _check_coefficients(Q: Tensor, c: Tensor) -> None:
    if Q.ndim != 2 or c.ndim not in (1, 2) or c.shape[0] != Q.shape[0]:
        raise ValueError(f"`Q` has shape {list(Q.shape)} and `c` {list(c.shape)}; must be [j, n] and [j] or [j, m]")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def chunks(x: Tensor, *, rows: int, longest: int | None = None) -> Iterator[slice]:
    """Slices of the last axis that hold about as many entries whatever the number of rows, on a CPU at most `longest`
    in each row."""
    n, entries = x.shape[-1], CPU_ENTRIES if x.device.type == "cpu" else GPU_ENTRIES
    size = max(entries // max(rows, 1), SHORTEST_CHUNK)
    if longest is not None and x.device.type == "cpu":
        size = min(size, longest)
    return (slice(first, min(first + size, n)) for first in range(0, n, size))
