"""Small array functions that know no model."""

from ._dispatch import KernelWarning
from .accurate import combine, dot, norm, project
from .adamw4 import AdamW4State, adamw4_numbers, adamw4_state, adamw4_step
from .batched_lanczos import LanczosRuns, NonFiniteProduct, batched_lanczos
from .capabilities import Capability, capabilities
from .codec import Packed, dequantize, quantize_m, quantize_v
from .torchao_layout import from_torchao, to_torchao
from .tridiagonal import tridiagonal_quadrature

__all__ = [
    "AdamW4State",
    "Capability",
    "KernelWarning",
    "LanczosRuns",
    "NonFiniteProduct",
    "Packed",
    "adamw4_numbers",
    "adamw4_state",
    "adamw4_step",
    "batched_lanczos",
    "capabilities",
    "combine",
    "dequantize",
    "dot",
    "from_torchao",
    "norm",
    "project",
    "quantize_m",
    "quantize_v",
    "to_torchao",
    "tridiagonal_quadrature",
]
