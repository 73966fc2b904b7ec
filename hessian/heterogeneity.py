"""How much the diagonal blocks of a curvature matrix differ, in one record with its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_spectrum import BlockSpectrum
from .divergence import SpectralAxis, js_divergence, js_to


@dataclass(frozen=True)
class Heterogeneity:
    """How much the blocks differ. Means and maxima over pairs are 0, and ratios 1, where there are fewer than two.

    Attributes:
        js_divergence_mean, js_divergence_max: Jensen-Shannon divergence over all pairs of blocks, in nats, at most
            ln 2.
        js_divergence_stderr: Standard error of the mean from the probe vectors of the sampled blocks, by the
            jackknife: 0 if all are exact, infinite if one has a single probe.
        js_divergence_resolution: Distance of the mean to that from half the Lanczos steps of the sampled blocks: a hint
            of what their number leaves unresolved, eigenvalues near zero above all, by which blocks look more different
            than they are. No bound: the true distance may be several times as large, since it shrinks slowly with the
            steps. 0 if all are exact, NaN where it is unknown.
        index: js_divergence_mean / ln 2, between 0 (all spectra equal) and 1 (no two overlap).
        most_different: The two blocks that differ most.
        scale_ratio: Largest over smallest max |λ|, over the blocks that are not zero.
        scale_ratio_error: What the residuals of the two eigenvalues may change of it, to first order.
        scale_spread: Standard deviation of log10 max |λ| over the blocks that are not zero, in decades: unlike the
            ratio, not up to two blocks alone.
        largest, smallest: The blocks with these.
        negative_mass: Σ_{λ<0} |λ| / Σ |λ| over all blocks together.
        zero_blocks: Names of the blocks without curvature.
        axis: Of the divergence.
    """

    js_divergence_mean: float
    js_divergence_max: float
    js_divergence_stderr: float
    js_divergence_resolution: float
    index: float
    most_different: tuple[str, str] | None
    scale_ratio: float
    scale_ratio_error: float
    scale_spread: float
    largest: str | None
    smallest: str | None
    negative_mass: float
    zero_blocks: tuple[str, ...]
    axis: str

    @classmethod
    def of(
        cls, spectra: Mapping[str, BlockSpectrum], *, axis: str = "log", sigma: float | None = None
    ) -> Heterogeneity:
        """The record of blocks by name."""
        names, all_spectra = list(spectra), list(spectra.values())
        cells = axis_around(spectra, axis=axis, sigma=sigma)
        masses = torch.stack([cells.masses(*s.atoms(), s.noise) for s in all_spectra])
        rows, columns = torch.triu_indices(len(names), len(names), offset=1)
        pairs = js_divergence(masses)[rows, columns]
        worst = int(pairs.argmax()) if len(pairs) else None
        mean = float(pairs.mean()) if len(pairs) else 0.0
        alive = sorted((s for s in all_spectra if not s.zero), key=lambda s: s.scale)
        ratio = alive[-1].scale / alive[0].scale if alive else 1.0
        spread = torch.tensor([math.log10(s.scale) for s in alive], dtype=torch.float64)
        magnitude, negative = 0.0, 0.0
        for s in all_spectra:
            nodes, weights = s.atoms()
            magnitude += s.size * float((weights * nodes.abs()).sum())
            negative += s.size * float((weights * nodes.clamp(max=0.0).abs()).sum())
        return cls(
            js_divergence_mean=mean,
            js_divergence_max=float(pairs.max()) if len(pairs) else 0.0,
            js_divergence_stderr=_stderr(all_spectra, cells, masses) if len(pairs) else 0.0,
            js_divergence_resolution=_resolution(all_spectra, cells, mean) if len(pairs) else 0.0,
            index=mean / math.log(2),
            most_different=None if worst is None else (names[int(rows[worst])], names[int(columns[worst])]),
            scale_ratio=ratio,
            scale_ratio_error=_ratio_error(alive[-1], alive[0]) if len(alive) > 1 else 0.0,
            scale_spread=float(spread.std()) if len(alive) > 1 else 0.0,
            largest=alive[-1].name if alive else None,
            smallest=alive[0].name if alive else None,
            negative_mass=negative / magnitude if magnitude > 0 else 0.0,
            zero_blocks=tuple(s.name for s in all_spectra if s.zero),
            axis=axis,
        )


def axis_around(spectra: Mapping[str, BlockSpectrum], *, axis: str, sigma: float | None) -> SpectralAxis:
    """The axis that holds the eigenvalues of all blocks."""
    noise = [s.noise for s in spectra.values()]
    return SpectralAxis.around([s.atoms() for s in spectra.values()], kind=axis, sigma=sigma, zeros=noise)


def _stderr(spectra: list[BlockSpectrum], cells: SpectralAxis, masses: Tensor) -> float:
    """Of the mean over pairs: Σ over blocks of the jackknife variance over that block's probes, which are its own."""
    num_pairs = len(spectra) * (len(spectra) - 1) / 2
    variance = 0.0
    for i, s in enumerate(spectra):
        if s.density is None or s.density.exact:
            continue
        p = len(s.density.nodes)
        if p == 1:
            return math.inf
        rows = [
            cells.masses(nodes, weights, s.noise)
            for nodes, weights in zip(s.density.nodes, s.density.weights, strict=True)
        ]
        total, others = torch.stack(rows).sum(0), torch.cat([masses[:i], masses[i + 1 :]])
        without = torch.stack([js_to((total - row).clamp(min=0) / (p - 1), others).sum() for row in rows]) / num_pairs
        variance += (p - 1) ** 2 / p * float(without.var())
    return math.sqrt(variance)


def _resolution(spectra: list[BlockSpectrum], cells: SpectralAxis, mean: float) -> float:
    found = [s.half_atoms() for s in spectra]
    halves = [atoms for atoms in found if atoms is not None]
    if len(halves) < len(found):
        return math.nan
    noise = [s.noise for s in spectra]
    own = SpectralAxis.around(halves, kind=cells.kind, sigma=cells.sigma, zeros=noise)
    masses = torch.stack([own.masses(*atoms, zero) for atoms, zero in zip(halves, noise, strict=True)])
    rows, columns = torch.triu_indices(len(spectra), len(spectra), offset=1)
    return abs(float(js_divergence(masses)[rows, columns].mean()) - mean)


def _ratio_error(largest: BlockSpectrum, smallest: BlockSpectrum) -> float:
    ratio = largest.scale / smallest.scale
    return ratio * (largest.scale_error / largest.scale + smallest.scale_error / smallest.scale)
