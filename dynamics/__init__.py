"""Along training: measurements, the monitor that runs them, the trajectory that keeps them."""

from .analysis import Analysis, analyze
from .beta_condition import BetaCondition
from .comparison import Comparison, compare
from .doctor import Check, Diagnosis, doctor
from .info import info
from .measurements import GradientCurvature, GradientNorm, Loss, StabilityThreshold, UpdateCurvature
from .monitor import MeasurementFailedWarning, Monitor
from .optimizer_measurements import CodecError, OptimizerStateBytes
from .point import Measurement, Point
from .preconditioned_measurements import EffectiveSharpness, PreconditionedSharpness, ThresholdRatio
from .replay import ReplayResult, replay
from .row import Row
from .sam_sharpness import AverageSharpness, SAMEdge, SAMSharpness
from .schema import TrajectoryError
from .second_moment_snr import SecondMomentSNR, second_moments
from .snr_profile import SNRProfile, derive_rules, snr
from .spectra_measurements import BlockSpectra, BottomEigenvalue, Density, Sharpness, Trace
from .training import TrainingDiverged, train
from .training_result import TrainingResult
from .trajectory import Series, Trajectory

__all__ = [
    "Analysis",
    "AverageSharpness",
    "BetaCondition",
    "BlockSpectra",
    "BottomEigenvalue",
    "Check",
    "CodecError",
    "Comparison",
    "Density",
    "Diagnosis",
    "EffectiveSharpness",
    "GradientCurvature",
    "GradientNorm",
    "Loss",
    "Measurement",
    "MeasurementFailedWarning",
    "Monitor",
    "OptimizerStateBytes",
    "Point",
    "PreconditionedSharpness",
    "ReplayResult",
    "Row",
    "SAMEdge",
    "SAMSharpness",
    "SNRProfile",
    "SecondMomentSNR",
    "Series",
    "Sharpness",
    "StabilityThreshold",
    "ThresholdRatio",
    "Trace",
    "TrainingDiverged",
    "TrainingResult",
    "Trajectory",
    "TrajectoryError",
    "UpdateCurvature",
    "analyze",
    "compare",
    "derive_rules",
    "doctor",
    "info",
    "replay",
    "second_moments",
    "snr",
    "train",
]
