"""Warnings on the page of the parentheses experiment: one line for each way to fail, and the worst case in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patterning_dist.experiments.two_rules.stages.report import _warnings


@pytest.mark.parametrize(
    ("mode", "name", "mild", "worst"),
    [
        ("chains_disagree", "rhat_loss", 1.2, 2.2),
        ("too_little_signal", "reliability_training_loss", 0.06, -0.08),
        ("too_cold", "temperature", 0.8, 0.3),
        ("too_hot", "temperature", 1.2, 3.1),
        ("still_falling", "rise", -0.004, -0.008),
        ("still_rising", "rise", 0.004, 0.008),
    ],
)
def test_the_worst_of_a_mode_is_named(tmp_path: Path, mode: str, name: str, mild: float, worst: float) -> None:
    (tmp_path / "response").mkdir()
    entries = {
        f"network-{place}": {"findings": [{"mode": mode, "evidence": {name: value}, "message": f"is {value}"}]}
        | {"excluded": []}
        for place, value in enumerate((mild, worst, mild))
    }
    quiet = {"network-3": {"findings": [], "excluded": [{"chain": 1, "reason": "not finite"}]}}
    for file, content in (("diagnostics", entries), ("rounds", quiet), ("realised", {})):
        (tmp_path / "response" / f"{file}.json").write_text(json.dumps({"subjects": content}))
    arms = {"base": {"num_imperfect_on_train": 1, "num_networks": 64, "train_accuracy_min": 0.99975}}
    assert _warnings(tmp_path, arms | {"nested": arms["base"] | {"num_imperfect_on_train": 0}}) == [
        f"3 of 4 sampled networks, the worst network-1: is {worst}",
        "network-3: chain 1 is left out: not finite",
        "arm base: 1 of 64 networks do not fit all training strings, the worst 99.98 % of them",
    ]
