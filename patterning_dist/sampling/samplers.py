"""The samplers by the names that experiments call them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from patterning_dist.sampling import rmsprop_sgld, sgld, sgnht

SAMPLERS: dict[str, ModuleType] = {"sgld": sgld, "rmsprop_sgld": rmsprop_sgld, "sgnht": sgnht}


@dataclass(frozen=True)
class Sampler:
    """A sampler with its own hyper-parameters.

    Attributes:
        kind: one of ``SAMPLERS``.
        options: what its ``step`` takes besides what all take: decay, stability, correction; diffusion.
    """

    kind: str = "sgld"
    options: dict[str, float | bool] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        """``State``, ``init``, ``step`` and ``step_``."""
        return SAMPLERS[self.kind]

    def preconditioner(self, state: Any, name: str) -> Tensor | None:
        """G of a piece in steps of variance eps G; None: 1."""
        return self.module.preconditioner(state, name, **self.options) if self.kind == "rmsprop_sgld" else None

    @property
    def needs_curvature(self) -> bool:
        """Whether a step wants the diagonal of the Hessian."""
        return bool(self.options.get("correction"))
