"""Along training: measurements, the monitor that runs them, the trajectory that keeps them."""

from .analysis import Analysis, analyze
from .batch_noise import BatchNoise
from .beta_condition import BetaCondition
from .bifurcation import Bifurcation, bifurcation, detect_period, late_orbit, lyapunov_exponent, onset
from .catapults import Catapult, WarmupMechanism, catapults, warmup_mechanism
from .coherence_measurement import Coherence
from .comparison import Comparison, compare
from .coupled_runs import coupled_runs
from .critical_constants import CriticalConstants, EarlyRun, critical_constants, learning_rate_from_c
from .doctor import Check, Diagnosis, doctor
from .eigen_response import EigenResponse, eigen_responses
from .gradient_noise import BatchSharpness, GradientAlignment, GradientNoiseScale, GradientSNR, GradientTailIndex
from .info import info
from .linear_risk import LinearRisk, SampledRisk, linear_risk, sampled_linear_risk, second_moment_radius
from .measurements import GradientCurvature, GradientNorm, Loss, StabilityThreshold, UpdateCurvature
from .monitor import MeasurementFailedWarning, Monitor
from .optimizer_measurements import CodecError, OptimizerStateBytes
from .point import Measurement, Point
from .power_law import PowerLaw, crossing, crossover, power_law_fit
from .preconditioned_measurements import EffectiveSharpness, PreconditionedSharpness, ThresholdRatio
from .regimes import Regime, regimes
from .replay import ReplayResult, replay
from .row import Row
from .sam_sharpness import AverageSharpness, SAMEdge, SAMSharpness
from .saturation import SteepestDrop, steepest_drop
from .schema import TrajectoryError
from .second_moment_snr import SecondMomentSNR, second_moments
from .snr_profile import SNRProfile, derive_rules, snr
from .spectra_measurements import BlockSpectra, BottomEigenvalue, Density, Sharpness, Trace
from .training import TrainingDiverged, train
from .training_result import TrainingResult
from .trajectory import Series, Trajectory
from .uv_model import UVModel, period_two, uv_map, uv_sharpness

__all__ = [
    "Analysis",
    "AverageSharpness",
    "BatchNoise",
    "BatchSharpness",
    "BetaCondition",
    "Bifurcation",
    "BlockSpectra",
    "BottomEigenvalue",
    "Catapult",
    "Check",
    "CodecError",
    "Coherence",
    "Comparison",
    "CriticalConstants",
    "Density",
    "Diagnosis",
    "EarlyRun",
    "EffectiveSharpness",
    "EigenResponse",
    "GradientAlignment",
    "GradientCurvature",
    "GradientNoiseScale",
    "GradientNorm",
    "GradientSNR",
    "GradientTailIndex",
    "LinearRisk",
    "Loss",
    "Measurement",
    "MeasurementFailedWarning",
    "Monitor",
    "OptimizerStateBytes",
    "Point",
    "PowerLaw",
    "PreconditionedSharpness",
    "Regime",
    "ReplayResult",
    "Row",
    "SAMEdge",
    "SAMSharpness",
    "SNRProfile",
    "SampledRisk",
    "SecondMomentSNR",
    "Series",
    "Sharpness",
    "StabilityThreshold",
    "SteepestDrop",
    "ThresholdRatio",
    "Trace",
    "TrainingDiverged",
    "TrainingResult",
    "Trajectory",
    "TrajectoryError",
    "UVModel",
    "UpdateCurvature",
    "WarmupMechanism",
    "analyze",
    "bifurcation",
    "catapults",
    "compare",
    "coupled_runs",
    "critical_constants",
    "crossing",
    "crossover",
    "derive_rules",
    "detect_period",
    "doctor",
    "eigen_responses",
    "info",
    "late_orbit",
    "learning_rate_from_c",
    "linear_risk",
    "lyapunov_exponent",
    "onset",
    "period_two",
    "power_law_fit",
    "regimes",
    "replay",
    "sampled_linear_risk",
    "second_moment_radius",
    "second_moments",
    "snr",
    "steepest_drop",
    "train",
    "uv_map",
    "uv_sharpness",
    "warmup_mechanism",
]
