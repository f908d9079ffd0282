"""Section on the yardstick of data attribution: scores against retrainings on parts of the training samples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from patterning_dist.config.controls import WeightsName
from patterning_dist.config.section import Section

RANDOM = "random"  # scores that say nothing, measured in any case
Method = Literal["gradient", "influence", "susceptibility", "bm25"]


class ValidationConfig(Section):
    """Attribution scores of every training sample for held-out samples (queries), against what retraining shows."""

    methods: list[Method] = Field(
        ["gradient", "influence"],
        description="gradient: -g_i . g_q; influence: -g_i . (n_beta H + gamma I)^-1 g_q; susceptibility: "
        "-Cov(l_i, l_q) over draws of chains; bm25: overlap of tokens; random scores are measured in any case",
    )
    scores: dict[WeightsName, Path] = Field(
        {}, description="further scores, name -> folder with info.json and scores.bin, as bergson writes them"
    )
    bank: Path | None = Field(
        None,
        description="folder with subsets.json and retrained/, as bergson writes it with save_models, to measure on "
        "instead of retrainings of this run",
    )
    component: str = Field("everything", description="whose gradients and chains the scores are of")
    start: str | None = Field(None, description="checkpoint that retrainings go on from; default: the only one")
    num_queries: int = Field(50, ge=1, description="held-out samples, of every held-out set at most [sequences]")
    num_subsets: int = Field(40, ge=2, description="random subsets that are retrained on [subsets]")
    subset_share: float = Field(0.5, gt=0, lt=1, description="of the training samples, that a subset keeps [1]")
    removed_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the training samples, that QLD removes for every method and query; default: QLD is not "
        "measured [1]",
    )
    removed_token_share: float | None = Field(
        None, gt=0, lt=1, description="of the training losses, that per-token QLD removes; default: not measured [1]"
    )
    seeds: list[int] = Field([0], min_length=1, description="data orders of every retraining; two give a ceiling")
    num_steps: int | None = Field(None, ge=1, description="length of one retraining [optimizer steps]")
    rate_factor: float = Field(1.0, gt=0, description="learning rates over those of training [1]")
    engine: Literal["deepspeed", "stacked"] = Field(
        "deepspeed", description="deepspeed: one by one; stacked: several at once in one process, for small networks"
    )
    num_draws: int = Field(
        32, ge=2, description="of method susceptibility: draws of every chain that losses are taken at [draws]"
    )
