"""What a CUDA kernel is and how it is started, wherever it runs: a GPU, or the emulator of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

FOLDER = Path(__file__).parent

# A tensor is passed as its address and None as a null pointer; scalars are numpy scalars, whose width is explicit; a
# structured array of size 1 is a struct passed by value.
Argument = Tensor | np.generic | np.ndarray | None


@dataclass(frozen=True)
class Source:
    """A CUDA program: files of this folder one after the other, under macro definitions.

    The files include nothing, so that one text serves NVRTC, nvcc and the emulator.
    """

    files: tuple[str, ...]
    defines: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """The program; compilers name its lines as those of the files."""
        parts = [f"#define {name} {value}\n" for name, value in self.defines]
        parts += [f'#line 1 "{name}"\n{(FOLDER / name).read_text()}\n' for name in self.files]
        return "".join(parts)


class Launcher(Protocol):
    """Starts kernels on the device that holds their tensors, on its current stream, without waiting for them."""

    def launch(
        self,
        source: Source,
        kernel: str,
        grid: int,
        block: int,
        args: Sequence[Argument],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Run `kernel` in `grid` ≥ 1 blocks of `block` threads with `shared_bytes` of dynamic shared memory."""
        ...
