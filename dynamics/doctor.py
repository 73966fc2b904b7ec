"""A self-test on the user's own model: can its curvature be trusted, and what is peculiar about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ..hessian.curvature import Hessian
from ..hessian.engines import NotTwiceDifferentiable
from ..landscape.blocks import Block
from ..landscape.objective import Objective

ENGINES = ("double-backward", "forward-over-reverse", "finite-difference")
DENSE_SIZE = 24
TOO_ROUGH = 0.3  # an engine whose stated error allows this much says nothing about another
OK, FAIL, NOTE, SKIPPED = "ok", "fail", "note", "skipped"


@dataclass(frozen=True)
class Check:
    """One question, its outcome ("ok", "fail", "note" or "skipped"), and what was found."""

    name: str
    outcome: str
    found: str


@dataclass(frozen=True)
class Diagnosis:
    """The checks in order; `healthy` when none of them failed or had to be skipped."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        return all(check.outcome in (OK, NOTE) for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]


def doctor(objective: Objective, *, seed: int = 0) -> Diagnosis:
    """Tests an objective at its current weights; takes some twenty gradients, and a dense block of 24 rows.

    - loss: finite, the same in two passes, a mean over what is counted;
    - gradient: its product with a direction agrees with a difference of losses;
    - side effects: parameters, buffers, .grad, modes and random streams are bit for bit as before;
    - symmetry: uᵀHv = vᵀHu;
    - every engine: Hv agrees with the first engine that works, within both stated errors;
    - dense block: the block of some coordinates agrees with plain double backward, row by row;
    - notes: unused, tied and frozen parameters, and what the objective says about itself.

    Args:
        objective: What to test.
        seed: Of the random directions.
    """
    generator = torch.Generator().manual_seed(seed)
    u, v = (_unit(objective, generator) for _ in range(2))
    checks = [_run("loss", lambda: _loss(objective))]
    rest: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("gradient", lambda: _gradient(objective, u)),
        ("side effects", lambda: _side_effects(objective, v)),
        ("symmetry", lambda: _symmetry(objective, u, v)),
        *((f"engine {name}", lambda name=name: _engine(objective, name, v)) for name in ENGINES),
        ("dense block", lambda: _dense_block(objective, generator)),
        (
            "unused parameters",
            lambda: _listed(objective.unused, "the loss does not depend on", "their rows of the Hessian are zero"),
        ),
        ("tied parameters", lambda: _listed(_tied(objective.model), "shared by several names:", "counted once")),
        (
            "frozen parameters",
            lambda: _listed(_frozen(objective), "not analysed:", "requires_grad is off or `params` leaves them out"),
        ),
    ]
    if checks[0].outcome == OK:
        checks += [_run(name, check) for name, check in rest]
        checks += [Check("remark", NOTE, note) for note in objective.notes]
    else:
        checks += [Check(name, SKIPPED, "the loss has to be right first") for name, _ in rest]
    return Diagnosis(tuple(checks))


def _run(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:
        return Check(name, FAIL, f"{type(error).__name__}: {error}")


def _unit(objective: Objective, generator: torch.Generator) -> Tensor:
    v = torch.randn(objective.num_parameters, generator=generator, dtype=torch.float64)
    return (v / v.norm()).to(objective.device, objective.dtype)


def _loss(objective: Objective) -> tuple[str, str]:
    value = objective.loss()
    return OK, (
        f"{value:.6g}, the same in two passes over {objective.num_examples} examples; "
        f"{objective.num_parameters:,} parameters in {objective.dtype}"
    )


def _gradient(objective: Objective, u: Tensor) -> tuple[str, str]:
    """(L(θ + h u) − L(θ − h u)) / 2h against gᵀu, at the step where two neighbours agree best."""
    gradient = objective.gradient()
    # Along the gradient itself the slope is far above rounding; u alone may be nearly orthogonal to it.
    direction = gradient / gradient.norm().clamp_min(1e-30) + u
    direction = direction / direction.norm()
    expected = float(gradient.double() @ direction.double())
    slopes = []
    for exponent in range(1, 7):
        h = 10.0**-exponent
        with _moved(objective, h * direction):
            above = objective.loss()
        with _moved(objective, -h * direction):
            below = objective.loss()
        slopes.append((above - below) / (2 * h))
    differences = [abs(a - b) for a, b in pairwise(slopes)]
    best = min(range(len(differences)), key=differences.__getitem__)
    found, uncertainty = slopes[best], differences[best]
    error = abs(found - expected)
    # The loss itself is only known to a few roundings, which the difference divides by the step.
    rounding = 1e2 * objective.coarsest_eps * abs(objective.loss()) / 10.0 ** -(best + 2)
    allowed = 10 * uncertainty + rounding + 1e-3 * abs(expected)
    text = f"slope {expected:.6g}, by differences {found:.6g} ± {uncertainty:.1g}"
    return (OK if error <= allowed else FAIL), text


@contextmanager
def _moved(objective: Objective, step: Tensor) -> Iterator[None]:
    """The weights displaced by `step`, then put back bit for bit."""
    parameters = objective.parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, part in objective.unflatten(step).items():
                parameters[name].add_(part.to(parameters[name].dtype))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])


def _side_effects(objective: Objective, v: Tensor) -> tuple[str, str]:
    before = _everything(objective)
    objective.loss()
    objective.gradient()
    Hessian(objective).matvec(v)
    after = _everything(objective)
    changed = [name for name in before if not _same(before[name], after.get(name))]
    changed += [name for name in after if name not in before]
    if changed:
        return FAIL, f"changed by measuring: {', '.join(changed[:5])}"
    return OK, f"{len(before)} things compared before and after: weights, buffers, .grad, modes, random streams"


def _everything(objective: Objective) -> dict[str, object]:
    found: dict[str, object] = {
        "torch random stream": torch.get_rng_state(),
        "numpy random stream": np.random.get_state()[1].copy(),  # type: ignore[index]
        "python random stream": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }
    model = objective.model
    tensors = (
        dict(objective.parameters) if model is None else dict(model.named_parameters()) | dict(model.named_buffers())
    )
    for name, tensor in tensors.items():
        found[name] = tensor.detach().clone()
        found[f"{name}.grad"] = None if tensor.grad is None else tensor.grad.clone()
        found[f"{name}.requires_grad"] = tensor.requires_grad
    for name, module in () if model is None else model.named_modules():
        found[f"mode of {name or 'the model'}"] = module.training
    return found


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b  # type: ignore[arg-type]


def _symmetry(objective: Objective, u: Tensor, v: Tensor) -> tuple[str, str]:
    hessian = Hessian(objective)
    products = hessian @ torch.stack([u, v], dim=1)  # [n, 2]
    difference = float((v.double() @ products[:, 0].double()) - (u.double() @ products[:, 1].double()))
    size = float(products.double().norm())
    allowed = 10 * hessian.relative_error
    error = abs(difference) / max(size, 1e-300)
    return (OK if error <= allowed else FAIL), f"uᵀHv and vᵀHu differ by {error:.1g} of ‖Hv‖, {allowed:.1g} allowed"


def _engine(objective: Objective, name: str, v: Tensor) -> tuple[str, str]:
    """One product along the gradient and a random direction against the automatic choice."""
    reference = Hessian(objective)
    if name == reference.engine.name:
        return OK, f"chosen: {reference.engine.reason}"
    if objective.captures_tensors:
        return NOTE, "cannot be used: the closure takes no arguments"
    gradient = objective.gradient()
    direction = gradient / gradient.norm().clamp_min(1e-30) + v
    hessian = Hessian(objective, engine=name)
    try:
        product = hessian @ direction
    except (NotTwiceDifferentiable, NotImplementedError, RuntimeError) as error:
        return NOTE, f"cannot differentiate this loss: {str(error).splitlines()[0][:120]}"
    expected = reference @ direction
    error = float((product - expected).double().norm()) / max(float(expected.double().norm()), 1e-300)
    allowed = 4 * (hessian.relative_error + reference.relative_error)
    if allowed > TOO_ROUGH:
        return (
            NOTE,
            f"states an error of {hessian.relative_error:.1g} here, as kinks (ReLU) cause: of no use for this model",
        )
    return (OK if error <= allowed else FAIL), f"agrees to {error:.1g} (relative), {allowed:.1g} allowed"


def _dense_block(objective: Objective, generator: torch.Generator) -> tuple[str, str]:
    """Rows of the Hessian by plain double backward, one at a time, against products restricted to the block."""
    layout = objective.layout
    chosen = torch.randperm(objective.num_parameters, generator=generator)[:DENSE_SIZE].sort().values
    parts: list[tuple[str, Tensor]] = []
    for name, start, size in zip(layout.names, layout.offsets, layout.sizes, strict=False):
        inside = chosen[(chosen >= start) & (chosen < start + size)] - start
        if len(inside):
            parts.append((name, inside))
    hessian = Hessian(objective)
    found = hessian.block(Block("sample", tuple(parts))).dense().double().cpu()
    expected = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
    try:
        with objective.evaluation() as theta:
            for chunk in objective.chunks():
                gradient = objective.join(
                    torch.autograd.grad(objective.chunk_loss(chunk, theta), theta, create_graph=True, allow_unused=True)
                )
                for i, position in enumerate(chosen.tolist()):
                    if not gradient[position].requires_grad:
                        continue
                    row = torch.autograd.grad(gradient[position], theta, retain_graph=True, allow_unused=True)
                    expected[i] += chunk.weight * objective.join(row).detach().cpu()[chosen].double()
    except RuntimeError as error:
        return NOTE, f"no plain second derivative to compare with: {str(error).splitlines()[0][:120]}"
    size = max(float(expected.norm()), 1e-300)
    error = float((found - expected).norm()) / size
    allowed = 100 * hessian.relative_error
    top = float(torch.linalg.eigvalsh((expected + expected.T) / 2)[-1])
    text = (
        f"{len(chosen)} coordinates: agrees to {error:.1g} (relative), {allowed:.1g} allowed; "
        f"its largest eigenvalue {top:.4g}"
    )
    return (OK if error <= allowed or float((found - expected).abs().max()) == 0 else FAIL), text


def _tied(model: nn.Module | None) -> list[str]:
    if model is None:
        return []
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [" = ".join(group) for group in names.values() if len(group) > 1]


def _frozen(objective: Objective) -> list[str]:
    if objective.model is None:
        return []
    return [name for name, _ in objective.model.named_parameters() if name not in objective.parameters]


def _listed(names: tuple[str, ...] | list[str], before: str, after: str) -> tuple[str, str]:
    if not names:
        return OK, "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return NOTE, f"{before} {', '.join(names[:5])}{more}: {after}"
