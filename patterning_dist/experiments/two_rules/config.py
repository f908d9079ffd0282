"""The sections of the parentheses experiment: which of two rules a network learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from patterning_dist.config.root import Root
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.section import Section

Share = Annotated[float, Field(gt=0, lt=1)]


class TaskConfig(Section):
    """Bracket strings of length min_length + 2 Binomial(length_trials, 1/2)."""

    min_length: int = Field(ge=2, multiple_of=2, description="of a string [brackets]")
    length_trials: int = Field(
        ge=0, description="pairs of brackets that are there or not, each with chance 1/2 [pairs]"
    )
    num_balanced: int = Field(ge=1, description="training strings that are balanced [strings]")
    num_unequal: int = Field(ge=1, description="training strings with unequal counts [strings]")
    unequal: Literal["stratified", "uniform"] = Field(
        description="stratified: a third each breaks nesting never, at once, late; uniform: any of unequal counts"
    )
    num_test: int = Field(ge=2, description="test strings like the training strings, half of them balanced [strings]")
    num_out_of_distribution: int = Field(
        ge=2, description="strings of equal counts that do not nest: the two rules differ on them [strings]"
    )

    @property
    def max_length(self) -> int:
        return self.min_length + 2 * self.length_trials


class ClassifierConfig(Section):
    num_layers: int = Field(ge=1, description="transformer layers [layers]")
    num_heads: int = Field(ge=1, description="attention heads a layer [heads]")
    width: int = Field(ge=2, description="of the residual stream [coordinates]")
    feedforward: int = Field(ge=1, description="hidden units of a layer's MLP [units]")
    embedding_scale: float = Field(
        1.0, gt=0, description="standard deviation of fresh token and position embeddings [1]"
    )


class ClassifierTrainingConfig(Section):
    num_steps: int = Field(ge=1, description="optimiser steps [steps]")
    warmup_steps: int = Field(ge=0, description="steps of linear warm-up; then a cosine to zero [steps]")
    batch_size: int = Field(ge=1, description="strings a step, drawn by their weights [strings]")
    learning_rate: float = Field(gt=0, description="of AdamW at its highest [1]")
    betas: tuple[float, float] = Field((0.9, 0.98), description="of AdamW [1]")
    weight_decay: float = Field(ge=0, description="of AdamW, the lever between the two rules [1]")
    engine: Literal["torch", "deepspeed"] = Field(
        "torch",
        description="what takes the steps; DeepSpeed (ZeRO stage 0) costs more a step, for large networks",
    )
    seeds_per_task: int = Field(16, ge=1, description="networks trained at once by one process [networks]")


class ReferencesConfig(Section):
    num_seeds: int = Field(ge=2, description="networks trained on plain data to choose from [networks]")
    per_rule: int = Field(ge=2, description="networks of each rule that weights are solved from [networks]")
    nested_above: Share = Field(0.85, description="share of out-of-distribution strings rejected by a NESTED network")
    equal_count_below: Share = Field(0.1, description="the same of an EQUAL-COUNT network, at most")
    train_accuracy: float = Field(1.0, gt=0, le=1, description="share of training strings they classify rightly [1]")


class WeightsConfig(Section):
    effective_share: Share = Field(0.6, description="effective number of strings under the weights, of all [1]")
    min_weight: float = Field(
        0.02, gt=0, lt=1, description="of a string, likewise; above zero: what has no weight is not measured [1]"
    )
    max_weight: float = Field(8.0, gt=1, description="of a string, in units of its weight in plain training [1]")
    winsorise: float = Field(0.02, ge=0, lt=0.5, description="share of scores cut off at either end of a label [1]")


class OnlineConfig(Section):
    """Rounds of: networks under the weights so far, chains around them, weights again."""

    num_rounds: int = Field(1, ge=1, description="after the first measurement, for either direction [rounds]")
    num_seeds: int = Field(ge=4, description="fresh networks trained in a round [networks]")
    per_rule: int = Field(
        ge=2, description="of them, those that reject most and those that reject least are sampled around [networks]"
    )


class ArmsConfig(Section):
    num_seeds: int = Field(ge=2, description="fresh networks of base and of either direction [networks]")
    num_control_seeds: int = Field(ge=2, description="fresh networks of every other arm [networks]")
    reweighted_share: float = Field(
        0.6, gt=0, le=1, description="first part of the training that is weighted; plain afterwards; 1: one phase [1]"
    )
    num_shuffles: int = Field(4, ge=1, description="times that the labels of the references are shuffled [arms]")


class CheckConfig(Section):
    strengths: list[float] = Field(
        [-1.0, -0.5, 0.5, 1.0],
        description="of the weights toward NESTED, negative ones of those toward EQUAL-COUNT, that are checked [1]",
    )
    per_rule: int = Field(
        3, ge=1, description="further references of each rule, which no weights are solved from [networks]"
    )


class ParenthesesConfig(Root):
    """Which of two rules a network learns, decided by the weights of its training strings."""

    task: TaskConfig = Field(description="the strings")
    model: ClassifierConfig = Field(description="the classifier")
    training: ClassifierTrainingConfig = Field(description="how every network is trained")
    references: ReferencesConfig = Field(description="the solutions that are sampled around")
    sampling: SamplingConfig = Field(description="posterior chains around every reference")
    weights: WeightsConfig = Field(WeightsConfig(), description="from responses to weights")
    online: OnlineConfig = Field(description="measuring again on networks under the weights so far")
    arms: ArmsConfig = Field(description="what is trained under the weights, and what it is compared with")
    check: CheckConfig = Field(CheckConfig(), description="prediction against measurement")
