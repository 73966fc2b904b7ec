"""sharpscope: see what the loss landscape does while a network trains."""

from .hessian.curvature import Hessian
from .hessian.gauss_newton import GGN, Fisher, GradientCovariance
from .landscape import Objective, partition

__version__ = "0.1.0"
