"""What trained bracket classifiers do: how accurate they are, and which rule they follow out of distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from patterning_dist.experiments.two_rules.strings import OPEN, BracketStrings
from patterning_dist.training.stack import Networks, stacked_outputs

if TYPE_CHECKING:
    from patterning_dist.experiments.two_rules.task import BracketTask

_EVALUATED_AT_ONCE = 2**21  # strings times networks, times positions


def behaviour(task: BracketTask, skeleton: nn.Module, networks: Networks) -> dict[str, np.ndarray]:
    """Shares of strings for every network (Li et al. 2507.06445), columns [network].

    train, test: classified rightly.
    rejected: of the out-of-distribution strings, called not balanced: 1 for NESTED, 0 for EQUAL-COUNT.
    rejected_open, rejected_close: the same of those that begin with "(" and with ")". A network that looks at the
        first symbol only has 0 and 1.

    Args:
        task: has the splits.
        skeleton: a network.
        networks: parameters by name [network, ...].
    """
    right = {
        name: (stacked_logits(skeleton, networks, strings) > 0) == (strings.labels > 0)
        for name, strings in (("train", task.train), ("test", task.held_out["test"]))
    }
    unnested = task.held_out["out_of_distribution"]
    rejected = stacked_logits(skeleton, networks, unnested) <= 0
    opens = unnested.tokens[:, 0] == OPEN
    return {
        "train": right["train"].mean(axis=1),
        "test": right["test"].mean(axis=1),
        "rejected": rejected.mean(axis=1),
        "rejected_open": rejected[:, opens].mean(axis=1) if opens.any() else np.full(len(rejected), np.nan),
        "rejected_close": rejected[:, ~opens].mean(axis=1) if (~opens).any() else np.full(len(rejected), np.nan),
    }


def stacked_logits(skeleton: nn.Module, networks: Networks, strings: BracketStrings) -> np.ndarray:
    """Logits of "balanced" of all strings under every network [network, sample], float32."""
    num_networks = len(next(iter(networks.values())))
    at_once = _EVALUATED_AT_ONCE // (num_networks * strings.tokens.shape[1])
    return stacked_outputs(lambda model, batch: model(*batch[:2]), skeleton, networks, strings, at_once)
