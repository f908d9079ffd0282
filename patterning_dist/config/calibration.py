"""The section on `patterning calibrate`, of a run and of a study."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from patterning_dist.config.checkpoints import CheckpointName
from patterning_dist.config.section import Section

Positive = Annotated[float, Field(gt=0)]


class CalibrationConfig(Section):
    """What `patterning calibrate` tries, on one component: every combination of the lists that are given."""

    checkpoint: CheckpointName | None = Field(None, description="checkpoint that is tried; default: the last one")
    component: str | None = Field(None, description="component that is tried; default: the first one")
    step_sizes: list[Positive] | None = Field(
        None,
        min_length=1,
        description="eps [weight^2]; default: from the largest curvature of the posterior, and smaller ones as long as "
        "the bias is more than half the standard error of the planned run",
    )
    inverse_temperatures: list[Positive] | None = Field(
        None, min_length=1, description="n_beta [1/nats]; default: sampling.inverse_temperature"
    )
    localizations: list[Positive] | None = Field(
        None,
        min_length=1,
        description="gamma [1/weight^2]; default: sampling.localization, or what makes the smallest curvature of the "
        "posterior positive",
    )
    # Enough chains for a spread between them, and few draws: a setting that needs more to be judged is not a good one.
    num_chains: int = Field(4, ge=2, description="chains of every setting [chains]")
    num_draws: int = Field(60, ge=8, description="draws of every chain [draws]")
    steps_between_draws: int | None = Field(
        None,
        ge=1,
        description="distance between draws; default: from the smallest curvature, 40 at most at first [steps]",
    )
    standard_error: float = Field(
        0.1,
        gt=0,
        description="wanted error of chi, root mean square over samples, over its spread; for the length predicted [1]",
    )
