"""Optimizers, and what the monitor reads from them."""

from .choice import make_optimizer, optimizer_names
from .thresholds import stability_threshold_of

__all__ = ["make_optimizer", "optimizer_names", "stability_threshold_of"]
