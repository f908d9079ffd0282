"""Which networks the weights are solved from, and which others they are checked on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.config import CheckConfig, ReferencesConfig
from patterning_dist.experiments.two_rules.stages.references import choose

REJECTED = np.array([0.95, 0.02, 0.5, 0.9, 0.05, 0.3, 0.7, 0.99, 0.01, 0.6])
TRAIN = np.array([1.0] * 9 + [0.9])


def chosen(per_rule: int, further: int, train: np.ndarray = TRAIN) -> list[tuple[str, int, bool]]:
    config = SimpleNamespace(
        references=ReferencesConfig(num_seeds=10, per_rule=per_rule), check=CheckConfig(per_rule=further)
    )
    found = choose({"rejected": REJECTED, "train": train}, config)
    return [(reference.rule, reference.index, reference.is_held_out) for reference in found]


def test_the_held_out_ones_are_the_next_clearest_and_come_last() -> None:
    assert chosen(2, 2) == [
        ("nested", 7, False),
        ("nested", 0, False),
        ("equal_count", 8, False),
        ("equal_count", 1, False),
        ("nested", 3, True),
        ("nested", 6, True),  # below nested_above: it is the next that there is
        ("equal_count", 4, True),
        ("equal_count", 5, True),
    ]


def test_networks_of_both_rules_are_never_the_same() -> None:
    with pytest.raises(PatterningError, match=r"9 of 10 networks .* 2 of either rule .* 3 further ones"):
        chosen(2, 3)
    with pytest.raises(PatterningError, match="3 nested ones are wanted"):
        chosen(3, 1, np.where(np.arange(10) == 3, 0.9, 1.0))
