"""The sections of a study: posterior chains on a model that exists already, of any architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from patterning_dist.config.calibration import CalibrationConfig, CheckpointName
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.schema import Device, RunPlace
from patterning_dist.config.section import Section

FunctionPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

FINAL = "final"


class HuggingFaceModelConfig(Section):
    kind: Literal["huggingface"] = Field(description="a causal language model of transformers")
    path: str = Field(min_length=1, description="folder of the model, or its name on the hub")
    checkpoints: list[CheckpointName] = Field(
        [FINAL],
        min_length=1,
        description="sub-folders of that folder, or revisions on the hub; final: the model itself",
    )


class ModuleModelConfig(Section):
    kind: Literal["module"] = Field(description="a torch module of the user's own")
    build: FunctionPath = Field(description="package.module:function, checkpoint name -> module at that checkpoint")
    per_sample_loss: FunctionPath = Field(
        description="package.module:function, (module, batch) -> losses [sample] or [sample, position] [nats]"
    )
    checkpoints: list[CheckpointName] = Field([FINAL], min_length=1, description="names that build is called with")


class TokensConfig(Section):
    kind: Literal["tokens"] = Field(description="tables of token ids, cut into blocks")
    train: str = Field(min_length=1, description="Parquet file or folder, or a dataset of datasets: the training data")
    held_out: dict[str, str] = Field({}, description="domain -> such a table, for split losses [path]")
    column: str = Field("input_ids", min_length=1, description="column that holds the token ids")
    context_length: int = Field(ge=2, description="length of one block, a sample [tokens]")


class FunctionDataConfig(Section):
    kind: Literal["function"] = Field(description="samples of the user's own")
    load: FunctionPath = Field(
        description="package.module:function, () -> (training samples, {domain: held-out samples})"
    )


class TracesConfig(Section):
    thin: int = Field(1, ge=1, description="every thin-th draw is kept [draws]")


class StudyConfig(Section):
    """Chains x checkpoints x components."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", description="name of the study, and of its directory")
    seed: int = Field(ge=0, lt=2**63, description="every random number of the study follows from it")
    device: Device = Field("auto", description="cpu, cuda, or auto: cuda if there is one")
    run_dir: RunPlace | None = Field(None, description="path or URL where the study is kept; default: runs/<name>")
    model: HuggingFaceModelConfig | ModuleModelConfig = Field(
        discriminator="kind", description="the model and its checkpoints"
    )
    data: TokensConfig | FunctionDataConfig = Field(
        discriminator="kind", description="training and held-out samples; what sampling calls a sequence is one of them"
    )
    sampling: SamplingConfig = Field(description="posterior chains around every checkpoint")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="settings that calibrate tries")
    traces: TracesConfig | None = Field(None, description="keep the probe losses of every draw; default: they are not")

    @property
    def run_directory(self) -> Path | str:
        return self.run_dir or Path("runs") / self.name
