"""The samplers by the names that experiments call them.

A sampler is a module: ``State``, with ``position`` w and ``step``, the number of steps taken, which addresses noise and
minibatches; ``init``, position -> ``State``, which holds the tensors as they are; and

    step_(state, gradient, noise, *, center, posterior, step_size, **own) -> State

one step over the tensors of ``state``, with temporaries of one piece at a time. ``gradient`` is that of the minibatch
loss at w, nats per unit of weight; ``noise`` N(0, 1), shaped like w; ``center`` w*; ``posterior`` n_beta and gamma;
``step_size`` eps, (unit of weight)^2; ``own`` what only this sampler takes.
"""

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
        options: what its ``step_`` takes besides what all take: decay, stability, correction; diffusion.
    """

    kind: str = "sgld"
    options: dict[str, float | bool] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        """See the docstring of this module."""
        return SAMPLERS[self.kind]

    def preconditioner(self, state: Any, name: str) -> Tensor | None:
        """G of a piece in steps of variance eps G; None: 1."""
        return self.module.preconditioner(state, name, **self.options) if self.kind == "rmsprop_sgld" else None
