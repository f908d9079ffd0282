"""Sections on trainings: the baseline, and the arms on weighted data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.controls import WeightsName
from patterning_dist.config.section import Section

MAX_FAILURES = 3  # restarts in a row, where the experiment names none
SOLVED = ("plus", "minus", "permuted")  # tables of weights that stage solve writes
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$")]


class TrainingConfig(Section):
    num_steps: int = Field(0, ge=0, description="length of the baseline run, if it is trained here [optimizer steps]")
    batch_size: int = Field(ge=1, description="global batch over all ranks [sequences]")
    optimizer: Literal["muon", "adamw", "sgd"] = Field("muon", description="optimizer of the weight matrices")
    matrix_learning_rate: float = Field(0.04, gt=0, description="rate of muon, adamw or sgd for the matrices")
    learning_rate: float = Field(0.01, gt=0, description="rate for embeddings and biases; for all of other models")
    bias_learning_rate_factor: float = Field(5, gt=0, description="rate of the biases over learning_rate [1]")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up [optimizer steps]")
    weight_decay: float = Field(0, ge=0, description="weight decay, decoupled from adamw's second moment [1]")
    anneal_steps: int = Field(0, ge=0, description="steps to rate 0 before sampling [optimizer steps]")
    anneal_batch_size: int = Field(16, ge=1, description="global batch of the annealing [sequences]")
    evaluate_every: int = Field(100, ge=1, description="distance between metrics rows [optimizer steps]")
    evaluation_sequences: int = Field(256, ge=1, description="held-out sequences of a row [sequences]")
    gradient_checkpointing: bool = Field(
        False, description="compute layers again in backward passes, also of arms, instead of keeping what is in them"
    )
    deepspeed: Path | None = Field(None, description="DeepSpeed JSON; default: ZeRO stage 0")
    num_workers: int = Field(1, ge=1, description="data-parallel workers [ranks]")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a rank [threads]")


class WindowConfig(Section):
    """A continuation by an optimizer of its own, short enough for its outcome to be foretold."""

    optimizer: Literal["adamw", "sgd"] = Field(description="of all weights, its state fresh")
    learning_rate: float = Field(gt=0, description="of all weights, from the first step on")
    num_steps: int = Field(ge=1, description="length [optimizer steps]")

    def training(self, settings: TrainingConfig) -> TrainingConfig:
        """The section training with this optimizer in place of its own."""
        rates = dict.fromkeys(("learning_rate", "matrix_learning_rate"), self.learning_rate)
        own = {"optimizer": self.optimizer, **rates, "bias_learning_rate_factor": 1.0, "warmup_steps": 0}
        return settings.model_copy(update=own)


class ArmConfig(Section):
    """One retraining, with every seed."""

    name: ArmName = Field(description="of the arm, and of its folder")
    weights: WeightsName | Path | None = Field(
        None,
        union_mode="left_to_right",
        description="plus, minus, permuted or a name of solve.controls (of stage solve), or the path of a table of "
        "sample weights, with a dot or a slash in it; default: all weigh 1",
    )
    strength: float = Field(1.0, gt=0, description="factor of h in rho = 1 + h; weights below 0 are refused [1]")
    weighting: Literal["loss", "draw"] = Field(
        "loss", description="weights multiply losses, or are the chances that samples are drawn with"
    )
    weighted_share: float = Field(
        1.0, gt=0, le=1, description="first part of the steps that is weighted; plain afterwards [1]"
    )
    rounds: int = Field(
        1,
        ge=1,
        description="segments of the training; weights of each after the first are measured and solved for at the "
        "checkpoint where it starts [rounds]",
    )
    start: str | None = Field(None, description="default: retrain.start")
    window: WindowConfig | None = Field(
        None, description="optimizer, rate and length of its own, from a checkpoint on; default: those of the section"
    )
    seeds: list[int] | None = Field(None, min_length=1, description="default: retrain.seeds")


class Arm(ArmConfig):
    """One retraining, with start and seeds filled in."""

    start: str
    seeds: list[int]


class RetrainConfig(Section):
    arms: list[ArmName | ArmConfig] = Field(
        ["base", "plus", "minus", "permuted"],
        min_length=1,
        description="what is trained: base (no weights), plus, minus, permuted, or an arm with keys of its own",
    )
    seeds: list[int] = Field(min_length=1, description="one retraining of every arm for each seed")
    num_steps: int = Field(ge=1, description="length of one retraining [optimizer steps]")
    evaluate_every: int = Field(100, ge=1, description="distance between metrics rows [optimizer steps]")
    rate_factor: float = Field(1.0, gt=0, description="learning rates over those of training [1]")
    start: str = Field(
        INITIALISATION,
        description="weights that a retraining starts from: initialisation, or the name of a checkpoint (baseline)",
    )
    engine: Literal["deepspeed", "stacked"] = Field(
        "deepspeed",
        description="deepspeed: every seed on its own; stacked: all seeds of an arm at once in one process, for small "
        "networks, the same but for the rounding of sums",
    )
    deepspeed: Path | None = Field(None, description="DeepSpeed JSON; default: ZeRO stage 0")
    num_workers: int = Field(1, ge=1, description="data-parallel workers of one arm [ranks]")
    concurrent_arms: int | None = Field(None, ge=1, description="retrainings at once; default: what fits [runs]")
    max_failures: int = Field(
        MAX_FAILURES,
        ge=0,
        description="restarts in a row of a training that got no further when its worker died [restarts]",
    )

    @property
    def arm_list(self) -> list[Arm]:
        """The arms with start and seeds filled in; a bare name is that of its weights."""
        arms = [
            ArmConfig(name=arm, weights=None if arm == "base" else arm) if isinstance(arm, str) else arm
            for arm in self.arms
        ]
        return [
            Arm(**(arm.model_dump() | {"start": arm.start or self.start, "seeds": arm.seeds or self.seeds}))
            for arm in arms
        ]
