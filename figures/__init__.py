"""Trajectories and spectra as matplotlib axes; nothing is computed here."""

from .blocks import block_spectra_grid, js_heatmap
from .comparison import comparison, stability
from .plot import plot
from .quantities import quantities
from .spectrum import density, density_evolution
from .study import study_figure
from .style import save, style
from .trajectory import sharpness_trajectory

__all__ = [
    "block_spectra_grid",
    "comparison",
    "density",
    "density_evolution",
    "js_heatmap",
    "plot",
    "quantities",
    "save",
    "sharpness_trajectory",
    "stability",
    "study_figure",
    "style",
]
