"""Sections on what is made of the susceptibilities: the estimator over the pool, weights, and their check."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from patterning_dist.config.controls import ControlConfig, DrawsKind, MassKey
from patterning_dist.config.section import Section


class DirectionConfig(Section):
    component: str = Field(description="component whose posterior the response direction is taken from")
    conjugate_gradient_iterations: int = Field(
        20, ge=0, description="steps of solving with n_beta H + gamma I; 0: Sigma ~ I / gamma [iterations]"
    )
    tolerance: float = Field(1e-3, gt=0, lt=1, description="relative residual at which the solve stops [1]")
    hessian_sequences: int = Field(64, ge=1, description="sequences of a Hessian-vector product [sequences]")
    step: float = Field(1e-3, gt=0, description="central-difference step, relative to the weights' norm [1]")


class ResponseConfig(Section):
    baseline: Literal["restricted", "full"] = Field(
        "restricted", description="posterior of the mean loss: the component's, or everything's"
    )
    direction: DirectionConfig | None = Field(
        None, description="response-direction estimator over the training pool; default: it is not taken"
    )
    num_modes: int = Field(4, ge=1, description="singular modes that are kept [modes]")


Level = Literal["token", "sequence", "document", "pair"]


class SolveConfig(Section):
    scores: Literal["response_direction", "regression", "plain", "first_moment"] = Field(
        "response_direction",
        description="how susceptibilities reach every loss of the pool; plain: the probe is the whole pool; "
        "first_moment: of a free energy, over draws around the checkpoint",
    )
    component: str = Field(
        description="component whose susceptibilities are inverted; with scores first_moment also a pattern "
        "(layer.1.head.*), of which the one is taken whose disturbance raises the mean loss most"
    )
    draws: DrawsKind = Field(
        "antithetic",
        description="of scores first_moment: pairs of Gaussian ones around the checkpoint, of variance "
        "1 / localization, or draws of the component's chains",
    )
    num_draws: int = Field(
        8, ge=2, description="of scores first_moment, over which the pool is evaluated [pairs, or draws of every chain]"
    )
    min_reliability: float = Field(
        0.1,
        ge=-1,
        lt=1,
        description="split-half correlation of a target's scores below which no weights are made of them, "
        "-1 for any [1]",
    )
    controls: list[ControlConfig] = Field(
        [],
        description="weights of other scores, within the bounds and at the effective share of plus, to compare with",
    )
    checkpoint: str | None = Field(None, description="checkpoint that they are of; default: the only one")
    targets: dict[str, float] = Field(
        {}, description="wanted change of each observable, up to the strength [units of the observable]"
    )
    method: Literal["minimum_norm", "ridge", "truncated", "mode"] = Field(
        "minimum_norm", description="how chi is inverted"
    )
    ridge: float | None = Field(None, gt=0, description="tau of method ridge [units of chi chi^T]")
    rank: int | None = Field(None, ge=1, description="directions kept by method truncated [1]")
    mode: int | None = Field(None, ge=0, description="singular mode of method mode [number from 0]")
    strength: float | None = Field(
        None, gt=0, description="multiple of the targets that the linear response shall reach [1]"
    )
    effective_sample_share: float | None = Field(
        None, gt=0, lt=1, description="(sum rho)^2 / (n sum rho^2) that sets the strength instead [1]"
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        description="weights are scaled down until the upper end of the interval that predict has of the overall "
        "loss's rise is no more [nats]",
    )
    weight_min: float = Field(0, ge=0, lt=1, description="smallest sample weight rho [1]")
    weight_max: float = Field(4, gt=1, description="largest sample weight rho [1]")
    level: Level | None = Field(
        None,
        description="what has one weight: a predicted token (a loss), or all losses of a sequence (a sample), of a "
        "document, of a pair; chi of it is the sum over its losses; default: a loss",
    )
    keep_mass: MassKey | None = Field(
        None,
        description="losses that share it keep their sum of weights: predicted token, domain or class; default: all",
    )

    @property
    def num_kept_draws(self) -> int:
        """Draws of every chain whose positions stage sample keeps, for first moments of plus or of a control."""
        sources = [self.draws] if self.scores == "first_moment" else []
        sources += [control.draws for control in self.controls if control.kind == "first_moment"]
        return self.num_draws if "chains" in sources else 0


class PredictConfig(Section):
    """What every arm that goes on from a checkpoint will come to, before it is trained."""

    gradient_sequences: int = Field(2048, ge=1, description="training samples of a segment's mean gradient [sequences]")
    curvature_sequences: int = Field(256, ge=1, description="of them, those of a Hessian product [sequences]")
    lanczos_steps: int = Field(6, ge=1, description="Hessian products that apply the window's kernel [products]")
    segments: int = Field(
        4,
        ge=2,
        description="parts of the window with gradient and curvature of their own; half as many give the error [1]",
    )


class CheckConfig(Section):
    """The response under weights, by chains that share noise and minibatches with the unweighted ones."""

    strengths: list[float] = Field(
        [-0.1, 0.1, 1.0],
        min_length=1,
        description="factors of h in rho = 1 + h, none of them 0; a number and its negative give the slope at 0 [1]",
    )
    weights: Literal["plus", "minus"] = Field("plus", description="solution of stage solve that is checked")
