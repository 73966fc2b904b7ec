"""The fused 4-bit AdamW step in torch operations, chunk by chunk: the slow path of a CPU, and of a GPU without CuPy."""

from __future__ import annotations

import torch
from torch import Tensor

from .adamw4_batch import Batch, Scalars
from .codec_tables import BLOCK
from .codec_torch import (
    Part,
    decoded_block,
    decoded_rank1,
    encode,
    flushed,
    packed,
    padded_blocks,
    parts,
    rank1_scale,
    rectangles,
    relative,
    square_root_,
    uniform,
    why_unavailable,
)

__all__ = ["step", "why_unavailable"]


def step(batch: Batch, numbers: Scalars) -> None:
    """Update every tensor of the batch in place."""
    for i in range(len(batch.params)):
        _Tensor(batch, i, numbers).step()


class _Tensor:
    """One entry of a batch."""

    def __init__(self, batch: Batch, i: int, numbers: Scalars) -> None:
        self.batch, self.step_count, self.id = batch, int(numbers.step), batch.ids[i]
        # Python floats that hold float32 numbers: torch rounds them back to the very same.
        self.k = {name: float(number) for name, number in numbers._asdict().items()}
        self.p, self.g = batch.params[i].detach().view(-1), batch.grads[i].detach().view(-1)
        self.skipped = batch.skipped[i]
        self.m_codes, self.m_scales = batch.m_codes[i], batch.m_scales[i]
        self.v_codes, self.v_scales, self.v_columns = batch.v_codes[i], batch.v_scales[i], batch.v_columns[i]
        self.rank1 = self.v_columns.numel() > 0

    def step(self) -> None:
        """One pass over the chunks, and with rank-1 scales, which need all of the new v, a second."""
        if not self.rank1:
            for part in parts(self.p.numel(), self.p.device):
                v, keep = self._update(part)
                self._store_blocks(v, keep, part, self.v_codes, self.v_scales, self.batch.map, 1)
            return
        rows, columns = torch.zeros_like(self.v_scales), torch.zeros_like(self.v_columns)
        kept = []
        for part in parts(self.p.numel(), self.p.device):
            v, keep = self._update(part)
            kept.append(keep)
            for piece in rectangles(part, columns.numel()):
                some, R, C = piece.of(v), rows[piece.rows], columns[piece.columns]
                R.copy_(torch.maximum(R, some.amax(1)))
                C.copy_(torch.maximum(C, some.amax(0)))
        rows, columns = flushed(rows), flushed(columns)
        for part, keep in zip(parts(self.p.numel(), self.p.device), kept, strict=True):
            old = self._decoded_v(part)
            v = torch.where(_per_entry(keep, part.size), _finite(old), self._new_v(old, part))
            y = relative(v, rank1_scale(rows, columns, part))
            self.v_codes[part.bytes] = packed(encode(y, self.batch.map, self._random(part, 1)), self.batch.map)
        self.v_scales.copy_(rows)
        self.v_columns.copy_(columns)

    def _update(self, part: Part) -> tuple[Tensor, Tensor]:
        """Update p and m of a part; the new v (the finite old one in skipped blocks), and which blocks are skipped."""
        old, k = self._decoded_v(part), self.k
        v, g = self._new_v(old, part), self.g[part.entries].float()
        m = decoded_block(self.m_codes, self.m_scales, part, "de").mul_(k["b1"]).add_(g * k["omb1"])
        keep = ~(padded_blocks(m).abs().amax(1).isfinite() & padded_blocks(v).amax(1).isfinite())
        self.skipped += keep.sum()
        change = m / square_root_(v.clone()).mul_(k["rs2"]).add_(k["eps"])
        p, everywhere = self.p[part.entries], _per_entry(keep, part.size)
        self.p[part.entries] = torch.where(
            everywhere, p, (p.float() * k["decay"]).sub_(change.mul_(k["step_size"])).to(p)
        )
        self._store_blocks(m, keep, part, self.m_codes, self.m_scales, "de", 0)
        return torch.where(everywhere, _finite(old), v), keep

    def _new_v(self, old: Tensor, part: Part) -> Tensor:
        g = self.g[part.entries].float()
        return (old * self.k["b2"]).add_((g * g).mul_(self.k["omb2"]))

    def _decoded_v(self, part: Part) -> Tensor:
        if self.rank1:
            return decoded_rank1(self.v_codes, self.v_scales, self.v_columns, part, self.batch.map)
        return decoded_block(self.v_codes, self.v_scales, part, self.batch.map)

    def _store_blocks(
        self, x: Tensor, keep: Tensor, part: Part, codes: Tensor, scales: Tensor, map: str, word: int
    ) -> None:
        blocks = padded_blocks(x)
        scale = torch.where(keep, 0.0, flushed(blocks.abs().amax(1)))
        y = relative(blocks, scale[:, None]).view(-1)[: part.size]
        chosen = packed(encode(y, map, self._random(part, word)), map)
        old_codes, old_scales = codes[part.bytes], scales[part.blocks]
        codes[part.bytes] = torch.where(_per_entry(keep, chosen.numel(), BLOCK // 2), old_codes, chosen)
        scales[part.blocks] = torch.where(keep, old_scales, scale)

    def _random(self, part: Part, word: int) -> Tensor | None:
        if not self.batch.stochastic:
            return None
        stream = 2 * self.id + word
        return uniform(part, self.p.device, seed=self.batch.seed, step=self.step_count, stream=stream)


def _per_entry(blocks: Tensor, n: int, width: int = BLOCK) -> Tensor:
    return blocks[:, None].expand(-1, width).reshape(-1)[:n]


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)
