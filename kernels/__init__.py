"""Small array functions that know no model."""

from .accurate import combine, dot, norm, project
from .tridiagonal import tridiagonal_quadrature

__all__ = ["combine", "dot", "norm", "project", "tridiagonal_quadrature"]
