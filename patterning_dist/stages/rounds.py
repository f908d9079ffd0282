"""Which rounds there are: segments of the training of an arm with one seed, of most arms a single one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from patterning_dist.config import Config
from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.training import Arm


@dataclass(frozen=True)
class Round:
    """A segment of the training of an arm with one seed; of most arms it is all of it.

    Attributes:
        arm: of the experiment.
        seed: of the arm.
        number: from 1.
    """

    arm: Arm
    seed: int
    number: int = 1

    @property
    def name(self) -> str:
        """For messages."""
        name = f"{self.arm.name} seed {self.seed}"
        return name if self.arm.rounds == 1 else f"{name}, round {self.number} of {self.arm.rounds}"

    @property
    def arm_folder(self) -> str:
        """Of the arm and seed, relative to the run directory."""
        return f"retrain/{self.arm.name}/seed-{self.seed}"

    @property
    def folder(self) -> str:
        """Of this round's training, likewise."""
        return self.arm_folder if self.arm.rounds == 1 else f"{self.arm_folder}/round-{self.number}"

    @property
    def solution(self) -> str:
        """What is said of weights that were solved for on the way, relative to the run directory."""
        return f"{self.folder}/solution.json"

    @property
    def before(self) -> Round:
        """The round that this one goes on from."""
        assert self.number > 1
        return replace(self, number=self.number - 1)

    @property
    def annealed(self) -> str:
        """Where it ends, annealed on plain weights: what first moments are read off, relative to the run directory."""
        return f"{self.folder}/annealed"

    @property
    def start(self) -> str | None:
        """The checkpoint that it trains from; None: a fresh initialisation."""
        if self.number > 1:
            return self.before.folder
        return None if self.arm.start == INITIALISATION else self.arm.start

    @property
    def weights(self) -> str | None:
        """Its table, relative to the run directory; None: every sample weighs 1."""
        if self.arm.weights is None:
            return None
        if self.number > 1:
            return f"{self.folder}/weights.parquet"
        is_solved = isinstance(self.arm.weights, str)
        return f"weights/{self.arm.weights}.parquet" if is_solved else f"retrain/{self.arm.name}/weights.parquet"

    @property
    def data_seed(self) -> int:
        """Of the data order: the first round sees what other arms of its seed see, and no round what another saw."""
        if self.number == 1:
            return self.seed
        digest = hashlib.sha256(f"{self.seed} round {self.number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1  # seeds are below 2^63

    def num_steps(self, total: int) -> int:
        """Its part of the optimizer steps of a retraining."""
        return total * self.number // self.arm.rounds - total * (self.number - 1) // self.arm.rounds


def rounds_of(config: Config, number: int) -> list[Round]:
    """Round ``number`` of every arm that has so many: all arms of the first seed, then those of the next."""
    assert config.retrain is not None
    arms = config.retrain.arm_list
    seeds = dict.fromkeys(seed for arm in arms for seed in arm.seeds)
    return [Round(arm, seed, number) for seed in seeds for arm in arms if seed in arm.seeds and arm.rounds >= number]


def later_rounds(config: Config) -> list[Round]:
    """The rounds after the first, of all arms and seeds; none where nothing is retrained."""
    most = max((arm.rounds for arm in config.retrain.arm_list), default=1) if config.retrain else 1
    return [part for number in range(2, most + 1) for part in rounds_of(config, number)]


def joined_metrics(tables: Sequence[pa.Table]) -> pa.Table:
    """Metrics of successive trainings as those of one, steps and seconds counted on.

    The first row of a later training is of the weights that the last row of the one before is of, and left out.
    """
    rows: list[dict[str, Any]] = []
    for table in tables:
        step, seconds = (rows[-1][name] if rows else 0 for name in ("step", "seconds"))
        found = table.to_pylist()[bool(rows) :]
        rows += [row | {"step": step + row["step"], "seconds": seconds + row["seconds"]} for row in found]
    return pa.Table.from_pylist(rows, schema=tables[0].schema)
