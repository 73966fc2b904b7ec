"""The plans of the algorithms: how many products, how many vectors beside them.

Each planner takes the arguments of its algorithm by name, times a few products and counts the rest.
Sizes: n rows, k Lanczos steps, p probes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.accurate import combine, project
from ..landscape.blocks import Partition, partition
from ..landscape.memory import available_bytes
from .operator import LinearOperator
from .plan import Plan, ProductCost, product_cost, timed
from .probes import check_method, check_num_probes, probe_groups

if TYPE_CHECKING:
    from .block_spectra import Sampling

Arguments = Mapping[str, Any]

# The least number of vectors that an eigenvalue search holds beside its basis.
SEARCH_VECTORS = 2
# Products of an eigenvalue search where no smaller problem shows how many it takes: so many, and so many for each pair.
FIRST_PRODUCTS, PRODUCTS_PER_PAIR, PROVED_PRODUCTS_PER_PAIR = 6, 2.5, 13
# Gram-Schmidt reads a basis as often as two projections and two combinations do.
PASSES = 2
# Vectors of a conjugate direction method.
SOLVE_VECTORS = 8
# Vectors for each probe of a group, which is multiplied in columns and used in rows; and for each of an XTrace sketch.
PROBE_VECTORS, SKETCH_GROUP, SKETCH_VECTORS = 5, 2, 1.9


def plan_eigenvalues(arguments: Arguments) -> Plan:
    """How many products it takes depends on the spectrum: where the operator has a `coarse()` version, a search on that
    one says how many; otherwise it is a rule of thumb."""
    from .eigs import basis_bytes, default_budget

    op, num = arguments["op"], arguments["num"]
    cost = product_cost(op)
    most = default_budget(num) if arguments["max_products"] is None else arguments["max_products"]
    products = min(_products_of_search(op, arguments), most)
    options = {name: arguments[name] for name in ("which", "max_products", "verify", "basis_size", "basis_dtype")}
    basis = basis_bytes(op, num, **options)
    rows = min(basis // _row_bytes(op), products)
    if op.device.type == "cpu":  # where memory is taken as it is written to
        basis = min(basis, (products + 2) * _row_bytes(op))
    return _plan(
        "top_eigenvalues",
        op,
        cost,
        products=products,
        most=most,
        seconds=products * (cost.seconds + _gram_schmidt_seconds(op, rows / 2)),
        memory=basis + max(num, SEARCH_VECTORS) * _row_bytes(op),
        cure="lower `basis_size` or `num`, or take basis_dtype=torch.float16",
    )


def plan_density(arguments: Arguments) -> Plan:
    """Without `tol` the number of products is known, except that of a deflation, which is at most what is planned. With
    it the number depends on what is found, and the plan is the budget."""
    from .deflation import products_for
    from .lockstep import default_basis_dtype, probes_at_once, run_bytes
    from .slq import MAX_PRODUCTS, PROBES, STEPS, check_sampling, exact_limit

    op, n = arguments["op"], arguments["op"].shape[0]
    steps, probes = arguments["num_steps"] or STEPS, arguments["num_probes"] or PROBES
    check_sampling(op, **{name: arguments[name] for name in ("num_steps", "num_probes", "deflate", "basis_dtype")})
    cost, most = product_cost(op), None
    if arguments["tol"] is None and n <= exact_limit(steps, probes):
        products, memory, rows = n, 4 * n * n * 8, 0
    else:
        first = products_for(arguments["deflate"], n) if arguments["deflate"] else 0
        dtype = arguments["basis_dtype"] or default_basis_dtype([op], steps)
        at_once = probes_at_once(op, steps, probes, dtype)
        memory = at_once * run_bytes(op, steps, dtype) + first * _row_bytes(op)
        if arguments["tol"] is not None:
            products = most = arguments["max_products"] or MAX_PRODUCTS
        else:
            products = steps * probes + first
        rows = steps / 2
    return _plan(
        "spectral_density",
        op,
        cost,
        products=products,
        most=most,
        seconds=products * (cost.seconds + _gram_schmidt_seconds(op, rows)),
        memory=memory,
        cure="lower `num_steps`, or take basis_dtype=torch.float16",
    )


def plan_trace(arguments: Arguments) -> Plan:
    """With `tol` it may need fewer products than planned."""
    from .trace import FEWEST_PRODUCTS

    op, method = arguments["op"], arguments["method"]
    products = _num_products(arguments, FEWEST_PRODUCTS)
    held = {"hutch++": products, "xtrace": SKETCH_VECTORS * products}.get(method, arguments["deflate"])
    return _probed("trace", op, products, held, "lower `num_probes`, or take method='hutchinson'")


def plan_frobenius(arguments: Arguments) -> Plan:
    """One product for each probe."""
    from .frobenius import FEWEST_PRODUCTS

    op, method = arguments["op"], arguments["method"]
    products = _num_products(arguments, FEWEST_PRODUCTS)
    held = SKETCH_VECTORS * products if method == "xtrace" else 0
    return _probed("frobenius_norm", op, products, held, "lower `num_probes`, or take method='hutchinson'")


def plan_diagonal(arguments: Arguments) -> Plan:
    """One product for each probe."""
    op = arguments["op"]
    check_num_probes(arguments["num_probes"], 1)
    return _probed("diagonal", op, min(arguments["num_probes"], op.shape[0]), 0, "select fewer parameters")


def plan_solve(arguments: Arguments) -> Plan:
    """The plan is the budget; a well-conditioned system needs far fewer products."""
    from .solve import default_budget

    op = arguments["op"]
    most = default_budget(op.shape[0]) if arguments["max_products"] is None else arguments["max_products"]
    cost = product_cost(op)
    memory = SOLVE_VECTORS * _row_bytes(op)
    seconds = most * cost.seconds
    return _plan(
        "solve", op, cost, products=most, most=most, seconds=seconds, memory=memory, cure="select fewer parameters"
    )


def plan_block_spectra(arguments: Arguments) -> Plan:
    """One product with every block is timed. The extreme eigenvalues of sampled blocks, whose number of products
    depends on the spectrum, are planned as a search of that many pairs."""
    from .block_spectra import Sampling, curvature_of
    from .eigs import default_budget

    op = curvature_of(arguments["objective"], arguments["operator"])
    blocks = arguments["blocks"]
    division = blocks if isinstance(blocks, Partition) else partition(arguments["objective"], blocks)
    sampling = Sampling.of(*(arguments[name] for name in ("num_steps", "num_probes", "deflate", "dense_limit")))
    cost = product_cost(op)
    products, most, seconds, memory = 0, 0, 0.0, 0
    with op.fixed():
        for name, size in division.sizes.items():
            block = op.block(division[name])
            v = torch.full((size,), size**-0.5, dtype=op.dtype, device=op.device)
            each = timed(lambda block=block, v=v: block.matvec(v))
            count, held = _block_needs(block, sampling, arguments["num_top"])
            products, seconds, memory = products + count, seconds + count * each, max(memory, held)
            most += count if size <= sampling.dense_limit else count + default_budget(2 * arguments["num_top"])
    return _plan(
        "block_spectra",
        op,
        cost,
        products=products,
        seconds=seconds,
        most=most,
        memory=memory,
        cure="lower `num_steps`, or divide into smaller blocks",
        spent=len(division),
    )


def _block_needs(block: LinearOperator, sampling: Sampling, num_top: int) -> tuple[int, int]:
    """Products and bytes of one block."""
    from .deflation import products_for
    from .lockstep import default_basis_dtype, run_bytes

    size = block.shape[0]
    if size <= sampling.dense_limit:
        return size, 4 * size * size * 8
    first = products_for(sampling.deflate, size) if sampling.deflate else 0
    # A deflation's run has the leading pairs already; else both ends are searched and proved.
    search = math.ceil(
        FIRST_PRODUCTS + PRODUCTS_PER_PAIR * num_top if first else PROVED_PRODUCTS_PER_PAIR * 2 * num_top
    )
    run = run_bytes(block, sampling.num_steps, default_basis_dtype([block], sampling.num_steps))
    return sampling.num_steps * sampling.num_probes + first + search, run + first * _row_bytes(block)


def _products_of_search(op: LinearOperator, arguments: Arguments) -> int:
    from .eigs import top_eigenvalues

    num, coarse = arguments["num"], op.coarse()
    if coarse is None:
        return min(math.ceil(FIRST_PRODUCTS + PRODUCTS_PER_PAIR * num), op.shape[0])
    options = {name: arguments[name] for name in ("which", "tol", "accuracy", "verify", "seed", "max_products")}
    return top_eigenvalues(coarse, num, coarse=False, **options).products


def _num_products(arguments: Arguments, fewest: Mapping[str, int]) -> int:
    """The products of a method with random probes, once it is known and has enough of them."""
    method, n = arguments["method"], arguments["op"].shape[0]
    check_method(method, fewest)
    if method == "exact" or arguments["num_probes"] >= n:
        return n
    check_num_probes(arguments["num_probes"], fewest[method], method)
    return arguments["num_probes"]


def _probed(name: str, op: LinearOperator, products: int, held: float, cure: str) -> Plan:
    """The plan of an algorithm that multiplies groups of random probes and holds so many vectors of a sketch."""
    cost = product_cost(op)
    group = next(probe_groups(op, products))
    return _plan(
        name,
        op,
        cost,
        products=products,
        seconds=products * (cost.seconds + _gram_schmidt_seconds(op, held / 2)),
        memory=math.ceil((SKETCH_GROUP if held else PROBE_VECTORS) * group + held) * _row_bytes(op),
        cure=cure,
    )


def _plan(
    name: str,
    op: LinearOperator,
    cost: ProductCost,
    *,
    products: int,
    seconds: float,
    memory: int,
    cure: str,
    most: int | None = None,
    spent: int = 0,
) -> Plan:
    available = available_bytes(op.device) + cost.kept_bytes
    fitting = max(0, (available - cost.kept_bytes - cost.more_bytes) // _row_bytes(op))
    return Plan(
        algorithm=name,
        products=products,
        most_products=most,
        seconds=seconds,
        bytes=cost.peak(memory),
        available=available,
        spent=cost.spent + spent,
        cure=f"beside a product {fitting} vectors fit: {cure}",
    )


def _row_bytes(op: LinearOperator) -> int:
    return op.shape[0] * op.dtype.itemsize


def _gram_schmidt_seconds(op: LinearOperator, rows: float) -> float:
    """Time to make a vector orthogonal to so many rows, from that for two."""
    Q = torch.ones(2, op.shape[0], dtype=op.dtype, device=op.device)
    return PASSES * timed(lambda: combine(Q, project(Q, Q[0]))) * rows / len(Q)
