"""The loss as a function of the weights."""

from .blocks import Block, Partition, partition
from .evaluation import Chunk
from .interpolation import LinearInterpolation, linear_interpolation
from .layout import Layout
from .minibatches import minibatches
from .objective import Objective
from .per_example import per_example_statistics
from .per_example_alignment import Alignment
from .per_example_statistics import NoiseScale, PerExampleStatistics
from .per_example_tails import GradientTails
from .sharpness import average_sharpness, sam_sharpness
from .structure import structure
from .tail_index import TailIndex, tail_index

__all__ = [
    "Alignment",
    "Block",
    "Chunk",
    "GradientTails",
    "Layout",
    "LinearInterpolation",
    "NoiseScale",
    "Objective",
    "Partition",
    "PerExampleStatistics",
    "TailIndex",
    "average_sharpness",
    "linear_interpolation",
    "minibatches",
    "partition",
    "per_example_statistics",
    "sam_sharpness",
    "structure",
    "tail_index",
]
