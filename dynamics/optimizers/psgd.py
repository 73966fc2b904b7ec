"""PSGD: preconditioners on Lie groups, fitted while training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...hessian.curvature import Hessian
from ...hessian.preconditioned import Root
from ...landscape.objective import Objective
from .base import BaseOptimizer, Closure, Group, check_gradients, counted, missing_gradient, step_of
from .option_checks import check_choice, check_number
from .psgd_group import NORMALIZERS, Coins, Factor, dtype_of, initial_scale, joined, normal, sizes_of, split
from .psgd_kron import Kron
from .psgd_lra import LRA
from .psgd_pairs import Differences, Exact, Gradients, OfObjective, Pairs, Vectors
from .psgd_roots import RestrictedRoot
from .psgd_xmat import XMat
from .recurrences import average_threshold
from .streams import generator, tensor_numbers

KINDS: dict[str, type[Factor]] = {"xmat": XMat, "lra": LRA, "kron": Kron}
MODES = ("newton", "whiten")
CURVATURES = ("difference", "hvp", "objective")
# The entry of a parameter's state that says that its fit has begun.
BEGUN = {"xmat": "a", "lra": "d", "kron": "Q0"}
# Options of the one fit, the same in all groups.
SHARED = (
    "kind", "mode", "curvature", "rank", "lr_preconditioner", "normalizer", "update_probability", "init_scale",
    "damping", "clip", "max_size", "max_skew", "seed",
)  # fmt: skip


class PSGD(BaseOptimizer):
    r"""SGD along P g, with P = Qᵀ Q fitted online to pairs (v, h) and Q kept in a Lie group.

    θ ← (1 − η λ) θ − η P m, with m = g, or with momentum μ > 0 m ← μ m + (1 − μ) g from m = 0 (no bias correction, as
    in psgd_torch 0.6). Mode "newton" fits pairs h = H v, v ~ N(0, I), so that P → (H²)^(-1/2), the inverse Hessian with
    the signs of its eigenvalues dropped; mode "whiten" fits gradients, so that P → E[g gᵀ]^(-1/2). The fit takes place
    before the step that uses it.

    Kinds, n coordinates:

    - "xmat": Q = diag(a) + adiag(b) on the vector of all tensors in the order of the groups; 2n numbers.
    - "lra": Q = (I + U Vᵀ) diag(d) on the same vector, U, V [n, rank]; (2 rank + 1) n numbers.
    - "kron": for every tensor Q₁ ⊗ Q₂ ⊗ …, triangular, or diagonal for long axes. Each tensor's fit sees its slice of
      h, which in mode "newton" has the cross terms of the other tensors in it: P² → (Σ_j H_ij H_ji)⁻¹ for tensor i.

    The rules are those of the package psgd_torch 0.6.1 (XMat, LRA, Kron). The repository's present psgd.py is another
    algorithm (running Lipschitz estimates, damping, no XMat). Departures: the scale of Q begins at
    mean(v²)^{1/4} mean(h⁴)^{-1/8}, and mean(g⁴)^{-1/8} for gradients, the repository's older rule, where the package
    has (Σv²/Σh²)^{1/4}; a pair with h = 0 or an entry that is not finite is left out of the fit, and until the first
    fitted pair P = I (the scale would be infinite); random numbers come from `seed`, parameter and step alone.

    XMat couples coordinate k to n − 1 − k, so the order of the tensors is part of it; when other tensors have gradients
    than before, the couplings begin anew and the diagonal of P is kept. LRA uses the rows of the tensors that have
    gradients. A tensor without a gradient stays where it is and is left out of the fit.

    Args:
        params: As for any optimizer; lr, momentum and weight_decay may differ between groups.
        lr: η >= 0, a fraction of a Newton step in mode "newton".
        kind: "xmat", "lra" or "kron".
        mode: "newton" or "whiten".
        curvature: How mode "newton" gets h. "difference": a second call of the closure at θ + √eps v, with the same
            random numbers; any closure will do. "hvp": exactly; the closure returns the loss without calling backward,
            or calls backward(create_graph=True). "objective": by the Hessian of `objective`; no closure is needed.
        objective: What "objective" differentiates; its parameters include those of the optimizer.
        rank: Of "lra", >= 0.
        lr_preconditioner: Of the fit, in (0, 1]; below 1/2 Q cannot become singular. 0.01 suits the normalizer "1st".
        normalizer: "2nd" divides the fit's step by the size of A Aᵀ + B Bᵀ, "1st" by that of the gradient.
        momentum: μ in [0, 1).
        weight_decay: λ >= 0, decoupled.
        update_probability: Of a fit at a step, in [0, 1]; the first one always takes place.
        init_scale: Q begins at this times I; None takes it from the first pair.
        damping: h ← h + damping · mean|h| · w, w ~ N(0, I), which bounds P where there is no curvature. None is 2⁻¹³ in
            mode "whiten" and 0 in mode "newton".
        clip: Largest norm of P m over all parameters; None does not clip.
        max_size, max_skew: Kron has triangular factors for axes of size d <= max_size, d² <= max_skew · numel.
        seed: Of all random numbers.

    Raises:
        ValueError, TypeError: for options, and for a closure that does not fit `curvature`.

    Source: Pooladzandi and Li, Curvature-Informed SGD via General Purpose Lie-Group Preconditioners, 2024; Li,
    Preconditioned Stochastic Gradient Descent, 2018.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        kind: str = "xmat",
        *,
        mode: str = "newton",
        curvature: str = "difference",
        objective: Objective | None = None,
        rank: int = 10,
        lr_preconditioner: float = 0.1,
        normalizer: str = "2nd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_probability: float = 1.0,
        init_scale: float | None = None,
        damping: float | None = None,
        clip: float | None = None,
        max_size: float = 8192,
        max_skew: float = 10.0,
        seed: int = 0,
    ) -> None:
        if (objective is None) == (curvature == "objective"):
            raise ValueError(
                f"`curvature` is {curvature!r} and `objective` is {'missing' if objective is None else 'given'}; "
                "give both curvature='objective' and an Objective, or neither"
            )
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(f"`objective` is a {type(objective).__name__}; make one with Objective(model, loss, data)")
        self.objective = objective
        self._last_pair: tuple[float, float] | None = None
        options = {
            "lr": lr, "kind": kind, "mode": mode, "curvature": curvature, "rank": rank,
            "lr_preconditioner": lr_preconditioner, "normalizer": normalizer, "momentum": momentum,
            "weight_decay": weight_decay, "update_probability": update_probability, "init_scale": init_scale,
            "damping": damping, "clip": clip, "max_size": max_size, "max_skew": max_skew, "seed": seed,
        }  # fmt: skip
        super().__init__(params, options)

    def check_group(self, group: Group) -> None:
        check_number("lr", group["lr"], least=0)
        check_number("momentum", group["momentum"], least=0, below=1)
        check_number("weight_decay", group["weight_decay"], least=0)
        check_choice("kind", group["kind"], tuple(KINDS))
        check_choice("mode", group["mode"], MODES)
        check_choice("curvature", group["curvature"], CURVATURES)
        check_choice("normalizer", group["normalizer"], NORMALIZERS)
        check_number("lr_preconditioner", group["lr_preconditioner"], above=0, most=1)
        check_number("update_probability", group["update_probability"], least=0, most=1)
        for name in ("rank", "seed"):
            if isinstance(group[name], bool) or not isinstance(group[name], int):
                raise TypeError(f"`{name}` is {group[name]!r}; it must be a whole number")
        check_number("rank", group["rank"], least=0)
        for name in ("init_scale", "clip"):
            if group[name] is not None:
                check_number(name, group[name], above=0)
        if group["damping"] is not None:
            check_number("damping", group["damping"], least=0)
        check_number("max_skew", group["max_skew"], least=0)
        if not isinstance(group["max_size"], int | float) or not group["max_size"] >= 0:
            raise ValueError(f"`max_size` is {group['max_size']!r}; it must be a number >= 0, or math.inf")
        for name in SHARED:
            if group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"`{name}` is {group[name]!r} in one group and {self.param_groups[0][name]!r} in another; all "
                    "groups share one fit, only lr, momentum and weight_decay may differ: make two optimizers"
                )

    @property
    def needs_closure(self) -> bool:
        """Whether `step` evaluates the loss itself."""
        group = self.param_groups[0]
        return group["mode"] == "newton" and group["curvature"] != "objective"

    @property
    def criterion(self) -> float | None:
        """hᵀ P h + vᵀ P⁻¹ v of the last pair before its fit, over all parameters; None before the first."""
        return None if self._last_pair is None else sum(self._last_pair)

    @property
    def imbalance(self) -> float | None:
        """|Q h|² − |Q⁻ᵀ v|² of the last pair: 0 in the mean once P has the right size. None before the first pair."""
        return None if self._last_pair is None else self._last_pair[0] - self._last_pair[1]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Fits the preconditioner and makes one step.

        Args:
            closure: Needed in mode "newton" (except with an objective). It clears the gradients, evaluates the loss,
                calls backward and returns the loss; with curvature "hvp" see there. Called twice for "difference".

        Returns:
            What the closure returned the first time.
        """
        shared = self.param_groups[0]
        if closure is None and self.needs_closure:
            raise TypeError(
                "`step` needs a closure in mode 'newton', which evaluates the loss itself: step(closure); or take "
                "mode='whiten', or curvature='objective' with an Objective"
            )
        params = self._params()
        number = 1 + max((step_of(state) for state in self.state.values()), default=0)
        coins = Coins.tossed(shared["seed"], number)
        due = coins.update < shared["update_probability"]
        pairs = self._pairs(params, twice=due or not all(self._has_begun(p) for p in params if p.requires_grad))
        loss = pairs.evaluate(closure)
        check_gradients(self)
        members = [p for p in params if p.grad is not None]
        if not members:
            return loss
        blocks = self._blocks(members)
        if due or not all(map(self._has_begun, members)):
            self._fit(blocks, pairs, number, coins)
        if shared["kind"] == "xmat":
            self._pair_up(members)
        self._move(blocks)
        return loss

    def update(self, group: Group) -> None:
        raise NotImplementedError("PSGD steps on all groups at once: call step()")

    @torch.no_grad()
    def precondition(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """P g for one gradient per parameter, in the order of the groups; None counts as zero and stays None.

        A parameter that was never fitted keeps its gradient.
        """
        params = self._params()
        if len(gradients) != len(params):
            raise ValueError(f"`gradients` has {len(gradients)} entries; give one for each of {len(params)} parameters")
        given = dict(zip(params, gradients, strict=True))
        results = dict(given)
        for block in self._fitted_blocks():
            found = ((p, given[p]) for p in block)
            g = joined([torch.zeros_like(p) if gradient is None else gradient for p, gradient in found])
            for p, piece in split(self._factor(block).precondition(g.to(dtype_of(block))), block).items():
                results[p] = None if given[p] is None else piece
        return [results[p] for p in params]

    def preconditioner(self, p: Tensor, gradient: Tensor | None = None) -> Tensor | Root:
        """The columns R of Q that belong to p: its own block of the step's matrix is Rᵀ R.

        P is the one that the last step used, held fixed also for the next step, whose pair is random. Before the first
        fit it is init_scale⁻² (1 where that is not given) when a gradient is passed.
        """
        root = self.joint_preconditioner([p])
        if root is not None:
            return root
        if gradient is None:
            raise missing_gradient(self)
        scale = self.param_groups[0]["init_scale"]
        return torch.full_like(p, 1.0 if scale is None else scale**-2)

    def joint_preconditioner(self, params: Sequence[Tensor]) -> Root | None:
        """Q's columns R [k, n] for all coordinates of these parameters together, in this order: the step is Rᵀ R m.

        Columns of a parameter that was never fitted are zero; None before the first fit of any of them.
        """
        blocks = [block for block in self._fitted_blocks() if any(p in set(params) for p in block)]
        if not blocks:
            return None
        return RestrictedRoot([(self._factor(block), block) for block in blocks], params)

    def threshold_of_group(self, group: Group) -> float | None:
        """With P fixed and no clipping, on an eigenvector of P H with eigenvalue a, η the lr, λ the weight decay:

        - without momentum z = 1 − η λ − η a, stable for a < 2/η − λ;
        - with momentum μ: z² − (1 − η λ + μ − (1 − μ) η a) z + μ (1 − η λ), stable (Jury) for
          a < (2 − η λ)(1 + μ) / ((1 − μ) η), which for μ = 0 is the first.

        Derived from the recurrence; without weight decay as in Cohen et al., Adaptive Gradient Methods at the Edge of
        Stability, 2022, section 2.
        """
        return average_threshold(*(float(group[name]) for name in ("lr", "momentum", "weight_decay")))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Goes on from `state_dict()`, bit for bit; parameters in another order are refused where that shows."""
        self._check_order(state_dict)
        super().load_state_dict(state_dict)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _has_begun(self, p: Tensor) -> bool:
        return BEGUN[self.param_groups[0]["kind"]] in self.state.get(p, {})

    def _blocks(self, params: Sequence[Tensor]) -> list[list[Tensor]]:
        """What is fitted together: tensors one by one, or all in one vector."""
        kind = self.param_groups[0]["kind"]
        if kind == "kron":
            return [[p] for p in params]
        devices = {p.device for p in params}
        if len(devices) > 1:
            raise ValueError(
                f"`kind` {kind!r} fits one vector, but the parameters are on {', '.join(map(str, devices))}: bring "
                "them to one device, or take kind='kron'"
            )
        return [list(params)] if params else []

    def _fitted_blocks(self) -> list[list[Tensor]]:
        """The blocks of the present Q. Parameters that XMat's vector has left are in none: they do not move."""
        kind = self.param_groups[0]["kind"]
        key = "b" if kind == "xmat" else BEGUN[kind]
        return self._blocks([p for p in self._params() if key in self.state.get(p, {})])

    def _factor(self, block: Sequence[Tensor]) -> Factor:
        return KINDS[self.param_groups[0]["kind"]].gathered([self.state[p] for p in block])

    def _keep(self, block: Sequence[Tensor], factor: Factor) -> None:
        for p, piece in zip(block, factor.slices(block), strict=True):
            state = self.state[p]
            for key, value in piece.items():
                if key in state:
                    state[key].copy_(value)
                else:
                    state[key] = value.clone()

    def _pairs(self, params: Sequence[Tensor], *, twice: bool) -> Pairs:
        shared = self.param_groups[0]
        if shared["mode"] == "whiten":
            return Gradients()
        if shared["curvature"] == "hvp":
            return Exact(params, twice=twice)
        if self.objective is not None:
            return OfObjective(Hessian(self.objective))
        return Differences(params)

    def _fit(self, blocks: Sequence[list[Tensor]], pairs: Pairs, number: int, coins: Coins) -> None:
        """One step of every block's fit, to a new pair."""
        shared = self.param_groups[0]
        numbers = tensor_numbers(self) if shared["kind"] == "kron" else {}
        probes: Vectors = {}
        draws = []
        for block in blocks:
            draws.append(generator(shared["seed"], numbers.get(block[0], -2), number, block[0].device))
            v = normal(sum(sizes_of(block)), block, draws[-1])
            probes.update(split(v, block))
        v_parts, h_parts = pairs.products(probes)
        terms = []
        for block, draw in zip(blocks, draws, strict=True):
            dtype = dtype_of(block)
            v, h = (joined([parts[p].detach() for p in block]).to(dtype) for parts in (v_parts, h_parts))
            if not all(0 < size < math.inf for size in torch.stack([v.abs().max(), h.abs().max()]).tolist()):
                continue
            damping = shared["damping"]
            if damping is None:
                damping = 2.0**-13 if shared["mode"] == "whiten" else 0.0
            if damping > 0:
                h = h + damping * h.abs().mean() * normal(len(h), block, draw)
            self._begin(block, v, h, draw)
            if shared["kind"] == "xmat":
                self._pair_up(block)
            factor = self._factor(block)
            A, B = factor.images(v, h)
            terms.append((A.square().sum(), B.square().sum()))
            rate = float(shared["lr_preconditioner"])
            self._keep(block, factor.moved(v, h, A, B, rate, shared["normalizer"], coins))
        if terms:
            self._last_pair = (sum(float(gain) for gain, _ in terms), sum(float(loss) for _, loss in terms))

    def _begin(self, block: Sequence[Tensor], v: Tensor, h: Tensor, draw: torch.Generator) -> None:
        """The first state of the parameters of a block that have none; its scale from their own part of the pair."""
        shared = self.param_groups[0]
        new = [p for p in block if not self._has_begun(p)]
        if not new:
            return
        parts_v, parts_h = split(v, block), split(h, block)
        if shared["init_scale"] is not None:
            scale = torch.tensor(shared["init_scale"], dtype=v.dtype, device=v.device)
        else:
            own = joined([parts_h[p] for p in new])
            own, probe = (own, joined([parts_v[p] for p in new])) if bool(own.any()) else (h, v)
            scale = initial_scale(own, probe if shared["mode"] == "newton" else None)
        options = {**shared, "num_coordinates": len(v)}
        for p in new:
            self.state[p].update(KINDS[shared["kind"]].initial(p, scale, options, draw))

    def _pair_up(self, members: Sequence[Tensor]) -> None:
        """For XMat: when the vector has other tensors than before, every coordinate has a new partner."""
        before = [p for p in self._params() if "b" in self.state.get(p, {})]
        now = [p for p in members if self._has_begun(p)]
        if len(before) == len(now) and all(p is q for p, q in zip(before, now, strict=True)):
            return
        if before:
            self._keep(before, XMat.gathered([self.state[p] for p in before]).uncoupled())
        for p in before:
            del self.state[p]["b"]
        for p in now:
            self.state[p]["b"] = torch.zeros_like(self.state[p]["a"])

    def _move(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        """The step along P m."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        directions: Vectors = {}
        for block in blocks:
            dtype = dtype_of(block)
            momenta = {p: self._momentum(p, groups[p], dtype).to(dtype) for p in block}
            directions.update(momenta)
            begun = [p for p in block if self._has_begun(p)]
            if begun:
                m = joined([momenta[p] for p in begun])
                directions.update(split(self._factor(begun).precondition(m), begun))
        clip = self.param_groups[0]["clip"]
        if clip is not None:
            size = torch.stack([d.square().sum().to(torch.float64) for d in directions.values()]).sum().sqrt()
            factor = float(min(1.0, clip / max(float(size), torch.finfo(torch.float64).tiny)))
            directions = {p: factor * d for p, d in directions.items()}
        for p, direction in directions.items():
            counted(self.state[p])
            group = groups[p]
            if group["weight_decay"] != 0:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_((group["lr"] * direction).to(p.dtype))

    def _momentum(self, p: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
        gradient, state, momentum = p.grad, self.state[p], group["momentum"]
        assert gradient is not None
        if momentum == 0:
            state.pop("momentum", None)
            return gradient
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient, dtype=dtype)
        return state["momentum"].mul_(momentum).add_(gradient.to(dtype), alpha=1 - momentum)

    def _check_order(self, state_dict: Mapping[str, Any]) -> None:
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        names = [_names(groups) for groups in (state_dict["param_groups"], self.param_groups)]
        if None not in names and names[0] != names[1]:
            raise ValueError(
                f"`state_dict` was saved for the parameters {names[0]}, this optimizer has {names[1]}; PSGD's state "
                "depends on their order: make the optimizer with the same order"
            )
        for number, (i, p) in enumerate(zip(saved, self._params(), strict=False)):
            state = state_dict["state"].get(i, {})
            for key in ("a", "d"):
                if key in state and state[key].shape != p.shape:
                    raise ValueError(
                        f"`state_dict` has shape {list(state[key].shape)} for parameter {number}, which has "
                        f"{list(p.shape)}; PSGD's state depends on the order: make the optimizer with the same order"
                    )


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Names of all parameters, where torch was given them."""
    if not all("param_names" in group for group in groups):
        return None
    return [name for group in groups for name in group["param_names"]]
