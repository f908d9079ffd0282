"""A subject: what chains are run around, a checkpoint, a component of it and the weights of its training samples."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import nn

from patterning_dist.config.sampling import ComponentConfig, SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import model_components, select_component

HALF_STEP = "~half-step"  # after the name of the subject that is sampled once more so


@dataclass(frozen=True)
class Subject:
    """A set of chains.

    Attributes:
        checkpoint: that they are around.
        component: of it that moves.
        stream: what noise and minibatches are addressed by; subjects that share it are coupled.
        weights: table of rho, relative to the run directory; None: every sample weighs 1.
        strength: s in rho = 1 + s h, where the table has 1 + h.
        seed: None: that of the run.
        half_step: at half the step size, with twice the steps.
    """

    checkpoint: str
    component: str
    stream: str
    weights: str | None = None
    strength: float = 1.0
    seed: int | None = None
    half_step: bool = False


def expand_components(sampling: SamplingConfig, model: nn.Module) -> SamplingConfig:
    """The section with globs of component names (``layer.*.head.*``) replaced by what they stand for in a model.

    Patterns that match no component are patterns of parameter names, one component each.

    Raises:
        PatterningError: a component that the model does not have, or one that is listed twice.
    """
    known, found = model_components(model), {}
    for entry in sampling.components:
        names = [name for name in known if "[" not in entry.name and fnmatch.fnmatchcase(name, entry.name)]
        for name in names if any(c in entry.name for c in "*?") and names else [entry.name]:
            if name in found:
                raise PatterningError(f"sampling.components: '{name}' is listed twice, by {entry.name}; remove one")
            if name not in known:
                select_component(model, name)
            found[name] = entry.model_copy(update={"name": name})
    components: list[ComponentConfig] = list(found.values())
    return sampling.model_copy(update={"components": components})
