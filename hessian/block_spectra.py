"""The spectrum of every diagonal block of a curvature matrix, and how much the blocks differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..landscape.blocks import Blocks, Partition, partition
from ..landscape.objective import Objective
from .block_densities import densities_together, densities_within
from .block_spectrum import BlockSpectrum, exact_spectrum, sampled_spectrum, zero_spectrum
from .curvature import Hessian
from .divergence import js_divergence
from .estimate import NotConvergedWarning
from .heterogeneity import Heterogeneity, axis_around
from .operator import LinearOperator
from .plan import planned
from .planners import plan_block_spectra

# Curvature below this share of the largest block's is rounding: the key bias of an attention, for example, has an
# exactly zero Hessian, in whose noise Lanczos would find eigenvalues.
ZERO = {torch.float64: 1e-13, torch.float32: 1e-6}
# Of the density of a large block: its error, in Wasserstein-1 distance on a transformer's blocks, is less than half
# that of 100 steps from each of 10 probes without deflation.
DEFLATE = 10
STEPS = 40
PROBES = 4
# A block of no more coordinates is formed as a whole.
DENSE_LIMIT = 320
# An operator whose stated error is below this many roundings is as exact as its dtype.
ROUNDINGS = 100


class BlockSpectra(Mapping[str, BlockSpectrum]):
    """Spectra by block name, in the order of the partition.

    Attributes:
        partition: The blocks.
        products, seconds, converged: Of all blocks together.
    """

    def __init__(self, spectra: Mapping[str, BlockSpectrum], partition: Partition) -> None:
        self._spectra = dict(spectra)
        self.partition = partition
        self.products = sum(s.products for s in self._spectra.values())
        self.seconds = sum(s.seconds for s in self._spectra.values())
        self.converged = all(s.converged for s in self._spectra.values())

    def __getitem__(self, name: str) -> BlockSpectrum:
        self.partition[name]  # its error names the near ones
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def js_divergence(self, *, axis: str = "log", sigma: float | None = None) -> Tensor:
        r"""Jensen-Shannon divergence [B, B] between the blocks' eigenvalue densities, in nats, at most ln 2.

        The densities are normalised to integral 1, so the result depends on the smoothing but not on a grid. Published
        values above ln 2 are sums over a grid without its spacing, and comparable on that grid only (`js_grid_sum`).

        Args:
            axis: "log" compares log10 |λ|; what is rounding noise within its block counts as zero, an outcome of its
                own. "linear" compares λ: at any one width it cannot tell blocks much smaller than that apart.
            sigma: Width of the Gaussian smoothing: in decades, default 0.1; or in units of λ, default 1 % of the range
                over all blocks.

        A sampled density does not resolve eigenvalues far below the block's largest: for a comparison of those, raise
        `dense_limit`.

        Source: Zhang et al., Why Transformers Need Adam: A Hessian Perspective, 2024, section 2.
        """
        cells = axis_around(self, axis=axis, sigma=sigma)
        return js_divergence(torch.stack([cells.masses(*s.atoms(), s.noise) for s in self.values()]))

    def js_distance(self, *, axis: str = "log", sigma: float | None = None) -> Tensor:
        """Jensen-Shannon distance [B, B], the square root of `js_divergence`: a metric, at most √ln 2 = 0.833."""
        return self.js_divergence(axis=axis, sigma=sigma).sqrt()

    def heterogeneity(self, *, axis: str = "log", sigma: float | None = None) -> Heterogeneity:
        """How much the blocks differ, in one record; arguments as for `js_divergence`."""
        return Heterogeneity.of(self, axis=axis, sigma=sigma)

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat record per block, for a table."""
        return [
            {
                "block": s.name,
                "size": s.size,
                "exact": s.exact,
                "zero": s.zero,
                "largest": float(s.top[0]),
                "largest_residual": float(s.top_residuals[0]),
                "smallest": float(s.bottom[0]),
                "smallest_residual": float(s.bottom_residuals[0]),
                "trace": s.trace.estimate,
                "trace_stderr": s.trace.stderr,
                "negative_mass": s.negative_mass,
                "effective_rank": s.effective_rank,
                "converged": s.converged,
                "products": s.products,
                "seconds": s.seconds,
            }
            for s in self.values()
        ]

    def __repr__(self) -> str:
        exact, zero = (sum(getattr(s, kind) for s in self.values()) for kind in ("exact", "zero"))
        return f"BlockSpectra({len(self)} blocks, {exact} exact, {zero} zero, products={self.products})"


@dataclass(frozen=True)
class Sampling:
    """How the blocks of more than `dense_limit` coordinates are sampled."""

    num_steps: int
    num_probes: int
    deflate: int
    dense_limit: int

    @classmethod
    def of(
        cls, num_steps: int | None, num_probes: int | None, deflate: int | None, dense_limit: int | None
    ) -> Sampling:
        """The arguments of `block_spectra`, with what is left out filled in."""
        free = num_steps is None and num_probes is None
        steps, probes = num_steps or STEPS, num_probes or PROBES
        limit = DENSE_LIMIT if free else steps * probes
        pairs = DEFLATE if free else 0
        return cls(steps, probes, pairs if deflate is None else deflate, limit if dense_limit is None else dense_limit)


@planned(plan_block_spectra)
def block_spectra(
    objective: Objective | LinearOperator,
    blocks: Blocks | Partition = "parameter",
    *,
    operator: LinearOperator | None = None,
    dense_limit: int | None = None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    deflate: int | None = None,
    density_tol: float | None = None,
    num_top: int = 3,
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> BlockSpectra:
    r"""Spectra of the principal blocks A_bb of a curvature matrix: exact for small blocks, sampled for large ones.

    A block of at most `dense_limit` coordinates is formed from that many products, made symmetric and diagonalised in
    float64. A larger one gets its density by Lanczos quadrature and its extreme eigenvalues with residuals: from the
    same runs where those meet `tol`, else from a search of their own. The runs of all larger blocks go in lockstep, as
    many as an eighth of the free memory holds, and the products of a step go through the data together.

    Args:
        objective: An Objective, whose Hessian is taken, or an operator with parameter names.
        blocks: As for `partition`, or its result.
        operator: Another curvature of the same parameters (GGN, preconditioned ...), where `objective` is an Objective.
        dense_limit: None makes exact what takes no more products than num_steps x num_probes, or 320 by default.
        num_steps, num_probes: Of the density of a large block; by default 40 and 4.
        deflate: Eigenpairs of largest |λ| that are taken out before the density is sampled, as in `spectral_density`;
            by default ten with the default steps and probes, and none with others. Their vectors are held for as many
            large blocks at once as an eighth of the free memory has room for.
        density_tol: Makes each large block's density as accurate as this in Wasserstein-1 distance, by its own
            estimate, as a share of the block's largest |λ|: its top eigenpairs are deflated, then come as many steps
            and probes as it takes, up to 2000 products a block. The blocks then go one after the other.
        num_top: Extreme eigenvalues at each end; all, of a block with fewer.
        tol: For the extreme eigenvalues of a large block, residual over |λ|max.
        max_products: Budget for the extreme eigenvalues of one large block.
        seed: Block i uses seed + i, so that the blocks' errors are independent.
        progress: Show a bar over blocks.

    Warns:
        NotConvergedWarning: once, naming the blocks whose extreme eigenvalues missed `tol`, or whose density missed
            `density_tol`.
    """
    if num_top < 1:
        raise ValueError(f"`num_top` is {num_top}; ask for at least one eigenvalue at each end")
    if dense_limit is not None and dense_limit < 0:
        raise ValueError(f"`dense_limit` is {dense_limit}; it is a number of coordinates, 0 or more")
    op = curvature_of(objective, operator)
    division = blocks if isinstance(blocks, Partition) else partition(objective, blocks)
    if division.layout != op.layout:
        raise ValueError(
            f"`blocks` divides other parameters than {op!r} has; make the partition from the same objective"
        )
    sampling = Sampling.of(num_steps, num_probes, deflate, dense_limit)
    if density_tol is not None and (num_steps, num_probes, deflate) != (None, None, None):
        raise ValueError(f"`density_tol` is {density_tol}, which chooses steps, probes and deflation; leave those out")
    floor = zero_floor(op)
    with tqdm(total=len(division), desc="block spectra", unit="block", disable=not progress) as bar, op.fixed():
        exact: dict[str, BlockSpectrum] = {}
        large: dict[str, tuple[LinearOperator, int]] = {}
        for i, (name, size) in enumerate(division.sizes.items()):
            block = op.block(division[name])
            if size <= max(sampling.dense_limit, 2 * num_top):
                exact[name] = exact_spectrum(name, block, num_top=num_top, floor=floor)
                bar.update()
            else:
                large[name] = block, seed + i
        ops, seeds = [block for block, _ in large.values()], [own for _, own in large.values()]
        if density_tol is not None:
            found_densities = densities_within(ops, seeds, density_tol)
        else:
            found_densities = densities_together(
                ops,
                seeds,
                num_steps=sampling.num_steps,
                num_probes=sampling.num_probes,
                deflate=sampling.deflate,
                num_top=num_top,
                tol=tol,
            )
        densities = {name: density for name, (density, _) in zip(large, found_densities, strict=True)}
        ends = {name: end for name, (_, end) in zip(large, found_densities, strict=True)}
        scales = {name: spectrum.scale for name, spectrum in exact.items()}
        scales |= {name: float(density.nodes.abs().max()) for name, density in densities.items()}
        threshold = floor * max(scales.values())

        spectra: dict[str, BlockSpectrum] = {}
        for i, (name, size) in enumerate(division.sizes.items()):
            found = exact.get(name) or densities[name]
            if scales[name] <= threshold:
                spectra[name] = zero_spectrum(
                    name,
                    size,
                    exact=name in exact,
                    scale=scales[name],
                    num_top=num_top,
                    products=found.products,
                    seconds=found.seconds,
                )
            elif isinstance(found, BlockSpectrum):
                spectra[name] = found
            else:
                spectra[name] = sampled_spectrum(
                    name,
                    op.block(division[name]),
                    found,
                    ends[name],
                    num_top=num_top,
                    floor=floor,
                    tol=tol,
                    max_products=max_products,
                    seed=seed + i,
                )
            bar.update(name in densities)
    missed = [name for name, spectrum in spectra.items() if not spectrum.converged]
    if missed:
        warnings.warn(
            f"the extreme eigenvalues of {len(missed)} of {len(spectra)} blocks missed tol={tol} "
            f"({', '.join(missed[:5])}); raise `max_products` or `tol`, or go by their residuals"
            if density_tol is None
            else f"{len(missed)} of {len(spectra)} blocks missed tol={tol} or density_tol={density_tol} "
            f"({', '.join(missed[:5])}); raise the one missed, or `max_products`",
            NotConvergedWarning,
            stacklevel=2,
        )
    return BlockSpectra(spectra, division)


def curvature_of(source: Objective | LinearOperator, operator: LinearOperator | None) -> LinearOperator:
    """The operator whose blocks are meant, with parameter names."""
    if operator is None:
        operator = source if isinstance(source, LinearOperator) else Hessian(source)
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"`operator` is a {type(operator).__name__}; pass an operator such as GGN(objective)")
    if operator.layout is None:
        raise ValueError(f"{operator!r} has no parameter names to divide; make it with `layout=` or from an Objective")
    return operator


def zero_floor(op: LinearOperator) -> float:
    """Share of the largest block's scale that is noise: rounding, or the stated error of approximate products."""
    eps = torch.finfo(op.dtype).eps
    rounding = ZERO.get(op.dtype, 8 * eps)
    return rounding if op.relative_error <= ROUNDINGS * eps else max(rounding, op.relative_error)
