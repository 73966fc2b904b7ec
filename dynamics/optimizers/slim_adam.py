"""SlimAdam: Adam whose second moments are averaged over the dimensions along which they vary little."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ...landscape.divisions import Division
from ...landscape.selection import unwrapped
from ...landscape.slim_divisions import TABLE, Rules, check_rules, slices, slim_division
from ...landscape.structure import TensorRole, structure
from ..snr_profile import SNRProfile, derive_rules
from .blockwise_adam import BlockwiseAdam


class SlimAdam(BlockwiseAdam):
    r"""AdamW with v ← β2 v + (1 − β2) mean_K(g²) for the dimensions K that a rule names for each tensor.

    m ← β1 m + (1 − β1) g, θ ← (1 − ηλ) θ − η (m / (1 − β1^t)) / (√(v / (1 − β2^t)) + ε), with v broadcast along K.
    Where K is empty it is AdamW, bit for bit.

    Args:
        params: Parameters, named ones or groups.
        lr: η.
        betas: (β1, β2).
        eps: ε.
        weight_decay: λ, decoupled, of tensors with two or more dimensions; see `decay_vectors`.
        decay_vectors: Whether vectors and scalars decay too. The authors' code leaves them out; AdamW has them decay.
        rules: "table": those of the paper's table 1 by the role of each tensor in `model`. A mapping from slices,
            names, globs or roles to "inputs", "outputs", "both", None or dimensions; see `slim_divisions`. An
            `SNRProfile`: the rules that `derive_rules` takes from it. None: no compression, which is AdamW.
        model: The module that the parameters belong to. "table" and rules by role, "inputs" or "outputs" need it;
            which axis of a weight counts outputs then comes from the structure, so that transposed layouts are right.

    Raises:
        ValueError: an option out of range; a rule that fits nothing or that needs a model; a parameter not in `model`.

    Source: Kalra et al., When Can You Get Away with Low Memory Adam?, 2025, table 1 for the rules.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        decay_vectors: bool = False,
        rules: Literal["table"] | Rules | SNRProfile | None = "table",
        model: nn.Module | None = None,
    ) -> None:
        if isinstance(rules, str):
            if rules not in ("table", "none"):
                raise ValueError(f"`rules` is {rules!r}; give 'table', a mapping, an SNRProfile, or None ('none')")
            if rules == "table" and model is None:
                raise ValueError("`rules` is 'table', which goes by the roles of the tensors; give `model` too")
            found: Rules = TABLE if rules == "table" else {}
        else:
            found = derive_rules(rules) if isinstance(rules, SNRProfile) else rules or {}
        self.rules = dict(found)
        self._roles: dict[str, TensorRole] = {}
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay_vectors": decay_vectors,
        }
        super().__init__(params, defaults, model)
        if model is None and self.rules:
            self._warn_of_unused_rules()

    def read_structure(self, model: nn.Module) -> None:
        self._roles = structure(unwrapped(model))
        check_rules(self.rules, [part for role in self._roles.values() for part in slices(role)])

    def division(self, p: Tensor, name: str) -> Division:
        role = self._roles.get(name, TensorRole(name, tuple(p.shape), "other"))
        return slim_division(role, self.rules)

    def _warn_of_unused_rules(self) -> None:
        parts = [
            part
            for p, division in self.divided()
            for part in slices(TensorRole(division.name, tuple(p.shape), "other"))
        ]
        try:
            check_rules(self.rules, parts)
        except ValueError as error:
            warnings.warn(f"{error}; pass model.named_parameters(), or `model`", stacklevel=3)
