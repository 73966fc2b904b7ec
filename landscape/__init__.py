"""The loss as a function of the weights."""

from .blocks import Block, Partition, partition
from .evaluation import Chunk
from .layout import Layout
from .objective import Objective
from .per_example import per_example_statistics
from .per_example_statistics import NoiseScale, PerExampleStatistics
from .sharpness import average_sharpness, sam_sharpness
from .structure import structure

__all__ = [
    "Block",
    "Chunk",
    "Layout",
    "NoiseScale",
    "Objective",
    "Partition",
    "PerExampleStatistics",
    "average_sharpness",
    "partition",
    "per_example_statistics",
    "sam_sharpness",
    "structure",
]
