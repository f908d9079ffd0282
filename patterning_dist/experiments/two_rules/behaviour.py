"""What trained bracket classifiers do: how accurate they are, and which rule they follow out of distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from patterning_dist.experiments.two_rules.classifier import BracketClassifier
from patterning_dist.experiments.two_rules.strings import OPEN, BracketStrings
from patterning_dist.training.stacked import Networks, stacked_logits


class Behaviour(NamedTuple):
    """Shares of strings, one a network [network].

    train, test: classified rightly.
    rejected: of the out-of-distribution strings, called not balanced: 1 for NESTED, 0 for EQUAL-COUNT.
    rejected_open, rejected_close: the same of those that begin with "(" and with ")". A network that looks at the
        first symbol only has 0 and 1.
    """

    train: np.ndarray
    test: np.ndarray
    rejected: np.ndarray
    rejected_open: np.ndarray
    rejected_close: np.ndarray


def behaviour(skeleton: BracketClassifier, networks: Networks, splits: Mapping[str, BracketStrings]) -> Behaviour:
    """Behaviour of stacked networks on the splits of the task (Li et al. 2507.06445).

    Args:
        skeleton: of one network.
        networks: parameters by name [network, ...].
        splits: train, test and out_of_distribution.
    """
    right = {
        name: (stacked_logits(skeleton, networks, splits[name]) > 0) == (splits[name].labels > 0)
        for name in ("train", "test")
    }
    unnested = splits["out_of_distribution"]
    rejected = stacked_logits(skeleton, networks, unnested) <= 0
    opens = unnested.tokens[:, 0] == OPEN
    return Behaviour(
        train=right["train"].mean(axis=1),
        test=right["test"].mean(axis=1),
        rejected=rejected.mean(axis=1),
        rejected_open=rejected[:, opens].mean(axis=1) if opens.any() else np.full(len(rejected), np.nan),
        rejected_close=rejected[:, ~opens].mean(axis=1) if (~opens).any() else np.full(len(rejected), np.nan),
    )
