"""Networks on real data that need no network connection, to try everything else on."""

from .catalogue import WORKLOADS, Defaults, HalfSquaredError, Workload, workload
from .examples import Dataset, Examples

__all__ = ["WORKLOADS", "Dataset", "Defaults", "Examples", "HalfSquaredError", "Workload", "workload"]
