"""Which networks of an online round are sampled around."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from patterning_dist.config import load_config
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.stages.online import _ends

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "parentheses.yaml", ["online={num_seeds: 8, per_rule: 2}"])


def networks(train: list[float]) -> dict[str, np.ndarray]:
    return {"train": np.array(train), "rejected": np.linspace(0, 0.7, len(train))}


def test_the_ends_of_the_accurate_ones() -> None:
    found = _ends(CONFIG, "toward_nested_1", networks([0.9, 1, 1, 1, 1, 1, 1, 0.99]))
    assert [(reference.rule, reference.index) for reference in found] == [
        ("nested", 6),
        ("nested", 5),
        ("equal_count", 1),
        ("equal_count", 2),
    ]
    assert found[0].rejected == pytest.approx(0.6)


def test_too_few_accurate_ones_are_said_and_what_to_do() -> None:
    with pytest.raises(PatterningError, match=r"round toward_nested_1: 3 of 8 networks .* raise online.num_seeds"):
        _ends(CONFIG, "toward_nested_1", networks([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5]))
