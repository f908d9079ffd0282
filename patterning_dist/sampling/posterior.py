"""The localised tempered posterior that chains draw from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """p_C(w) ~ exp( -n_beta L(w) - gamma/2 |w - w*|^2 ) over the free coordinates of a component C.

    The field's convention (Lau et al., "The Local Learning Coefficient", arXiv 2308.12108). L is the mean loss in nats.

    Attributes:
        inverse_temperature: n_beta, dimensionless (the number of samples times the inverse temperature of each).
        localization: gamma, in 1 / (unit of weight)^2.
    """

    inverse_temperature: float
    localization: float

    def negative_score(
        self, position: Mapping[str, Tensor], center: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """-grad log p(w) = n_beta grad L(w) + gamma (w - w*), with the gradient of L given (full or minibatch)."""
        return {
            name: self.inverse_temperature * gradient[name] + self.localization * (w - center[name])
            for name, w in position.items()
        }
