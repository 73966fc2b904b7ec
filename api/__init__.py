"""sharpscope: see what the loss landscape does while a network trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .dynamics import (
    AverageSharpness,
    BetaCondition,
    BlockSpectra,
    BottomEigenvalue,
    CodecError,
    Density,
    EffectiveSharpness,
    GradientCurvature,
    GradientNorm,
    Loss,
    Measurement,
    MeasurementFailedWarning,
    Monitor,
    OptimizerStateBytes,
    Point,
    PreconditionedSharpness,
    Row,
    SAMEdge,
    SAMSharpness,
    SecondMomentSNR,
    Sharpness,
    StabilityThreshold,
    ThresholdRatio,
    Trace,
    TrainingDiverged,
    Trajectory,
    TrajectoryError,
    UpdateCurvature,
    analyze,
    compare,
    doctor,
    info,
    replay,
    train,
)
from .dynamics.optimizers import preconditioner_of, stability_threshold_of
from .hessian import (
    GGN,
    DenseOperator,
    EigenPairs,
    Estimate,
    Fisher,
    GradientCovariance,
    Hessian,
    LinearOperator,
    NotConvergedWarning,
    NotTwiceDifferentiable,
    PreconditionedOperator,
    block_spectra,
    diagonal,
    frobenius_norm,
    solve,
    spectral_density,
    top_eigenvalues,
    trace,
)
from .landscape import Block, Objective, Partition, PerExampleStatistics, partition, per_example_statistics

if TYPE_CHECKING:
    from . import figures
    from .figures import plot

__version__ = "0.1.0"

__all__ = [
    "GGN",
    "AverageSharpness",
    "BetaCondition",
    "Block",
    "BlockSpectra",
    "BottomEigenvalue",
    "CodecError",
    "DenseOperator",
    "Density",
    "EffectiveSharpness",
    "EigenPairs",
    "Estimate",
    "Fisher",
    "GradientCovariance",
    "GradientCurvature",
    "GradientNorm",
    "Hessian",
    "LinearOperator",
    "Loss",
    "Measurement",
    "MeasurementFailedWarning",
    "Monitor",
    "NotConvergedWarning",
    "NotTwiceDifferentiable",
    "Objective",
    "OptimizerStateBytes",
    "Partition",
    "PerExampleStatistics",
    "Point",
    "PreconditionedOperator",
    "PreconditionedSharpness",
    "Row",
    "SAMEdge",
    "SAMSharpness",
    "SecondMomentSNR",
    "Sharpness",
    "StabilityThreshold",
    "ThresholdRatio",
    "Trace",
    "TrainingDiverged",
    "Trajectory",
    "TrajectoryError",
    "UpdateCurvature",
    "analyze",
    "block_spectra",
    "compare",
    "diagonal",
    "doctor",
    "figures",
    "frobenius_norm",
    "info",
    "partition",
    "per_example_statistics",
    "plot",
    "preconditioner_of",
    "replay",
    "solve",
    "spectral_density",
    "stability_threshold_of",
    "top_eigenvalues",
    "trace",
    "train",
]


def __getattr__(name: str) -> Any:
    """matplotlib is loaded only by whoever draws."""
    if name in ("figures", "plot"):
        figures = import_module(".figures", __name__)
        return figures if name == "figures" else figures.plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
