"""Second order at one point: operators, and algorithms that read them."""

from .block_spectra import BlockSpectra, Heterogeneity, block_spectra
from .block_spectrum import BlockSpectrum
from .curvature import Hessian
from .diagonal import DiagonalEstimate, diagonal
from .eigs import EigenPairs, top_eigenvalues
from .engines import Engine, NotTwiceDifferentiable
from .estimate import Estimate, NotConvergedWarning
from .frobenius import frobenius_norm
from .gauss_newton import GGN, Fisher, GradientCovariance
from .operator import (
    DenseOperator,
    DiagonalOperator,
    IdentityOperator,
    LinearOperator,
    RestrictedOperator,
)
from .preconditioned import DiagonalRoot, PreconditionedOperator, Root
from .slq import SpectralDensity, spectral_density
from .solve import NegativeCurvature, Solution, solve
from .trace import trace

__all__ = [
    "GGN",
    "BlockSpectra",
    "BlockSpectrum",
    "DenseOperator",
    "DiagonalEstimate",
    "DiagonalOperator",
    "DiagonalRoot",
    "EigenPairs",
    "Engine",
    "Estimate",
    "Fisher",
    "GradientCovariance",
    "Hessian",
    "Heterogeneity",
    "IdentityOperator",
    "LinearOperator",
    "NegativeCurvature",
    "NotConvergedWarning",
    "NotTwiceDifferentiable",
    "PreconditionedOperator",
    "RestrictedOperator",
    "Root",
    "Solution",
    "SpectralDensity",
    "block_spectra",
    "diagonal",
    "frobenius_norm",
    "solve",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
