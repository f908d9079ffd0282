"""The localised tempered posterior that chains draw from."""

from __future__ import annotations

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

    def negative_score(self, position: Tensor, center: Tensor, gradient: Tensor) -> Tensor:
        """-grad log p(w) = n_beta grad L(w) + gamma (w - w*) of one piece, in a tensor of its own.

        Args:
            position: w.
            center: w*.
            gradient: grad L, full or minibatch, nats per unit of weight.

        Examples:
            >>> from patterning_dist import Posterior
            >>> posterior, center = Posterior(inverse_temperature=100.0, localization=10.0), torch.tensor([0.0])
            >>> posterior.negative_score(torch.tensor([0.5]), center, gradient=torch.tensor([0.02]))  # 2 + 10 * 0.5
            tensor([7.])
        """
        return (position - center).mul_(self.localization).add_(gradient, alpha=self.inverse_temperature)
