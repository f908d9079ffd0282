"""The section on the model: one that this run trains, or one that exists already, with its checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from patterning_dist.config.checkpoints import FINAL, CheckpointGlob
from patterning_dist.config.section import Section

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

_CHECKPOINTS = (
    "sub-folders of that folder, or revisions on the hub; final: the model itself; a glob (step*) stands for all that "
    "match, in the order of the training"
)


class AttentionOnlyConfig(Section):
    """Trained by stage train."""

    kind: Literal["attention_only"] = Field("attention_only", description="the attention-only transformer")
    num_layers: int = Field(2, ge=1, le=1000, description="attention layers [layers]")
    num_heads: int = Field(4, ge=1, le=1000, description="attention heads [heads per layer]")
    d_model: int = Field(64, ge=1, le=2**16, description="width of the residual stream [1]")
    d_head: int = Field(32, ge=1, le=2**16, description="width of one head [1]")
    embedding_std: float = Field(0.3, gt=0, description="standard deviation of the initial embedding [weight]")
    relative_position_bias: list[int] = Field(
        [0], description="layers with a learnable relative-position bias [layer numbers from 0]"
    )
    position_bias_init: float = Field(
        0, ge=0, description="initial bias of head h of those layers for the token h + 1 back [logits]"
    )

    @property
    def given_checkpoints(self) -> list[str]:
        """Checkpoints that exist before the run."""
        return []


class HuggingFaceConfig(Section):
    """With ``path`` it exists; with ``architecture`` stage train makes it from a fresh initialisation."""

    kind: Literal["huggingface"] = Field(description="a model of transformers")
    path: str | None = Field(None, min_length=1, description="folder of the model, or its name on the hub")
    checkpoints: list[CheckpointGlob] = Field([FINAL], min_length=1, description=_CHECKPOINTS)
    architecture: dict[str, Any] | None = Field(
        None,
        description="config.json of a model to be trained here: model_type and sizes; vocabulary and positions follow "
        "from the data",
    )
    attention: Literal["eager", "sdpa"] = Field(
        "eager",
        description="kernel of attention; sdpa is fused: less memory and time in long contexts, equal but for rounding",
    )

    @property
    def given_checkpoints(self) -> list[str]:
        """Checkpoints that exist before the run."""
        return [] if self.path is None else self.checkpoints


class ModuleConfig(Section):
    """A torch module of the user's own; without ``checkpoints`` stage train makes one from ``initialise``."""

    kind: Literal["module"] = Field(description="a torch module of the user's own")
    build: FunctionPath | None = Field(
        None, description="package.module:function, checkpoint name -> module at that checkpoint"
    )
    initialise: FunctionPath | None = Field(
        None, description="package.module:function, seed -> module with fresh weights, for trainings from there"
    )
    per_sample_loss: FunctionPath = Field(
        description="package.module:function, (module, batch) -> losses [sample] or [sample, position] [nats]"
    )
    evaluate: FunctionPath | None = Field(
        None, description="package.module:function, module -> {name: number}, metrics of a training"
    )
    checkpoints: list[CheckpointGlob] = Field([FINAL], min_length=1, description="names that build is called with")

    @property
    def given_checkpoints(self) -> list[str]:
        """Checkpoints that exist before the run."""
        return [] if self.build is None else self.checkpoints


class TaskConfig(Section):
    """A ``tasks.task.Task`` of the user's own, which brings model, data and losses."""

    kind: Literal["task"] = Field(description="a task of the user's own; there is no section data")
    open: FunctionPath = Field(
        description="package.module:function, (experiment, run directory, device) -> Task, in every process"
    )
    checkpoints: list[CheckpointGlob] = Field([], description="names that its load knows before the run")

    @property
    def given_checkpoints(self) -> list[str]:
        """Checkpoints that exist before the run."""
        return self.checkpoints


ModelConfig = Annotated[
    AttentionOnlyConfig | HuggingFaceConfig | ModuleConfig | TaskConfig, Field(discriminator="kind")
]
