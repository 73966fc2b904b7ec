"""The density of eigenvalues by stochastic Lanczos quadrature.

Sizes: n rows, p probe vectors, k Lanczos steps (nodes of one probe), g points of a grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.tridiagonal import tridiagonal_quadrature
from .estimate import Estimate
from .lanczos import lanczos_tridiagonal, plain_tensors
from .operator import LinearOperator
from .probes import ProbeMoments, exact_rounding, rademacher, random_generator, rounding

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
        num_steps: Lanczos steps for each probe, k; resolution at the ends grows as k², inside as k. Holds k + 1
            vectors.
        num_probes: p; the error of anything integrated falls as 1/√p.
        seed: Of the probes; the global random state is not touched.
        progress: Show a bar over products.

    Source: Ubaru, Chen and Saad, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature, 2017, algorithm 1;
    Ghorbani, Krishnan and Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density, 2019,
    for the smoothing.
    """
    for name, value in (("num_steps", num_steps), ("num_probes", num_probes)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` is {value!r}; it must be an int")
        if value < 1:
            raise ValueError(f"`{name}` is {value}; ask for at least one")
    n, began = op.shape[0], time.perf_counter()
    exact = n <= max(num_steps, min(num_steps * num_probes, DENSE_LIMIT))
    if num_steps == 1 and not exact:
        raise ValueError(f"`num_steps` is 1; one node is no density of n = {n} eigenvalues: take 20 to 100 steps")
    with (
        plain_tensors(),
        tqdm(
            total=n if exact else num_steps * num_probes, desc="spectral density", unit="product", disable=not progress
        ) as bar,
    ):
        watched = _Watched(op, bar)
        nodes, weights, mean_stderr = _all(watched) if exact else _sampled(watched, num_steps, num_probes, seed)
        return SpectralDensity(nodes, weights, mean_stderr, exact, watched.products, time.perf_counter() - began)


def _all(op: LinearOperator) -> tuple[Tensor, Tensor, float]:
    n = op.shape[0]
    matrix = op.dense().to("cpu", torch.float64)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the matrix of {op!r} has NaN or infinite entries; check that the loss is finite")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    error = exact_rounding(op, float(torch.linalg.vector_norm(values))) / n
    return values.unsqueeze(0), torch.full((1, n), 1 / n, dtype=torch.float64), error


def _sampled(op: LinearOperator, num_steps: int, num_probes: int, seed: int) -> tuple[Tensor, Tensor, float]:
    n, generator, moments = op.shape[0], random_generator(op, seed), ProbeMoments(op)
    alpha = torch.zeros(num_probes, num_steps, dtype=torch.float64)
    beta = torch.zeros(num_probes, num_steps - 1, dtype=torch.float64)
    lengths = torch.empty(num_probes, dtype=torch.int64)
    for i in range(num_probes):
        (z,) = rademacher(op, 1, generator)
        run = lanczos_tridiagonal(op, z, num_steps)
        k = lengths[i] = len(run.alpha)
        alpha[i, :k], beta[i, : k - 1] = run.alpha, run.beta
        image = run.alpha[0].item() * run.basis[0]  # A z / √n, from the first step
        if k > 1:
            image = image + run.beta[0].item() * run.basis[1]
        del run  # its basis, before the next one is made
        moments.add(z, math.sqrt(n) * image, product=i * num_steps + 1)
    nodes, weights = tridiagonal_quadrature(alpha, beta, lengths)
    mean_stderr = math.hypot(moments.stderr(), rounding(op, math.sqrt(moments.mean_square))) / n
    return nodes, weights, mean_stderr


class _Watched(LinearOperator):
    """An operator whose products are counted and shown."""

    def __init__(self, op: LinearOperator, bar: tqdm) -> None:
        super().__init__(op.shape[0], dtype=op.dtype, device=op.device)
        self._op, self._bar = op, bar
        self.products = 0

    @property
    def relative_error(self) -> float:
        return self._op.relative_error

    def matmat(self, V: Tensor) -> Tensor:
        image = self._op.matmat(V)
        self.products += V.shape[1]
        self._bar.update(V.shape[1])
        return image

    def __repr__(self) -> str:
        return repr(self._op)
