"""Which posteriors are sampled, for how long, and what is observed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, WrapValidator

from patterning_dist.config.model import FunctionPath
from patterning_dist.config.section import Section

# How chains are spread over processes, and how they are kept: at most rounding depends on it.
LAYOUT_KEYS = (
    "workers",
    "threads_per_worker",
    "ranks_per_chain",
    "draws_per_push",
    "micro_batch_size",
    "cache_gib",
    "gradient_checkpointing",
    "aggregator_shards",
    "snapshot_seconds",
    "max_chain_failures",
    "progress_timeout",
)
# A number once the file has been read: `window` is of the retrainings, another section (config/window.py).
Localization = Annotated[
    float,
    Field(gt=0),
    WrapValidator(lambda value, check: value if value == "window" else check(value)),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "window"}]}),
]
ObservableName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.\-]*$")]


class ComponentLossConfig(Section):
    kind: Literal["component_loss"] = Field(description="L(w) - L(w*) on the component's posterior [nats]")
    name: ObservableName = Field(description="name of the observable")

    @property
    def observable_names(self) -> list[str]:
        return [self.name]


def is_function(split: str) -> bool:
    """Whether a split is a function of the user's own, ``package.module:function``."""
    return ":" in split and not split.startswith("domain:")


class SplitLossConfig(Section):
    kind: Literal["split_loss"] = Field(description="mean loss on a part of the held-out sequences [nats]")
    name: ObservableName = Field(description="name of the observable")
    split: Annotated[
        str,
        Field(
            pattern=r"^(overall|[a-z][a-z0-9_]*|domain:.+|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
            description="overall, domain:<name>, a split of the task (of language models induction, rest, "
            "induction_minus_rest, repeated_sequence), or package.module:function, columns -> mask or signs",
        ),
    ]

    @property
    def observable_names(self) -> list[str]:
        return [self.name]


class FunctionConfig(Section):
    kind: Literal["function"] = Field(description="a function of the user's: model -> Tensor[len(names)]")
    names: list[ObservableName] = Field(min_length=1, description="one name for each number it returns")
    path: FunctionPath = Field(description="where it is, as package.module:function")

    @property
    def observable_names(self) -> list[str]:
        return list(self.names)


class LlcConfig(Section):
    kind: Literal["llc"] = Field(description="local learning coefficient, n_beta E[L - L(w*)]; [1]")
    name: ObservableName = Field(description="name of the observable")


class FreeEnergyConfig(Section):
    kind: Literal["free_energy"] = Field(description="-log of the posterior's normalisation; [1]")
    name: ObservableName = Field(description="name of the observable")


class ControlledConfig(Section):
    kind: Literal["controlled"] = Field(
        description="a split loss once more, its susceptibilities measured with a control that takes noise out of them"
    )
    name: ObservableName = Field(description="name of the observable")
    of: ObservableName = Field(description="the split loss")
    control: Literal["langevin_stein", "linear"] = Field(
        "langevin_stein",
        description="exact for any posterior, for two gradients more a draw; or the linear part of the loss, exact for "
        "a Gaussian posterior only",
    )


# What follows from the draws together, rather than a number at every draw: only its response to the data is reported.
PosteriorQuantityConfig = LlcConfig | FreeEnergyConfig | ControlledConfig
ObservableConfig = Annotated[
    ComponentLossConfig | SplitLossConfig | FunctionConfig | LlcConfig | FreeEnergyConfig | ControlledConfig,
    Field(discriminator="kind"),
]


class SgldConfig(Section):
    kind: Literal["sgld"] = Field(description="stochastic-gradient Langevin dynamics")


class RmspropSgldConfig(Section):
    kind: Literal["rmsprop_sgld"] = Field(description="SGLD preconditioned by the gradients' second moment")
    # The defaults of devinterp, so that its users' step sizes carry over.
    decay: float = Field(
        0.99, ge=0, le=1, description="of the running second moment, a step; 1, its plain mean, for large batches [1]"
    )
    stability: float = Field(0.1, gt=0, description="added to the root of the second moment [nats/weight]")
    correction: bool = Field(False, description="add the term for the drift of the preconditioner")


class SgnhtConfig(Section):
    kind: Literal["sgnht"] = Field(description="stochastic-gradient Nose-Hoover thermostat")
    diffusion: float = Field(0.1, gt=0, le=0.5, description="share of the momentum that a step loses, about [1]")


SamplerConfig = SgldConfig | RmspropSgldConfig | SgnhtConfig


class ComponentConfig(Section):
    name: str = Field(description="everything, attention, embedding, layer.1.head.3, or several joined by +")
    num_chains: int | None = Field(None, ge=1, description="chains; default: sampling.num_chains")
    num_draws: int | None = Field(None, ge=1, description="draws a chain; default: sampling.num_draws")
    burn_in: int | None = Field(None, ge=0, description="SGLD steps; default: sampling.burn_in")
    steps_between_draws: int | None = Field(None, ge=1, description="SGLD steps; default: of sampling")
    inverse_temperature: float | None = Field(None, gt=0, description="n_beta; default: of sampling")
    localization: Localization | None = Field(None, description="gamma [1/weight^2], or window; default: of sampling")
    step_size: float | None = Field(None, gt=0, description="eps [weight^2]; default: of sampling")


class ComponentSettings(Section):
    """How the chains of one component walk; see ``ComponentConfig``."""

    name: str
    num_chains: int
    num_draws: int
    burn_in: int
    steps_between_draws: int
    inverse_temperature: float
    localization: float
    step_size: float


class StatisticConfig(Section):
    name: ObservableName = Field(description="of the folder that holds its results, a file a chain")
    path: FunctionPath = Field(description="package.module:Class, made with the chain's target")


class SamplingConfig(Section):
    components: list[ComponentConfig] = Field(min_length=1, description="parts of the model that are free in turn")
    observables: list[ObservableConfig] = Field(
        min_length=1, description="what is measured at every draw of every chain"
    )
    statistics: list[StatisticConfig] = Field([], description="what else is reduced over the draws of every chain")
    num_chains: int = Field(4, ge=1, description="independent chains [per component]")
    num_draws: int = Field(ge=1, description="draws kept [per chain]")
    burn_in: int = Field(ge=0, description="steps left out at the start of a chain [SGLD steps]")
    steps_between_draws: int = Field(1, ge=1, description="distance between draws [SGLD steps]")
    inverse_temperature: float = Field(gt=0, description="n_beta, the weight of the mean loss [1/nats]")
    localization: Localization = Field(
        description="gamma, the pull towards the checkpoint [1/weight^2]; or window: n_beta / tau, the posterior that "
        "answers to weights as the retrainings do, with sgd over tau = rate x steps"
    )
    weight_decay: float = Field(
        0,
        ge=0,
        description="c, where the checkpoint is the minimum of the loss + c/2 |w|^2, as training with sgd and this "
        "weight decay leaves it: chains and LLC are of that sum, over all coordinates of the component [1/weight^2]",
    )
    step_size: float = Field(gt=0, description="eps, the variance of the noise of one step [weight^2]")
    sampler: SamplerConfig = Field(
        SgldConfig(kind="sgld"), discriminator="kind", description="update rule of the chains and its own settings"
    )
    batch_size: int = Field(8, ge=1, description="minibatch of one SGLD step, without replacement [sequences]")
    gradient: Literal["minibatch", "control_variate", "full"] = Field(
        "minibatch",
        description="of a step: of a minibatch; that less its own at the checkpoint plus the exact one there (two "
        "minibatches a step, far less noise); or of all training sequences",
    )
    extrapolate: bool = Field(
        False,
        description="sample everything once more at half the step size, which takes twice the steps, and report LLC, "
        "means of observables and chi at step size 0 too, with what the step makes them off by; weights stay those of "
        "the full step",
    )
    lanczos_steps: int = Field(
        0,
        ge=0,
        description="Hessian products on up to 64 training sequences, from which every chain takes the stiffest and "
        "the softest direction of its posterior, and its temperature along the stiff ones; 8 to 20 do, 0 for none "
        "[products]",
    )
    micro_batch_size: int = Field(16, ge=1, description="sequences of one forward pass in a study [sequences]")
    cache_gib: float = Field(
        1,
        ge=0,
        description="what does not move with a component is computed once and kept, up to so much [per chain worker]; "
        "beyond it passes are whole ones, at 0 all that are taken again and again [GiB]",
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of forward passes in a study, under autocast; sampled weights stay float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute layers again in backward passes instead of keeping what is inside them"
    )
    ranks_per_chain: int = Field(1, ge=1, description="processes that share one chain's model in a study [ranks]")
    probe_sequences: int = Field(64, ge=1, description="training sequences whose losses are recorded [sequences]")
    probe: Path | None = Field(None, description="Parquet token table to take the probe from; default: training data")
    evaluation_sequences: int = Field(
        256, ge=1, description="held-out sequences that the split losses are measured on [sequences]"
    )
    draws_per_push: int = Field(10, ge=1, description="draws a chain sends to the aggregator at once [draws]")
    num_batches: int = Field(8, ge=2, description="batch means per chain, for the standard errors [batches]")
    min_chains: int = Field(2, ge=1, description="healthy chains without which a component is an error [chains]")
    aggregator_shards: int = Field(1, ge=1, description="actors that the probe columns are shared out over [actors]")
    snapshot_seconds: float = Field(
        10, ge=0, description="between two checkpoints of a chain, and two snapshots of its statistics [s]"
    )
    max_chain_failures: int = Field(
        5, ge=0, description="workers that a chain may lose without getting further, before it is left out [workers]"
    )
    progress_timeout: float = Field(
        300,
        gt=0,
        description="of a chain, training, task, aggregator shard or board without progress, after which its process "
        "is killed and replaced; four times the longest pause so far where that is more, and three times as much for "
        "what is being loaded [s]",
    )
    workers: int | None = Field(None, ge=1, description="chain actors at once [actors]; default: CPU count")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of one actor [threads]")

    @property
    def cache_bytes(self) -> int:
        """``cache_gib`` in bytes."""
        return int(self.cache_gib * 2**30)

    @property
    def layout(self) -> dict[str, Any]:
        """What partly sampled chains are cut up by: they cannot be gone on with in another."""
        return self.model_dump(include={"draws_per_push", "aggregator_shards", "ranks_per_chain"})

    @property
    def observable_names(self) -> list[str]:
        """Names of the observables in order, one for each number measured at a draw."""
        measured = [o for o in self.observables if not isinstance(o, PosteriorQuantityConfig)]
        return [name for observable in measured for name in observable.observable_names]

    @property
    def split_functions(self) -> list[str]:
        """The splits that are functions of the user's own."""
        return [o.split for o in self.observables if isinstance(o, SplitLossConfig) and is_function(o.split)]

    @property
    def posterior_quantities(self) -> list[PosteriorQuantityConfig]:
        """The observables that follow from all draws of a chain together, in order."""
        return [o for o in self.observables if isinstance(o, PosteriorQuantityConfig)]

    @property
    def controlled(self) -> list[ControlledConfig]:
        """Those of them that are measured with a control, in order."""
        return [o for o in self.observables if isinstance(o, ControlledConfig)]

    def resolve(self, component: str, *, half_step: bool = False) -> ComponentSettings:
        """The settings of one component, with the section's own wherever it overrides nothing.

        With ``half_step``, at half the step size for as long.
        """
        config = next(entry for entry in self.components if entry.name == component)
        defaults = {key: getattr(self, key) for key in ComponentSettings.model_fields if key != "name"}
        settings = defaults | config.model_dump(exclude_none=True)
        if half_step:
            settings["step_size"] /= 2
            settings |= {key: 2 * settings[key] for key in ("burn_in", "steps_between_draws")}
        return ComponentSettings(**settings)
