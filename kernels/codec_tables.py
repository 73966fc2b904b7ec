"""The numbers that define the 4-bit codec."""

from __future__ import annotations

import numpy as np

# Written into every payload. Another layout, map or packing gets another number.
VERSION = 1
BLOCK = 128
# Scales below the smallest normal float32 are stored as 0: their reciprocals would overflow.
TINY = np.float32(2.0**-126)

# Signed dynamic exponents: −1 is missing, +1 is there.
_DE = (-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0)
_DE += (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0)
_STEPS = np.arange(1, 17, dtype=np.float32) / np.float32(16)

# Decoded values of the codes 0 to 15, relative to the scale: float32, ascending.
VALUES: dict[str, np.ndarray] = {"de": np.array(_DE, np.float32), "linear": _STEPS, "square": _STEPS * _STEPS}
# Between neighbours of the de map; a value on a threshold gets the lower code.
DE_THRESHOLDS: np.ndarray = np.float32(0.5) * (VALUES["de"][:-1] + VALUES["de"][1:])
# The code of a value 0; the codes beside the end of an odd tensor, too.
ZERO_CODE = {"de": 7, "linear": 0, "square": 0}
