"""Second order at one point: operators, and algorithms that read them."""

from .batch_sharpness import batch_sharpness
from .block_spectra import BlockSpectra, Heterogeneity, block_spectra
from .block_spectrum import BlockSpectrum
from .coherence import Coherence, StabilityThresholds, coherence
from .curvature import Hessian
from .diagonal import DiagonalEstimate, diagonal
from .divergence import js_grid_sum
from .eigs import EigenPairs, top_eigenvalues
from .engines import Engine, NotTwiceDifferentiable
from .estimate import Estimate, NotConvergedWarning
from .frobenius import frobenius_norm
from .gauss_newton import GGN, Fisher, GradientCovariance
from .mean_square import MeanSquareStability
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
    "Coherence",
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
    "MeanSquareStability",
    "NegativeCurvature",
    "NotConvergedWarning",
    "NotTwiceDifferentiable",
    "PreconditionedOperator",
    "RestrictedOperator",
    "Root",
    "Solution",
    "SpectralDensity",
    "StabilityThresholds",
    "batch_sharpness",
    "block_spectra",
    "coherence",
    "diagonal",
    "frobenius_norm",
    "js_grid_sum",
    "solve",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
