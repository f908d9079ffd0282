"""Which of two rules a network learns, nesting or equal counts, decided by the weights of its training strings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from patterning_dist.experiments.experiment import Stage
from patterning_dist.experiments.two_rules.checks import check_parentheses
from patterning_dist.experiments.two_rules.config import ParenthesesConfig

if TYPE_CHECKING:
    from torch import nn

_ROOM = "patterning_dist.experiments.two_rules.stages"
_STAGES = {
    "prepare": Stage(f"{_ROOM}.references:prepare", ("seed", "task"), on_ray=False),
    "train": Stage(f"{_ROOM}.references:train", ("device", "model", "training", "references")),
    "sample": Stage(f"{_ROOM}.sample:sample", ("sampling",)),
    "solve": Stage(f"{_ROOM}.solve:solve", ("weights", "online", "arms", "check")),
    "retrain": Stage(f"{_ROOM}.retrain:retrain", ()),
    "report": Stage(f"{_ROOM}.report:report", ("name",), on_ray=False),
}


class TwoRules:
    """An ``Experiment``; see there."""

    schema = ParenthesesConfig

    def locate(self, config: ParenthesesConfig, folder: Path) -> ParenthesesConfig:
        """There are no paths in the file."""
        return config

    def check(self, config: ParenthesesConfig) -> list[str]:
        """See ``Experiment``."""
        return check_parentheses(config)

    def stages(self, config: ParenthesesConfig) -> dict[str, Stage]:
        """All of them, always."""
        return _STAGES

    def inputs(self, config: ParenthesesConfig, manifest: dict[str, Any]) -> dict[str, Any]:
        """Nothing: the strings follow from the seed."""
        return {}

    def preflight(self, config: ParenthesesConfig, directory: Path) -> list[str]:
        """See ``Experiment``: the device is there."""
        from patterning_dist.runtime.environment import resolve_device

        resolve_device(config.device)
        return []

    def skeleton(self, config: ParenthesesConfig) -> nn.Module:
        """See ``Experiment``."""
        from patterning_dist.experiments.two_rules.classifier import BracketClassifier

        return BracketClassifier(config.model, config.task.max_length)
