"""The fused 4-bit AdamW step on a GPU, one launch (three for rank-1 scales) for all tensors of a kind.

The kernels read addresses and sizes from a table in device memory. It is built and uploaded when a list of tensors is
seen for the first time; a step on known addresses uploads nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _cupy
from ._launch import Launcher, Source
from .adamw4_batch import Batch, Scalars
from .codec_tables import BLOCK

MAPS = ("linear", "square")
DTYPES = (torch.float32, torch.bfloat16)


def _source(map: str, stochastic: bool, param: torch.dtype, grad: torch.dtype) -> Source:
    defines = {
        "MAP": 1 + MAPS.index(map),
        "STOCHASTIC": int(stochastic),
        "PARAM_BF16": DTYPES.index(param),
        "GRAD_BF16": DTYPES.index(grad),
    }
    return Source(
        ("codec.cuh", "adamw4.cu", "adamw4_rank1.cu"), tuple((name, str(value)) for name, value in defines.items())
    )


SOURCES = tuple(
    _source(map, stochastic, param, grad)
    for map in MAPS
    for stochastic in (False, True)
    for param in DTYPES
    for grad in DTYPES
)

# As in codec.cuh, adamw4.cu and adamw4_rank1.cu.
THREADS = 128
WARPS = THREADS // 32
TILE = 32
STRIP = 8
NUMBERS = np.dtype([(name, np.uint32 if name == "step" else np.float32) for name in Scalars._fields])
# Words of an Entry, the first eight of which are addresses.
N, R, C, ALIGNED, STREAM, MAXIMA, SKIPS = range(8, 15)
ENTRY_WORDS = 16

# Words of all tables kept for lists of tensors that come back: gradients move between a few places, and a program may
# step every tensor on its own. The second is the least that a table counts for, as allocators round up.
KEPT_WORDS = 2**20
LEAST_WORDS = 64


def why_unavailable() -> str | None:
    """None where the path runs; else the reason, with the cure."""
    return _cupy.why_unavailable()


def step(
    batch: Batch, numbers: Scalars, *, device_numbers: Tensor | None = None, launcher: Launcher | None = None
) -> None:
    """Update every tensor of the batch in place.

    `device_numbers`, float32 [9] from `scalars_tensor` on the tensors' device, is read in place of `numbers`: a
    captured CUDA graph can then be replayed with other numbers.

    Raises:
        RuntimeError: A CUDA graph is being captured, and no step on these very tensors came before.
    """
    if not batch.params:
        return
    launcher = _cupy.launcher() if launcher is None else launcher
    by_value = np.array([tuple(numbers)], NUMBERS)
    seed = np.uint64(batch.seed & (1 << 64) - 1)
    for group in _groups(batch):
        kind, device = group.kind, group.entries.device
        source = _source(batch.map, batch.stochastic, kind.param, kind.grad)
        args = (group.entries, group.tiles, by_value, device_numbers, seed)
        if kind.scales == "block":
            launcher.launch(source, "adamw4_block", group.tiles.numel(), THREADS, args)
            continue
        maxima = torch.zeros(group.maxima, dtype=torch.int32, device=device)
        args = (*args, maxima, torch.empty(group.skips, dtype=torch.uint8, device=device))
        launcher.launch(source, f"adamw4_moments_{kind.scales}", group.tiles.numel(), THREADS, args)
        launcher.launch(source, f"adamw4_encode_{kind.scales}", group.tiles.numel(), THREADS, args)
        args = (group.entries, group.scale_tiles, maxima)
        launcher.launch(source, "adamw4_scales", group.scale_tiles.numel(), THREADS, args)


class _Kind(NamedTuple):
    """What the tensors of one launch have in common: dtypes, and "block" or how strips lie under rank-1 scales."""

    param: torch.dtype
    grad: torch.dtype
    scales: Literal["block", "upright", "ragged"]


@dataclass(frozen=True)
class _Group:
    """The tensors of one kind, as tables on the device.

    Attributes:
        entries: int64 [16 tensors], `Entry` of adamw4.cu.
        tiles: int64, what each thread block works on.
        scale_tiles: The same for `adamw4_scales`; empty with scales of blocks.
        maxima, skips: Lengths of the workspaces.
    """

    kind: _Kind
    entries: Tensor
    tiles: Tensor
    scale_tiles: Tensor
    maxima: int
    skips: int


@dataclass(frozen=True)
class _Table:
    """Groups, and what must live as long as they do: the host's side of the upload may still be read by the device."""

    groups: list[_Group]
    host: Tensor
    stream: int

    @property
    def words(self) -> int:
        """What it counts for in the cache."""
        return max(LEAST_WORDS, self.host.numel())


class _Tables:
    """The tables used last, of `KEPT_WORDS` words together; the newest is kept whatever its size."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Table] = OrderedDict()
        self.words = 0

    def get(self, key: Hashable) -> _Table | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Hashable, table: _Table) -> None:
        if key in self._kept:
            self.words -= self._kept.pop(key).words
        self._kept[key] = table
        self.words += table.words
        while self.words > KEPT_WORDS and len(self._kept) > 1:
            self.words -= self._kept.popitem(last=False)[1].words


_tables = _Tables()
# Tables that a captured CUDA graph reads at every replay; they are never let go.
_captured: list[_Table] = []


def _groups(batch: Batch) -> list[_Group]:
    """From the cache where all addresses are known.

    A table is for the stream that uploaded it, as another one would not wait for the upload. The capture of a CUDA
    graph takes one of any stream, because it begins with a synchronised device, and cannot make one: memory that the
    upload reads must not be allocated there.
    """
    device = batch.params[0].device
    on_gpu = device.type == "cuda"
    key = _key(batch)
    table = _tables.get(key)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        if table is None:
            raise RuntimeError(
                f"a CUDA graph is being captured, and the step has not seen these {len(batch.params)} tensors before; "
                "run one step on these very tensors before the capture"
            )
        if not any(table is known for known in _captured):
            _captured.append(table)
        return table.groups
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    if table is None or table.stream != stream:
        table = _built(batch, device, stream)
        _tables.keep(key, table)
    return table.groups


def _key(batch: Batch) -> Hashable:
    """Everything that the table is made from."""
    sizes = [(p.numel(), p.dtype, g.dtype) for p, g in zip(batch.params, batch.grads, strict=True)]
    columns = [side.numel() for side in batch.v_columns]
    return (batch.params[0].device, tuple(sizes), tuple(columns), tuple(batch.ids), batch.addresses.tobytes())


def _built(batch: Batch, device: torch.device, stream: int) -> _Table:
    every = _entries(batch)
    kinds: dict[_Kind, list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        columns, aligned = every[i, C], every[i, ALIGNED]
        scales = "block" if not columns else "upright" if aligned and columns % BLOCK == 0 else "ragged"
        kinds.setdefault(_Kind(p.dtype, g.dtype, scales), []).append(i)
    # Entries before tiles: they need addresses that are multiples of 16.
    entries = [_with_workspaces(every[members]) for members in kinds.values()]
    tiles = [_strips(kind, table) for kind, table in zip(kinds, entries, strict=True)]
    scales = [_tiles(_ceil(table[:, R] + table[:, C], THREADS)) for table in entries]
    words = [*entries, *tiles, *scales]
    host = torch.from_numpy(np.concatenate([part.reshape(-1) for part in words]))
    if device.type == "cuda":
        host = host.pin_memory()
    pieces = host.to(device, non_blocking=True).split([part.size for part in words])
    sizes = [(int((table[:, R] + table[:, C]).sum()), int(_ceil(table[:, N], BLOCK).sum())) for table in entries]
    count = len(kinds)
    columns = zip(kinds, pieces[:count], pieces[count : 2 * count], pieces[2 * count :], sizes, strict=True)
    groups = [_Group(kind, table, work, last, *lengths) for kind, table, work, last, lengths in columns]
    return _Table(groups, host, stream)


def _strips(kind: _Kind, entries: np.ndarray) -> np.ndarray:
    """What each thread block of the first launches works on."""
    n, rows, across = entries[:, N], entries[:, R], entries[:, C] // BLOCK
    if kind.scales == "block":
        return _tiles(_ceil(n, BLOCK * TILE))
    strips = _ceil(rows, STRIP) * across if kind.scales == "upright" else _ceil(n, BLOCK * STRIP)
    return _tiles(_ceil(strips, WARPS))


def _entries(batch: Batch) -> np.ndarray:
    """`Entry` of adamw4.cu for every tensor [tensors, 16], but for the places in the workspaces."""
    words = np.zeros((len(batch.params), ENTRY_WORDS), np.int64)
    words[:, :N] = batch.addresses.T
    words[:, N] = [p.numel() for p in batch.params]
    words[:, C] = [side.numel() for side in batch.v_columns]
    words[:, R] = words[:, N] // np.maximum(words[:, C], 1) * (words[:, C] > 0)
    # Parameters and gradients by fours, codes by twos.
    wide = [(4 * p.element_size(), 4 * g.element_size(), 2, 2) for p, g in zip(batch.params, batch.grads, strict=True)]
    words[:, ALIGNED] = (words[:, [0, 1, 2, 4]] % np.array(wide) == 0).all(axis=1)
    words[:, STREAM] = 2 * np.array(batch.ids)
    return words


def _with_workspaces(entries: np.ndarray) -> np.ndarray:
    entries[:, MAXIMA] = _before(entries[:, R] + entries[:, C])
    entries[:, SKIPS] = _before(_ceil(entries[:, N], BLOCK))
    return entries


def _tiles(counts: np.ndarray) -> np.ndarray:
    """A word for each of the counts[i] tiles of entry i: i, and in the high half the number of the tile."""
    number = np.arange(counts.sum()) - np.repeat(_before(counts), counts)
    return number << 32 | np.repeat(np.arange(counts.size), counts)


def _before(counts: np.ndarray) -> np.ndarray:
    """The sum of all counts before each."""
    return np.cumsum(counts) - counts


def _ceil(a: np.ndarray, b: int) -> np.ndarray:
    return -(-a // b)
