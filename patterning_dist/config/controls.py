"""The section solve.controls: weights of other scores at the effective share of plus, to hold plus against."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from patterning_dist.config.checkpoints import CheckpointName
from patterning_dist.config.section import Section

# Of a table that stage solve writes.
WeightsName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", description="of the weights, for retrain.arms")]
DrawsKind = Literal["antithetic", "chains"]  # of first moments: Gaussian pairs around the checkpoint, or of the chains
MassKey = Literal["token", "domain", "label"]  # what losses may share: predicted token, domain or class


class AblationControlConfig(Section):
    kind: Literal["ablation"] = Field(description="rise of every loss where solve.component is set to 0")
    name: WeightsName


class FirstMomentControlConfig(Section):
    kind: Literal["first_moment"] = Field(
        description="first moments as for plus, from the other source of draws: what chains add to a Gaussian ball"
    )
    name: WeightsName
    draws: DrawsKind = Field(description="the one that solve.draws is not; solve.num_draws of them")


class HeldOutControlConfig(Section):
    name: WeightsName
    split: str = Field(
        description="phi, on the held-out samples that chains observe: overall, domain:NAME, a split of the task or a "
        "function"
    )


class GradientControlConfig(HeldOutControlConfig):
    kind: Literal["gradient"] = Field(
        description="grad l_i . grad phi at the checkpoint over solve.component, without draws or chains: a step on a "
        "loss that weighs more lowers phi. It is told the split, as kind split is"
    )


class InfluenceControlConfig(HeldOutControlConfig):
    kind: Literal["influence"] = Field(
        description="grad l_i . (H + gamma / n_beta I)^-1 grad phi likewise: influence on phi, H the Hessian of the "
        "mean training loss itself, damped by the component's localization over its inverse temperature"
    )
    conjugate_gradient_iterations: int = Field(20, ge=1, description="steps of the solve at most [iterations]")
    hessian_sequences: int = Field(64, ge=1, description="training samples of a Hessian product [sequences]")


class LossContrastControlConfig(Section):
    kind: Literal["loss_contrast"] = Field(
        description="every loss at another checkpoint less that at the checkpoint sampled: what the other one loses "
        "more of weighs more, whatever the sign of the target"
    )
    name: WeightsName
    checkpoint: CheckpointName = Field(
        description="one of model.checkpoints; of a model that this run trains: initialisation, where it began"
    )


class PermutedControlConfig(Section):
    kind: Literal["permuted"] = Field(description="the weights of plus, dealt among losses that share something")
    name: WeightsName
    within: MassKey = Field(description="what they share: predicted token, domain or class; the mass of each stays")


class MinimumNormControlConfig(Section):
    kind: Literal["minimum_norm"] = Field(
        description="scores of plus without bounds, rho = 1 + alpha chi^+ dmu (2601.13548): what falls below 0 is a "
        "pair with its labels swapped, of the weight -rho (2609.00699)"
    )
    name: WeightsName


class ScoresControlConfig(Section):
    kind: Literal["scores"] = Field(
        description="scores of your own: what has more of them weighs more, whatever the sign of the target"
    )
    name: WeightsName
    path: Path = Field(
        description="Parquet table with the sample's number (sequence_id or sample_id), with position of single losses "
        "and `score`, a row for each"
    )


class SplitControlConfig(Section):
    kind: Literal["split"] = Field(description="the losses that a split names, without any posterior (an oracle)")
    name: WeightsName
    split: str = Field(
        description="of the task (of language models induction, rest, induction_minus_rest), or package.module:function"
    )


ControlConfig = Annotated[
    AblationControlConfig
    | FirstMomentControlConfig
    | GradientControlConfig
    | InfluenceControlConfig
    | LossContrastControlConfig
    | MinimumNormControlConfig
    | PermutedControlConfig
    | ScoresControlConfig
    | SplitControlConfig,
    Field(discriminator="kind"),
]
