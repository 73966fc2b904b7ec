"""Measurements of the Hessian's spectrum at a point: its ends, its trace, its density, its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch

from ..hessian.block_spectra import block_spectra
from ..hessian.eigs import EigenPairs
from ..hessian.heterogeneity import Heterogeneity
from ..hessian.slq import spectral_density
from ..hessian.trace import trace
from ..hessian.tracking import EigenTracker
from ..landscape.blocks import Blocks, Partition
from .point import Point
from .row import Row


@dataclass(frozen=True)
class Sharpness:
    """Largest eigenvalues of the Hessian, each point started from the eigenvectors of the one before.

    Two to five products a point keep λ_max within 1 %. Nothing is extrapolated from point to point.

    Rows: index i for the i-th of `num`, `error` its error bar, an estimate; see `EigenTracker`. Certain is that an
    eigenvalue lies within three times that. Products and seconds stand on index 0.

    Args:
        every: Period in steps.
        num: How many, at most n.
        which: "LA" largest, "SA" smallest, "LM" largest in absolute value, "BE" both ends; see `top_eigenvalues`.
        tol: Error bar over |λ|max at which an eigenvalue counts as converged.
        max_products: Budget of a point; what is not converged then is marked so.
        proof_every: At the first point and every so many-th after it, products are spent to show that no eigenvalue has
            overtaken the followed ones unseen; that is the longest for which one can. None: at the first point only.
        seed: Of the random part of the start, another one at each point.
        keep_vectors: Record the eigenvectors as the array "vectors" [n, num] of index 0.
    """

    every: int | None = None
    num: int = 1
    which: Literal["LA", "SA", "LM", "BE"] = "LA"
    tol: float = 1e-3
    _: KW_ONLY
    max_products: int | None = None
    proof_every: int | None = 25
    seed: int = 0
    keep_vectors: bool = False
    name: str = "sharpness"

    def measure(self, point: Point) -> Iterator[Row]:
        tracker = EigenTracker(
            self.num,
            which=self.which,
            tol=self.tol,
            max_products=self.max_products,
            proof_every=self.proof_every,
            seed=self.seed,
            state=point.state,
        )
        yield from eigenvalue_rows(self.name, tracker.measure(point.hessian()), keep_vectors=self.keep_vectors)


@dataclass(frozen=True)
class BottomEigenvalue(Sharpness):
    """Smallest eigenvalues of the Hessian, most negative first; otherwise as `Sharpness`."""

    which: Literal["LA", "SA", "LM", "BE"] = "SA"
    _: KW_ONLY
    name: str = "bottom_eigenvalue"


@dataclass(frozen=True)
class Trace:
    """Trace of the Hessian with its standard error.

    The probe vectors are the same at every point: changes along the run are then seen several times more sharply
    than the standard error, which is that of the level.

    Args:
        every: Period in steps.
        num_probes: Products spent.
        method: As for `trace`.
        seed: Of the probe vectors.
    """

    every: int | None = None
    num_probes: int = 32
    _: KW_ONLY
    method: str = "hutchinson"
    seed: int = 0
    name: str = "trace"

    def measure(self, point: Point) -> Iterator[Row]:
        result = trace(point.hessian(), method=self.method, num_probes=self.num_probes, seed=self.seed)
        yield Row(self.name, result.estimate, result.stderr, converged=result.converged, products=result.products)


@dataclass(frozen=True)
class Density:
    """Spectral density of the Hessian by stochastic Lanczos quadrature.

    Row: the mean eigenvalue with its standard error; arrays "nodes" and "weights" [num_probes, num_steps].

    Args:
        every: Period in steps.
        num_steps: Lanczos steps for each probe vector.
        num_probes: Probe vectors, the same at every point.
        seed: Of the probe vectors.
    """

    every: int | None = None
    num_steps: int = 40
    num_probes: int = 8
    _: KW_ONLY
    seed: int = 0
    name: str = "density"

    def measure(self, point: Point) -> Iterator[Row]:
        density = spectral_density(
            point.hessian(), num_steps=self.num_steps, num_probes=self.num_probes, seed=self.seed
        )
        mean = density.mean()
        yield Row(
            self.name,
            mean.estimate,
            mean.stderr,
            products=density.products,
            seconds=density.seconds,
            arrays={"nodes": density.nodes, "weights": density.weights},
        )


@dataclass(frozen=True)
class BlockSpectra:
    """Spectrum of every diagonal block of the Hessian, and how much the blocks differ.

    Rows, for each block:
        "block_sharpness": its largest eigenvalue, with the residual bound.
        "block_effective_rank": (Σ |λ|)² / Σ λ².
        "block_negative_mass": Σ_{λ<0} |λ| / Σ |λ|.
    Rows of the whole model, as in `Heterogeneity`, under the measurement's name NAME:
        NAME: mean Jensen-Shannon divergence between blocks on the axis log10 |λ|, in nats, at most ln 2 = 0.693, with
            its standard error over probes and `js_divergence_resolution`. Arrays "js_divergence" [B, B] and for each
            block "BLOCK/nodes" and "BLOCK/weights", the eigenvalues found and their shares, and "BLOCK/size_and_noise"
            [2], its number of coordinates and the magnitude at which eigenvalues cannot be told from 0.
        "NAME_max": that of the two blocks that differ most.
        "NAME_linear": the mean on the axis λ, which sees little of blocks much smaller than the largest.
        "NAME_scale_ratio": largest over smallest max |λ| of a block, with what the residuals may change.
        "NAME_scale_spread": standard deviation of log10 max |λ| over blocks, in decades.

    Args:
        every: Period in steps.
        blocks: "parameter", "layer", "head", "neuron", globs or a partition, as for `block_spectra`.
        dense_limit: Blocks up to this size are diagonalised exactly; None as in `block_spectra`.
        num_steps, num_probes: Of the density of a larger block.
        tol: Of the largest eigenvalue of a larger block.
        seed: Of the probe vectors, the same at every point.
    """

    every: int | None = None
    blocks: Blocks | Partition = "parameter"
    _: KW_ONLY
    dense_limit: int | None = None
    num_steps: int = 40
    num_probes: int = 8
    tol: float = 1e-3
    seed: int = 0
    name: str = "heterogeneity"

    def measure(self, point: Point) -> Iterator[Row]:
        spectra = block_spectra(
            point.objective,
            self.blocks,
            operator=point.hessian(),
            dense_limit=self.dense_limit,
            num_steps=self.num_steps,
            num_probes=self.num_probes,
            num_top=1,
            tol=self.tol,
            seed=self.seed,
        )
        arrays = {"js_divergence": spectra.js_divergence()}
        for block, spectrum in spectra.items():
            arrays[f"{block}/nodes"], arrays[f"{block}/weights"] = spectrum.atoms()
            arrays[f"{block}/size_and_noise"] = torch.tensor([spectrum.size, spectrum.noise], dtype=torch.float64)
            yield Row(
                "block_sharpness",
                float(spectrum.top[0]),
                float(spectrum.top_residuals[0]),
                block=block,
                converged=spectrum.converged,
                products=spectrum.products,
                seconds=spectrum.seconds,
            )
            yield Row("block_effective_rank", spectrum.effective_rank, block=block)
            yield Row("block_negative_mass", spectrum.negative_mass, block=block)
        found, linear = spectra.heterogeneity(), spectra.heterogeneity(axis="linear")
        sure = spectra.converged
        yield Row(self.name, found.js_divergence_mean, _js_error(found), converged=sure, arrays=arrays)
        yield Row(f"{self.name}_max", found.js_divergence_max, converged=sure)
        yield Row(f"{self.name}_linear", linear.js_divergence_mean, _js_error(linear), converged=sure)
        yield Row(f"{self.name}_scale_ratio", found.scale_ratio, found.scale_ratio_error, converged=sure)
        yield Row(f"{self.name}_scale_spread", found.scale_spread, converged=sure)


def _js_error(found: Heterogeneity) -> float:
    return found.js_divergence_stderr + found.js_divergence_resolution


def eigenvalue_rows(name: str, pairs: EigenPairs, *, keep_vectors: bool, spent: bool = True) -> Iterator[Row]:
    """A row for each pair; what was spent, and the vectors, stand on index 0.

    Args:
        spent: Whether the products were made for this measurement, not shared with another one.
    """
    for i, value in enumerate(pairs.values.tolist()):
        first = i == 0
        yield Row(
            name,
            value,
            float(pairs.value_bounds[i]),
            index=i,
            converged=pairs.converged,
            products=pairs.products if first and spent else 0,
            seconds=pairs.seconds if first and spent else 0.0,
            arrays={"vectors": pairs.vectors} if first and keep_vectors else None,
        )
