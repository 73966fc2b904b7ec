"""The loss as a function of the weights."""

from .blocks import Block, Partition, partition
from .evaluation import Chunk
from .layout import Layout
from .objective import Objective

__all__ = ["Block", "Chunk", "Layout", "Objective", "Partition", "partition"]
