"""Tensors amid bytes that nobody may touch."""

import torch

GUARD = 64
PATTERN = 0xA5


class Guards:
    """Makes tensors with guard bytes before and after; `check` finds a write outside of them."""

    def __init__(self):
        self._made = []

    def copy(self, x, shift=0):
        """x in new memory that begins `shift` entries after an address that is a multiple of 64."""
        room, length = shift * x.element_size(), x.numel() * x.element_size()
        buffer = torch.full((2 * GUARD + room + length,), PATTERN, dtype=torch.uint8)
        self._made.append((buffer, GUARD + room, GUARD + room + length))
        out = buffer[GUARD + room : GUARD + room + length].view(x.dtype).view(x.shape)
        return out.copy_(x)

    def poisoned(self, shape, dtype, shift=0):
        """A tensor that holds what no kernel writes: NaN, or bytes of 0xCD."""
        filled = torch.full(shape, torch.nan) if dtype.is_floating_point else torch.full(shape, 0xCD, dtype=torch.uint8)
        return self.copy(filled.to(dtype), shift)

    def check(self):
        for buffer, first, last in self._made:
            outside = torch.cat([buffer[:first], buffer[last:]])
            assert (outside == PATTERN).all(), "a kernel wrote beside a tensor"


def same_bits(a, b):
    """Equal dtypes and bytes, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
