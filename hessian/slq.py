"""The density of eigenvalues by stochastic Lanczos quadrature.

Sizes: n rows, p probe vectors, K deflated pairs, k Lanczos steps (nodes of one probe).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from tqdm import tqdm

from ..kernels.batched_lanczos import check_basis_dtype
from .deflation import Complement, check_deflation, leading_subspace, products_for
from .density import SpectralDensity
from .density_target import Target, density_within
from .estimate import NotConvergedWarning
from .lanczos import plain_tensors
from .lockstep import sample
from .operator import LinearOperator
from .plan import planned
from .planners import plan_density
from .quadrature import Watched, densities, exact_density

# Up to this n a dense matrix is cheap, so n products buy all eigenvalues where the quadrature would take as many.
DENSE_LIMIT = 2000

# Defaults without, and with, a tolerance.
STEPS = 40
PROBES = 8
MAX_PRODUCTS = 2000


@planned(plan_density)
def spectral_density(
    op: LinearOperator,
    *,
    num_steps: int | None = None,
    num_probes: int | None = None,
    deflate: int | None = None,
    tol: float | None = None,
    max_products: int | None = None,
    basis_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SpectralDensity:
    r"""The eigenvalue density by Lanczos from `num_probes` independent random vectors.

    From v = z/√n with random signs z, k steps give nodes and weights with Σ w_j f(θ_j) = vᵀ f(A) v for every
    polynomial f of degree at most 2 k − 1, and E vᵀ f(A) v = tr f(A) / n. Signs have the smaller variance: 2/n² times
    ‖f(A)‖_F² less the squares of the diagonal of f(A), where directions uniform on the sphere have it less tr² f(A) / n
    only, which is never more. Lanczos reorthogonalises fully, so no eigenvalue comes back as a ghost.

    With `deflate`, a Lanczos run from the operator's start vector first takes out that many eigenpairs of largest |λ|,
    and what else it has found, with a weight of 1/n each. The probes see the complement only, whose range and
    Frobenius norm are smaller. On trained networks this pays: the errors of the mean and of the weights fall to a
    third for the 20 to 25 products that ten pairs take.

    If n is at most `num_steps`, or at most the products that this would take (and 2000), the matrix is formed from n
    products and the result is exact.

    Args:
        op: Symmetric, shape [n, n].
        num_steps: Lanczos steps for each probe, k; resolution at the ends grows as k², inside as k. Holds k + 4
            vectors for each probe of a round. By default 40; with `tol` as many as it takes.
        num_probes: p; the error of anything integrated falls as 1/√p. They run in lockstep, multiplied together, in
            rounds of at most 8 that take an eighth of the free memory, or of one. By default 8; with `tol` as many as
            it takes.
        deflate: Eigenpairs to take out first. Holds their vectors and those of the run, in an eighth of the free memory
            if the pairs themselves fit. By default none, and ten with `tol`.
        tol: Stop when the estimated Wasserstein-1 distance to the true density, `w1_error()`, is at most `tol` times
            the spectral radius: more steps while they limit it, then more probes.
        max_products: With `tol`, most products to spend; by default 2000.
        basis_dtype: In which the Lanczos bases are held. By default as the operator works; in torch.float16, at half
            the memory, where a float32 basis would take more than half of what is free. See `orthogonality` of the
            result.
        seed: Of the probes; the global random state is not touched.
        progress: Show a bar over products.

    Warns:
        NotConvergedWarning: `tol` was not reached within `max_products`.

    Source: Ubaru, Chen and Saad, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature, 2017, algorithm 1;
    Ghorbani, Krishnan and Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue Density, 2019,
    for the smoothing.
    """
    check_sampling(op, num_steps=num_steps, num_probes=num_probes, deflate=deflate, basis_dtype=basis_dtype)
    check_counts(max_products=max_products)
    began = time.perf_counter()
    with tqdm(desc="spectral density", unit="product", disable=not progress) as bar, plain_tensors(), op.fixed():
        if tol is None:
            if max_products is not None:
                raise ValueError(f"`max_products` is {max_products} without `tol`; give both, or steps and probes")
            density = _density(op, num_steps or STEPS, num_probes or PROBES, deflate or 0, basis_dtype, seed, bar)
        else:
            target = Target(tol, num_steps, num_probes, max_products or MAX_PRODUCTS)
            density = density_within(op, target, deflate, basis_dtype, seed, bar)
    if not density.converged:
        warnings.warn(
            f"the density is uncertain by {density.w1_error():.2g} in Wasserstein-1 distance after {density.products} "
            f"products, more than `tol` = {tol:g} times {density.radius():.3g} "
            f"(probes {density.w1_stderr():.2g}, steps {density.resolution:.2g}): raise `max_products`, or `tol`",
            NotConvergedWarning,
            stacklevel=2,
        )
    return replace(density, seconds=time.perf_counter() - began)


def _density(
    op: LinearOperator,
    num_steps: int,
    num_probes: int,
    deflate: int,
    basis_dtype: torch.dtype | None,
    seed: int,
    bar: tqdm,
) -> SpectralDensity:
    if not deflate or op.shape[0] <= exact_limit(num_steps, num_probes):
        options = {"num_steps": num_steps, "num_probes": num_probes, "basis_dtype": basis_dtype}
        return spectral_densities([op], seeds=[seed], bar=bar, **options)[0]
    most = products_for(deflate, op.shape[0])
    op.expect(most + num_steps * num_probes)
    bar.reset(most + num_steps * num_probes)
    subspace = leading_subspace(Watched(op, bar.update), deflate, seed=seed)
    op = Complement(op, subspace)
    return densities(sample([op], num_steps, num_probes, [seed], bar.update, basis_dtype=basis_dtype))[0]


def spectral_densities(
    ops: Sequence[LinearOperator],
    *,
    num_steps: int,
    num_probes: int,
    seeds: Sequence[int],
    bar: tqdm | None = None,
    basis_dtype: torch.dtype | None = None,
) -> list[SpectralDensity]:
    """`spectral_density` of several operators on one device, in one dtype, whose Lanczos runs go in lockstep.

    The seconds of a density are those in its own products, with its share by size of the other work; on a GPU, where
    products are not waited for, nearly all is shared.

    Args:
        seeds: One for each operator.
        bar: To show products on; its total is set.
        basis_dtype: As for `spectral_density`.
    """
    check_counts(num_steps=num_steps, num_probes=num_probes)
    limit = exact_limit(num_steps, num_probes)
    large = [i for i, op in enumerate(ops) if op.shape[0] > limit]
    if num_steps == 1 and large:
        n = ops[large[0]].shape[0]
        raise ValueError(f"`num_steps` is 1; one node is no density of n = {n} eigenvalues: take 20 to 100 steps")
    bar = tqdm(disable=True) if bar is None else bar
    expected = [op.shape[0] if op.shape[0] <= limit else num_steps * num_probes for op in ops]
    bar.reset(sum(expected))
    for op, count in zip(ops, expected, strict=True):
        op.expect(count)
    with plain_tensors(), ExitStack() as stack:
        for op in ops:
            stack.enter_context(op.fixed())
        found = {i: exact_density(Watched(op, bar.update)) for i, op in enumerate(ops) if op.shape[0] <= limit}
        if large:
            chosen = [ops[i] for i in large]
            chosen_seeds = [seeds[i] for i in large]
            samples = sample(chosen, num_steps, num_probes, chosen_seeds, bar.update, basis_dtype=basis_dtype)
            found |= dict(zip(large, densities(samples), strict=True))
    return [found[i] for i in range(len(ops))]


def exact_limit(num_steps: int, num_probes: int) -> int:
    """Up to this n the products for all eigenvalues are few."""
    return max(num_steps, min(num_steps * num_probes, DENSE_LIMIT))


def check_sampling(
    op: LinearOperator,
    *,
    num_steps: int | None,
    num_probes: int | None,
    deflate: int | None,
    basis_dtype: torch.dtype | None,
) -> None:
    """An error for what no density can be made of, whichever way it is made."""
    check_counts(num_steps=num_steps, num_probes=num_probes)
    if deflate:
        check_deflation(op, deflate)
    if basis_dtype is not None:
        check_basis_dtype(basis_dtype, op.dtype)


def check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` is {value!r}; it must be an int")
        if value < 1:
            raise ValueError(f"`{name}` is {value}; ask for at least one")
