"""Traps in the spectrum: what iterative methods find, miss, invent, and say about it.

Most spectra are those of a quadratic loss with a chosen diagonal Hessian: known exactly, and as hard for a Krylov
method as any rotation of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import oracle
from .adapter import Adapter, NotOffered
from .checks import right_eigenvalues, shown
from .models import classification, quadratic
from .outcome import WrongAnswer, trap


def _falling(*leading: float, bulk: int, top: float = 1.0) -> Tensor:
    """A few leading values, then `bulk` values evenly between 0 and `top`; float32 [n]."""
    return torch.cat([torch.tensor(leading), torch.linspace(0.0, top, bulk)])


@trap("Lanczos ghosts", "spectrum")
def lanczos_ghosts(tool: Adapter) -> str:
    """250 products on a spectrum with five outliers: each of the top five once. Without full reorthogonalisation
    converged values come back as copies."""
    leading = [10.0, 8.0, 6.0, 5.0, 4.0]
    problem = quadratic(_falling(*leading, bulk=395))
    found = tool.top_eigenvalues(tool.hessian(problem), 5, which="LM", tol=1e-4, max_products=250)
    return right_eigenvalues(found, leading, tolerance=1e-3)


@trap("multiple eigenvalues", "spectrum")
def multiple_eigenvalues(tool: Adapter) -> str:
    """The largest eigenvalue three times: a Krylov space from one start vector contains it once."""
    leading = [5.0, 5.0, 5.0, 2.0]
    problem = quadratic(_falling(*leading, bulk=60))
    found = tool.top_eigenvalues(tool.hessian(problem), 4, which="LM", tol=1e-4, max_products=50)
    return right_eigenvalues(found, leading, tolerance=1e-3)


@trap("a multiple of the identity", "spectrum")
def multiple_of_the_identity(tool: Adapter) -> str:
    """All eigenvalues equal: Lanczos breaks down at its first step and must start again for the others."""
    problem = quadratic(torch.full((30,), 0.7))
    found = tool.top_eigenvalues(tool.hessian(problem), 3, which="LM", tol=1e-4, max_products=20)
    return right_eigenvalues(found, [0.7] * 3, tolerance=1e-3)


def _crowded() -> Tensor:
    return torch.linspace(0.0, 1.0, 2000) ** 0.5


@trap("unconverged values, default budget", "spectrum")
def unconverged_values_default_budget(tool: Adapter) -> str:
    """Five top eigenvalues of a crowded spectrum to 1e-3 with the tool's own budget: within 1e-3, or flagged."""
    d = _crowded()
    found = tool.top_eigenvalues(tool.hessian(quadratic(d)), 5, which="LM", tol=1e-3)
    return right_eigenvalues(found, d.sort(descending=True).values[:5].tolist(), tolerance=1e-3, flags_suffice=True)


@trap("unconverged values, small budget", "spectrum")
def unconverged_values_small_budget(tool: Adapter) -> str:
    """The same to 1e-4 with eight products: that cannot converge, so the result has to say that it did not."""
    d = _crowded()
    found = tool.top_eigenvalues(tool.hessian(quadratic(d)), 5, which="LM", tol=1e-4, max_products=8)
    return right_eigenvalues(found, d.sort(descending=True).values[:5].tolist(), tolerance=1e-4, flags_suffice=True)


@trap("stated residuals", "spectrum")
def stated_residuals(tool: Adapter) -> str:
    """A residual that comes with a value bounds its distance to a true eigenvalue, converged or not."""
    d = _crowded()
    found = tool.top_eigenvalues(tool.hessian(quadratic(d)), 3, which="LM", tol=1e-3)
    if found.residuals is None:
        raise NotOffered("no residuals")
    ratios = []
    for value, residual in zip(found.values, found.residuals, strict=True):
        distance = float((d.double() - float(value)).abs().min())
        ratios.append(distance / max(float(residual), 1e-7))
    detail = f"distance to a true eigenvalue over the stated residual: {shown(ratios)}"
    if max(ratios) > 1.001:
        raise WrongAnswer(detail)
    return detail


@trap("both signs of equal size", "spectrum")
def both_signs_of_equal_size(tool: Adapter) -> str:
    """±3 are the largest by size: power iteration mixes their vectors and settles on a number in between."""
    problem = quadratic(torch.cat([torch.tensor([3.0, -3.0]), torch.linspace(-1.0, 1.0, 40)]))
    found = tool.top_eigenvalues(tool.hessian(problem), 1, which="LM", tol=1e-4, max_products=40)
    value = float(found.values[0])
    sign = 1.0 if value > 0 else -1.0
    said = right_eigenvalues(found, [3.0 * sign], tolerance=1e-3)
    return f"{said} (either sign is right)"


@trap("the negative end", "spectrum")
def the_negative_end(tool: Adapter) -> str:
    """The smallest eigenvalue of an indefinite Hessian whose largest by size is positive."""
    problem = quadratic(torch.cat([torch.tensor([-2.0, 5.0]), torch.linspace(-0.5, 1.0, 40)]))
    found = tool.top_eigenvalues(tool.hessian(problem), 1, which="SA", tol=1e-4, max_products=40)
    return right_eigenvalues(found, [-2.0], tolerance=1e-3)


@trap("symmetric start vector", "spectrum")
def symmetric_start_vector(tool: Adapter) -> str:
    """The gradient has no part along the top eigenvector (a symmetric point): started from it alone, a Krylov method
    never sees the top. Then a stationary point, where the gradient is zero."""
    d = _falling(6.0, 3.0, bulk=40)
    at = torch.zeros(42)
    at[1] = 1.0
    details = []
    for what, point in (("symmetric point", at), ("stationary point", torch.zeros(42))):
        found = tool.top_eigenvalues(tool.hessian(quadratic(d, point)), 1, which="LM", tol=1e-4, max_products=40)
        details.append(f"{what} {right_eigenvalues(found, [6.0], tolerance=1e-3)}")
    return "; ".join(details)


@trap("zero Hessian", "spectrum")
def zero_hessian(tool: Adapter) -> str:
    """All eigenvalues are zero: nothing may be divided by them."""
    found = tool.top_eigenvalues(tool.hessian(quadratic(torch.zeros(20))), 2, which="LM", tol=1e-4)
    values = [float(v) for v in found.values]
    if len(values) != 2 or not all(abs(v) < 1e-6 for v in values):
        raise WrongAnswer(f"{shown(values)}, truth [0, 0]")
    return shown(values)


@trap("tiny blocks, eigenvalues", "spectrum")
def tiny_blocks_eigenvalues(tool: Adapter) -> str:
    """All eigenvalues of blocks of 1, 2 and 3 parameters, as biases and temperatures have them."""
    details = []
    for leading in ([2.0], [2.0, -1.0], [3.0, 2.0, -1.0]):
        problem = quadratic(torch.tensor(leading))
        found = tool.top_eigenvalues(tool.hessian(problem), len(leading), which="LM", tol=1e-4)
        details.append(right_eigenvalues(found, leading, tolerance=1e-4))
    return "; ".join(details)


def _mean(density: list[tuple[Tensor, Tensor]]) -> float:
    """Mean of a density, its weights normalised, averaged over the probes."""
    means = []
    for points, weights in density:
        kept = weights != 0
        points, weights = points[kept].double(), weights[kept].double()
        means.append(float((points * weights).sum() / weights.sum()))
    return sum(means) / len(means)


@trap("tiny blocks, density", "spectrum")
def tiny_blocks_density(tool: Adapter) -> str:
    """The density of a block of 3 parameters by 20 steps: Lanczos ends early and the rest must not be noise."""
    d = torch.tensor([3.0, 1.0, 0.5])
    density = tool.density(tool.hessian(quadratic(d)), 20, 4)
    points = torch.cat([p[w > 1e-6] for p, w in density]).double()
    mean = _mean(density)
    detail = f"points in [{float(points.min()):.4g}, {float(points.max()):.4g}], truth [0.5, 3]; mean {mean:.4g}"
    # A mean over 4 probes of a 3-dimensional space scatters widely but stays inside the spectrum; points may be those
    # of a smoothed density.
    if not (float(points.min()) > 0.2 and float(points.max()) < 3.3 and 0.5 < mean < 3.0):
        raise WrongAnswer(detail)
    return detail


@trap("mean of the density", "spectrum")
def mean_of_the_density(tool: Adapter) -> str:
    """The mean of the spectral density is trace/n, negative eigenvalues and outliers included."""
    d = torch.cat([torch.tensor([8.0, 5.0, -3.0]), torch.linspace(-0.5, 0.7, 600)])
    num_probes = 10
    mean = _mean(tool.density(tool.hessian(quadratic(d)), 30, num_probes))
    # The variance of v·Dv for a random unit vector is 2 Var(d) / (n + 2).
    sigma = math.sqrt(2.0 * float(d.double().var(unbiased=False)) / (len(d) + 2) / num_probes)
    truth = float(d.double().mean())
    detail = f"mean {mean:.4f}, truth {truth:.4f} ± {sigma:.4f}"
    if not abs(mean - truth) <= 4.0 * sigma:
        raise WrongAnswer(detail)
    return detail


@trap("density of a network", "spectrum")
def density_of_a_network(tool: Adapter) -> str:
    """The density of a small classifier's Hessian stays inside its spectrum and has its mean."""
    problem = classification()
    spectrum = torch.linalg.eigvalsh(oracle.hessian(problem))
    num_probes = 20
    density = tool.density(tool.hessian(problem), 30, num_probes)
    sigma = math.sqrt(2.0 * float(spectrum.var(unbiased=False)) / (len(spectrum) + 2) / num_probes)
    mean, truth = _mean(density), float(spectrum.mean())
    detail = f"mean {mean:.4f}, truth {truth:.4f} ± {sigma:.4f}"
    if not abs(mean - truth) <= 4.0 * sigma:
        raise WrongAnswer(detail)
    return detail


@trap("indefinite CG", "spectrum")
def indefinite_cg(tool: Adapter) -> str:
    """CG on an indefinite Hessian: the residual is small, or the tool reports that the solution is none."""
    d = torch.cat([torch.tensor([-1.0, -0.5]), torch.linspace(0.1, 2.0, 30)])
    torch.manual_seed(14)
    b = torch.randn(32)
    # The negative direction alone: p·Ap < 0 at the first step.
    negative = torch.zeros(32)
    negative[0] = 1.0
    details = []
    for what, right in (("random b", b), ("b along λ < 0", negative)):
        solved = tool.solve(tool.hessian(quadratic(d)), right, 1e-5)
        residual = float((d * solved.x - right).norm() / right.norm())
        detail = f"{what}: relative residual {residual:.1g}"
        if not residual < 1e-3:
            if solved.reliable is not False:
                raise WrongAnswer(f"{detail}, without a word")
            detail += ", reported"
        details.append(detail)
    return "; ".join(details)


def _long_sums(tool: Adapter, n: int) -> str:
    operator = tool.hessian(quadratic(torch.full((n,), 0.1), torch.zeros(n)))
    unit = float(torch.tensor(0.1))
    # For a diagonal matrix every Rademacher probe gives the exact trace.
    trace = tool.trace(operator, 2) / (unit * n) - 1.0
    found = tool.top_eigenvalues(operator, 1, which="LM", tol=1e-3, max_products=4)
    top = float(found.values[0]) / unit - 1.0
    detail = f"trace off by {trace:+.1e}, top eigenvalue by {top:+.1e} at n = {n:.0e}"
    if not (abs(trace) < 1e-5 and abs(top) < 1e-5):
        raise WrongAnswer(detail)
    return detail


@trap("float32 sums over 2e6 entries", "spectrum")
def float32_sums_over_2e6_entries(tool: Adapter) -> str:
    """Dot products and norms of float32 vectors of 2e6 entries: trace and top eigenvalue of 0.1·I to 1e-5."""
    return _long_sums(tool, 2 * 10**6)


@trap("float32 sums over 1e8 entries", "spectrum", slow=True)
def float32_sums_over_1e8_entries(tool: Adapter) -> str:
    """The same at 1e8 entries, where torch.dot loses 1e-3 and torch.norm some percent on a CPU."""
    return _long_sums(tool, 10**8)
