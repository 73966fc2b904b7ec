"""Along training: measurements, the monitor that runs them, the trajectory that keeps them."""

from .analysis import Analysis, analyze
from .doctor import Check, Diagnosis, doctor
from .info import info
from .measurements import GradientCurvature, GradientNorm, Loss, StabilityThreshold, UpdateCurvature
from .monitor import MeasurementFailedWarning, Monitor
from .point import Measurement, Point
from .replay import ReplayResult, replay
from .row import Row
from .schema import TrajectoryError
from .spectra_measurements import BlockSpectra, BottomEigenvalue, Density, Sharpness, Trace
from .training import TrainingDiverged, train
from .training_result import TrainingResult
from .trajectory import Series, Trajectory

__all__ = [
    "Analysis",
    "BlockSpectra",
    "BottomEigenvalue",
    "Check",
    "Density",
    "Diagnosis",
    "GradientCurvature",
    "GradientNorm",
    "Loss",
    "Measurement",
    "MeasurementFailedWarning",
    "Monitor",
    "Point",
    "ReplayResult",
    "Row",
    "Series",
    "Sharpness",
    "StabilityThreshold",
    "Trace",
    "TrainingDiverged",
    "TrainingResult",
    "Trajectory",
    "TrajectoryError",
    "UpdateCurvature",
    "analyze",
    "doctor",
    "info",
    "replay",
    "train",
]
