"""Many independent chains at the price of one: copies of the weights side by side in one module.

A loss that is the sum of one loss a copy has a posterior that is a product, so every copy of every chain of
``sample_chains`` is a chain of its own, at any inverse temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from patterning_dist.errors import PatterningError
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.sample import sample_chains
from patterning_dist.sampling.statistics import Draw
from patterning_dist.sampling.target import Target

NUM_CHAINS = 2
_GROUPS = 32
_TURNS = 3  # relaxation times of burn-in


@dataclass(frozen=True)
class Copies:
    """Draws of all copies.

    Attributes:
        positions: w [chain, draw, coordinate], float64.
        losses: L(w) - L(w*) [chain, draw], nats.
        heat: what finite steps add to the mean of these losses, relative; see ``sampling.temperature``.
    """

    positions: Tensor
    losses: np.ndarray
    heat: float


class _Positions:
    """The statistic that keeps w of every draw."""

    def __init__(self, target: Target) -> None:
        self.rows: list[Tensor] = []

    def update(self, draw: Draw, target: Target) -> None:
        self.rows.append(target.live()["w"].double().cpu())

    def state_dict(self) -> dict[str, Tensor]:
        return {"rows": torch.stack(self.rows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows = list(state["rows"])

    def flush(self) -> None:
        pass

    def result(self) -> dict[str, np.ndarray]:
        return {"w": torch.stack(self.rows, dim=1).numpy()}


def means_of_groups(values: np.ndarray) -> np.ndarray:
    """Means over every few chains [group, draw] of [chain, draw]: as good for an error, and quick."""
    return values.reshape(_GROUPS, -1, values.shape[1]).mean(axis=1)


def sample_copies(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    posterior: Posterior,
    *,
    step_size: float,
    relaxation: int,
    number: int = 256,
    num_draws: int = 8,
    draws_apart: float = 0.5,
    seed: int = 0,
) -> Copies:
    """Chains of ``sample_chains`` with exact gradients, every copy one of them.

    Args:
        loss: w [..., coordinate] -> L(w) [...], nats.
        start: w* [coordinate].
        posterior: n_beta and gamma.
        step_size: eps.
        relaxation: steps in which the slowest direction forgets where it was; burn-in is three times as long.
        number: copies a chain.
        num_draws: of every copy.
        draws_apart: relaxation times from one draw to the next.
        seed: of the chains.

    Raises:
        PatterningError: a chain failed.
    """
    copies = TensorDataset(torch.arange(number))
    sampled = sample_chains(
        nn.ParameterDict({"w": start.float().expand(number, -1).clone()}),
        # Losses whose mean over the samples is the sum over the copies.
        lambda model, batch: number * loss(next(model.parameters()))[batch[0]],
        copies,
        copies,
        posterior=posterior,
        step_size=step_size,
        num_draws=num_draws,
        num_chains=NUM_CHAINS,
        burn_in=_TURNS * relaxation,
        steps_between_draws=max(1, round(draws_apart * relaxation)),
        num_batches=2,
        gradient="full",
        statistics={"positions": _Positions},
        seed=seed,
    )
    if sampled.excluded:
        raise PatterningError(f"chain {min(sampled.excluded)}: {sampled.excluded[min(sampled.excluded)]}")
    found = [result["w"] for result in sampled.statistics["positions"] if result is not None]
    positions = torch.from_numpy(np.concatenate(found))
    heat = sampled.step_biases.mean() / (posterior.inverse_temperature * sampled.losses.mean())
    return Copies(positions, (loss(positions) - loss(start.double())).numpy(), float(heat))
