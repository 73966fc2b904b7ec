"""The density of eigenvalues by stochastic Lanczos quadrature.

Sizes: n rows, p probe vectors, k Lanczos steps (nodes of one probe), g points of a grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.tridiagonal import tridiagonal_quadrature
from .estimate import Estimate
from .lanczos import plain_tensors
from .lockstep import Sampled, sample
from .operator import LinearOperator
from .probes import exact_rounding, rounding

# Up to this n a dense matrix is cheap, so n products buy all eigenvalues where the quadrature would take as many.
DENSE_LIMIT = 2000

# Default smoothing: this share of the range of the nodes.
SIGMA_SHARE = 0.01


@dataclass(frozen=True)
class SpectralDensity:
    r"""φ(t) = (1/n) Σ_i δ(t − λ_i) as the mean over probes of Σ_j w_j δ(t − θ_j).

    Attributes:
        nodes: θ [p, k], float64, on the CPU, ascending for each probe. Where a probe's Krylov space ended early the
            last node is repeated.
        weights: w [p, k], summing to 1 for each probe; 0 for the repeated nodes.
        mean_stderr: Standard error of the mean eigenvalue.
        exact: The nodes are all n eigenvalues [1, n] with weights 1/n.
        products: Operator products spent.
        seconds: Wall-clock time.
    """

    nodes: Tensor
    weights: Tensor
    mean_stderr: float
    exact: bool
    products: int
    seconds: float

    def mean(self) -> Estimate:
        """The mean eigenvalue, tr A / n. Its error comes from whole vectors, as that of `trace`, not from p samples."""
        samples = (self.weights * self.nodes).sum(1)
        return Estimate(float(samples.mean()), self.mean_stderr, samples, self.products)

    def moment(self, power: int) -> Estimate:
        """tr(A^power) / n, unbiased for a power of at most 2 k − 1: up to there the quadrature is exact."""
        if power < 0:
            raise ValueError(f"`power` is {power}; moments are those of 0 and the positive powers")
        return self._mean_of(lambda nodes: nodes**power)

    def weight_below(self, x: float) -> Estimate:
        """Share of the eigenvalues that are at most x; nodes within rounding of x fall on either side."""
        return self._mean_of(lambda nodes: (nodes <= x).double())

    def default_sigma(self) -> float:
        """1 % of the range of the nodes: outliers stay apart. A single eigenvalue gets a millionth of its size."""
        spread = float(self.nodes.max() - self.nodes.min())
        return max(SIGMA_SHARE * spread, 1e-6 * float(self.nodes.abs().max())) or 1.0

    def grid(self, num: int = 1000, sigma: float | None = None) -> Tensor:
        """`num` points [num] evenly over the nodes and six σ beyond, so that the smoothed density integrates to 1."""
        margin = 6 * self._checked_sigma(sigma)
        return torch.linspace(
            float(self.nodes.min()) - margin, float(self.nodes.max()) + margin, num, dtype=torch.float64
        )

    def on_grid(self, x: Tensor | np.ndarray | Sequence[float], sigma: float | None = None) -> tuple[Tensor, Tensor]:
        r"""The density smoothed by a Gaussian, (1/p) Σ w N(x; θ, σ²), and its band.

        Its integral over the line is 1, so it has the unit 1/λ. Peaks are missed if the points lie wider apart than σ.

        Args:
            x: Points [g].
            sigma: Width σ of the Gaussian in units of λ; `default_sigma()` if None. It biases the density at any number
                of probes, which the band does not show.

        Returns:
            density [g] and band [g], float64: the band is the standard error over probes at that point; 0 if the
            density is exact, infinite from one probe.
        """
        sigma = self._checked_sigma(sigma)
        points = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        if points.ndim != 1 or not bool(torch.isfinite(points).all()):
            raise ValueError(f"`x` has shape {list(points.shape)}; it must be [g] finite points on the axis of λ")
        height = 1 / (sigma * math.sqrt(2 * math.pi))
        densities = torch.stack(
            [
                height * (weights @ torch.exp(-(((points - nodes.unsqueeze(1)) / sigma) ** 2) / 2))
                for nodes, weights in zip(self.nodes, self.weights, strict=True)
            ]
        )  # [p, g]
        if self.exact:
            return densities[0], torch.zeros_like(points)
        if len(densities) == 1:
            return densities[0], torch.full_like(points, math.inf)
        return densities.mean(0), densities.std(0) / math.sqrt(len(densities))

    def _mean_of(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        samples = (self.weights * f(self.nodes)).sum(1)
        if self.exact:
            return Estimate.exact(float(samples), products=self.products)
        return Estimate.from_samples(samples, products=self.products)

    def _checked_sigma(self, sigma: float | None) -> float:
        if sigma is None:
            return self.default_sigma()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"`sigma` is {sigma}; a width must be positive and finite, or None for 1 % of the range")
        return float(sigma)


def spectral_density(
    op: LinearOperator, *, num_steps: int = 40, num_probes: int = 8, seed: int = 0, progress: bool = False
) -> SpectralDensity:
    r"""The eigenvalue density by Lanczos from `num_probes` independent random vectors.

    From v = z/√n with random signs z, k steps give nodes and weights with Σ w_j f(θ_j) = vᵀ f(A) v for every
    polynomial f of degree at most 2 k − 1, and E vᵀ f(A) v = tr f(A) / n. Signs have the smaller variance: 2/n² times
    ‖f(A)‖_F² less the squares of the diagonal of f(A), where directions uniform on the sphere have it less tr² f(A) / n
    only. Lanczos reorthogonalises fully, so no eigenvalue comes back as a ghost.

    If n is at most `num_steps`, or at most the products that this would take (and 2000), the matrix is formed from n
    products and the result is exact.

    Args:
        op: Symmetric, shape [n, n].
        num_steps: Lanczos steps for each probe, k; resolution at the ends grows as k², inside as k. Holds k + 4
            vectors for each probe of a round.
        num_probes: p; the error of anything integrated falls as 1/√p. They run in lockstep, multiplied together, in
            rounds of at most 8 that take an eighth of the free memory, or of one.
        seed: Of the probes; the global random state is not touched.
        progress: Show a bar over products.

    Source: Ubaru, Chen and Saad, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature, 2017, algorithm 1;
    Ghorbani, Krishnan and Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density, 2019,
    for the smoothing.
    """
    with tqdm(desc="spectral density", unit="product", disable=not progress) as bar:
        began = time.perf_counter()
        (density,) = spectral_densities([op], num_steps=num_steps, num_probes=num_probes, seeds=[seed], bar=bar)
        return replace(density, seconds=time.perf_counter() - began)


def spectral_densities(
    ops: Sequence[LinearOperator],
    *,
    num_steps: int,
    num_probes: int,
    seeds: Sequence[int],
    bar: tqdm | None = None,
) -> list[SpectralDensity]:
    """`spectral_density` of several operators on one device, in one dtype, whose Lanczos runs go in lockstep.

    The seconds of a density are those in its own products, with its share by size of the other work; on a GPU, where
    products are not waited for, nearly all is shared.

    Args:
        seeds: One for each operator.
        bar: To show products on; its total is set.
    """
    for name, value in (("num_steps", num_steps), ("num_probes", num_probes)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` is {value!r}; it must be an int")
        if value < 1:
            raise ValueError(f"`{name}` is {value}; ask for at least one")
    limit = max(num_steps, min(num_steps * num_probes, DENSE_LIMIT))
    large = [i for i, op in enumerate(ops) if op.shape[0] > limit]
    if num_steps == 1 and large:
        n = ops[large[0]].shape[0]
        raise ValueError(f"`num_steps` is 1; one node is no density of n = {n} eigenvalues: take 20 to 100 steps")
    bar = tqdm(disable=True) if bar is None else bar
    bar.reset(sum(op.shape[0] if op.shape[0] <= limit else num_steps * num_probes for op in ops))
    with plain_tensors():
        found = {i: _all(_Watched(op, bar.update)) for i, op in enumerate(ops) if op.shape[0] <= limit}
        if large:
            samples = sample([ops[i] for i in large], num_steps, num_probes, [seeds[i] for i in large], bar.update)
            found |= dict(zip(large, _densities(samples), strict=True))
    return [found[i] for i in range(len(ops))]


def _all(op: LinearOperator) -> SpectralDensity:
    n, began = op.shape[0], time.perf_counter()
    matrix = op.dense().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the matrix of {op!r} has NaN or infinite entries; check that the loss is finite")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    error = exact_rounding(op, float(torch.linalg.vector_norm(values))) / n
    weights = torch.full((1, n), 1 / n, dtype=torch.float64, device="cpu")
    return SpectralDensity(values.unsqueeze(0), weights, error, True, n, time.perf_counter() - began)


def _densities(samples: Sequence[Sampled]) -> list[SpectralDensity]:
    """The quadratures of all probes of all operators [operators, p, k] at once, and the errors of the means."""
    began = time.perf_counter()
    alpha, beta, steps = (
        torch.stack([torch.cat(getattr(s, name)) for s in samples]) for name in ("alpha", "beta", "steps")
    )
    nodes, weights = (x.cpu() for x in tridiagonal_quadrature(alpha, beta, steps))
    shared = (time.perf_counter() - began) / len(samples)
    densities = []
    for s, theta, w in zip(samples, nodes, weights, strict=True):
        error = math.hypot(s.moments.stderr(), rounding(s.op, math.sqrt(s.moments.mean_square))) / s.op.shape[0]
        densities.append(SpectralDensity(theta, w, error, False, s.products, s.seconds + shared))
    return densities


class _Watched(LinearOperator):
    """An operator whose products are shown."""

    def __init__(self, op: LinearOperator, on_products: Callable[[int], object]) -> None:
        super().__init__(op.shape[0], dtype=op.dtype, device=op.device)
        self._op, self._on_products = op, on_products

    @property
    def relative_error(self) -> float:
        return self._op.relative_error

    def matmat(self, V: Tensor) -> Tensor:
        image = self._op.matmat(V)
        self._on_products(V.shape[1])
        return image

    def __repr__(self) -> str:
        return repr(self._op)
