"""What the chains around a set of networks say of every string, and how well they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_chains
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.scores import (
    log_excess,
    mean_rows,
    reliability,
    reliability_between_solutions,
)
from patterning_dist.experiments.two_rules.stages.references import NESTED, Reference
from patterning_dist.experiments.two_rules.task import COMPONENT
from patterning_dist.measure.results import table_name
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.moments import Floats
from patterning_dist.storage.files import read_parquet
from patterning_dist.storage.run import RunDirectory


@dataclass(frozen=True)
class Responses:
    """Responses at the networks of either rule.

    Attributes:
        kinds: 1 for NESTED, 0 for EQUAL-COUNT [solution].
        free_energy: rho_i <l_i - L> of the chains, nats [solution, chain, sample].
        expected_loss: rho_i <l_i>, the same without what all strings have in common, nats [solution, chain, sample].
        llc: response of the LLC, direct term and covariance, nats [solution, chain, sample].
        loss: rho_i l_i(w*), nats [solution, sample].
    """

    kinds: np.ndarray
    free_energy: Floats
    expected_loss: Floats
    llc: Floats
    loss: Floats


def read_responses(
    config: ParenthesesConfig, run: RunDirectory, references: Sequence[Reference], names: Sequence[str]
) -> Responses:
    """Responses of every healthy chain; a solution's chains are cut to the fewest of any.

    Args:
        config: of the run.
        run: its directory.
        references: the networks.
        names: of their subjects, in the same order.
    """
    n_beta = config.sampling.resolve(COMPONENT).inverse_temperature
    free_energy, expected_loss, llc, loss = [], [], [], []
    for name in names:
        chains, _ = read_chains(run.path / "sampling" / name)
        table, _ = read_parquet(run.path / table_name(name), ("sample_id", "center_loss"))
        center = table["center_loss"].to_numpy().astype(np.float64)
        free_energy.append(free_energy_response(chains, center).chi_per_chain[:, 0])
        expected_loss.append(np.stack([chain.total().mean_loss for chain in chains]) + center)
        llc.append(llc_response(chains, 0, n_beta).chi_per_chain[:, 0])
        loss.append(center)
    fewest = min(map(len, free_energy))
    return Responses(
        kinds=np.array([reference.rule == NESTED for reference in references], int),
        free_energy=np.stack([chi[:fewest] for chi in free_energy]),
        expected_loss=np.stack([losses[:fewest] for losses in expected_loss]),
        llc=np.stack([chi[:fewest] for chi in llc]),
        loss=np.stack(loss),
    )


def reliabilities(responses: Responses, classes: np.ndarray) -> dict[str, Any]:
    """Of the direction between the rules, from disjoint chains and from disjoint solutions.

    ``direction`` is the one that weights follow (``toward_first``), ``llc`` the contrast of the LLC's responses.
    """
    kinds, found = responses.kinds, {}
    for name, chi, scale in (
        ("direction", responses.expected_loss, lambda losses: log_excess(losses, classes)),
        ("llc", responses.llc, np.asarray),
    ):
        rows = scale(chi.mean(axis=1))
        entry: dict[str, Any] = {"between_solutions": reliability_between_solutions(rows, kinds, classes)}
        if chi.shape[1] > 1:
            halves = [mean_rows(scale(chi[:, half::2].mean(axis=1)), kinds) for half in (0, 1)]
            entry["between_chains"] = reliability(tuple(ones - zeros for ones, zeros in halves), classes)
        found[name] = entry
    return found


def predicted(responses: Responses, relative: Floats, n_beta: float) -> dict[str, Any]:
    """(n_beta / n) chi h for LLC and free energy, mean over the solutions of a rule, with their spread as error."""
    h = relative - 1
    found = {}
    for name, chi in (("free_energy", responses.free_energy), ("llc", responses.llc)):
        by_solution = n_beta / len(h) * (chi.mean(axis=1) @ h)
        for rule, kind in (("nested", 1), ("equal_count", 0)):
            values = by_solution[responses.kinds == kind]
            found[f"{name}_{rule}"] = {
                "value": float(values.mean()),
                "standard_error": float(values.std(ddof=1) / np.sqrt(len(values))),
                "per_solution": values,
            }
    return found
