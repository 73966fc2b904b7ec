"""Optimizers, and what the monitor reads from them. Each is loaded when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accelerated import AcceleratedSGD, accelerated_options
    from .adam_mini import AdamMini
    from .adamw4bit import AdamW4bit
    from .adapters import adapted
    from .affine_variance import estimate_D1_D0
    from .beta_phases import phase_diagram, rescaled_beta2
    from .block_rounding import sign_round
    from .catapult import catapult_learning_rate
    from .choice import make_optimizer, optimizer_names
    from .convergence_condition import check_sufficient_condition
    from .generic_adam import GenericAdam
    from .gi_adam import GIAdam
    from .gradient_snr import gsnr
    from .heavy_tailed import HeavyTailedSGD
    from .langevin import LangevinSGD
    from .lion import Lion
    from .packed_codes import PackedWeight
    from .preconditioners import Preconditioner, preconditioner_of
    from .psgd import PSGD
    from .sam import SAM, sam_edge
    from .schedules import PaperTheta, PolynomialTheta, PowerSchedule, practical
    from .sgd_sai import SGDSaI
    from .sign import SignSGD
    from .sign_momentum2 import SignMomentum2
    from .sign_rounding import SignRound
    from .slim_adam import SlimAdam
    from .switch import SwitchSchedule
    from .thresholds import sharpness_threshold_of, stability_threshold_of
    from .torch_geometry import NoPreconditionerError
    from .warmup import CatapultWarmup, LinearWarmup

_MODULES = {
    "AcceleratedSGD": "accelerated",
    "AdamMini": "adam_mini",
    "AdamW4bit": "adamw4bit",
    "CatapultWarmup": "warmup",
    "GIAdam": "gi_adam",
    "GenericAdam": "generic_adam",
    "HeavyTailedSGD": "heavy_tailed",
    "LangevinSGD": "langevin",
    "LinearWarmup": "warmup",
    "Lion": "lion",
    "NoPreconditionerError": "torch_geometry",
    "PSGD": "psgd",
    "PackedWeight": "packed_codes",
    "PaperTheta": "schedules",
    "PolynomialTheta": "schedules",
    "PowerSchedule": "schedules",
    "Preconditioner": "preconditioners",
    "SAM": "sam",
    "SGDSaI": "sgd_sai",
    "SignMomentum2": "sign_momentum2",
    "SignRound": "sign_rounding",
    "SignSGD": "sign",
    "SlimAdam": "slim_adam",
    "SwitchSchedule": "switch",
    "accelerated_options": "accelerated",
    "adapted": "adapters",
    "catapult_learning_rate": "catapult",
    "check_sufficient_condition": "convergence_condition",
    "estimate_D1_D0": "affine_variance",
    "gsnr": "gradient_snr",
    "make_optimizer": "choice",
    "optimizer_names": "choice",
    "phase_diagram": "beta_phases",
    "practical": "schedules",
    "preconditioner_of": "preconditioners",
    "rescaled_beta2": "beta_phases",
    "sam_edge": "sam",
    "sharpness_threshold_of": "thresholds",
    "sign_round": "block_rounding",
    "stability_threshold_of": "thresholds",
}

__all__ = [
    "PSGD",
    "SAM",
    "AcceleratedSGD",
    "AdamMini",
    "AdamW4bit",
    "CatapultWarmup",
    "GIAdam",
    "GenericAdam",
    "HeavyTailedSGD",
    "LangevinSGD",
    "LinearWarmup",
    "Lion",
    "NoPreconditionerError",
    "PackedWeight",
    "PaperTheta",
    "PolynomialTheta",
    "PowerSchedule",
    "Preconditioner",
    "SGDSaI",
    "SignMomentum2",
    "SignRound",
    "SignSGD",
    "SlimAdam",
    "SwitchSchedule",
    "accelerated_options",
    "adapted",
    "catapult_learning_rate",
    "check_sufficient_condition",
    "estimate_D1_D0",
    "gsnr",
    "make_optimizer",
    "optimizer_names",
    "phase_diagram",
    "practical",
    "preconditioner_of",
    "rescaled_beta2",
    "sam_edge",
    "sharpness_threshold_of",
    "sign_round",
    "stability_threshold_of",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
