"""The sections of the experiment file. What one section asks of another is checked in checks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from patterning_dist.config.calibration import CalibrationConfig
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.section import Section
from patterning_dist.storage.store import path_or_url

Device = Literal["cpu", "cuda", "auto"]
Arm = Literal["base", "plus", "minus", "permuted"]
RunPlace = Annotated[str, AfterValidator(path_or_url), PlainSerializer(str)]  # a Path, or a URL as it is


class SourceConfig(Section):
    path: Path = Field(description="text file, folder of text files, or Parquet file")
    domain: str | None = Field(
        None, min_length=1, description="what the text is, for domain splits; default: from the path"
    )
    text_column: str = Field("text", description="column of a Parquet file that holds the text")


class DataConfig(Section):
    sources: list[SourceConfig] = Field(min_length=1, description="where the text comes from")
    # Token ids are stored as 16-bit numbers; byte-level BPE starts from the 256 bytes.
    vocabulary_size: int = Field(1024, ge=257, le=65536, description="size of the BPE vocabulary [tokens]")
    context_length: int = Field(128, ge=8, description="length of one sequence [tokens]")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="share of the documents held out [1]")
    max_characters_per_domain: int | None = Field(None, ge=1, description="cap on one domain [characters]")
    max_train_sequences: int | None = Field(None, ge=1, description="cap on the training set [sequences]")


class ModelConfig(Section):
    num_layers: int = Field(2, ge=1, description="attention layers [layers]")
    num_heads: int = Field(4, ge=1, description="attention heads [heads per layer]")
    d_model: int = Field(64, ge=1, description="width of the residual stream [1]")
    d_head: int = Field(32, ge=1, description="width of one head [1]")
    embedding_std: float = Field(0.3, gt=0, description="standard deviation of the initial embedding [weight]")
    relative_position_bias: list[int] = Field(
        [0], description="layers with a learnable relative-position bias [layer numbers from 0]"
    )
    position_bias_init: float = Field(
        0, ge=0, description="initial bias of head h of those layers for the token h + 1 back [logits]"
    )


class TrainingConfig(Section):
    num_steps: int = Field(ge=1, description="length of the baseline run [optimizer steps]")
    batch_size: int = Field(ge=1, description="global batch over all ranks [sequences]")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="optimizer of the weight matrices")
    matrix_learning_rate: float = Field(0.04, gt=0, description="muon's or adamw's rate for the matrices")
    learning_rate: float = Field(0.01, gt=0, description="Adam's rate for embeddings and biases")
    bias_learning_rate_factor: float = Field(5, gt=0, description="rate of the biases over learning_rate [1]")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up [optimizer steps]")
    weight_decay: float = Field(0, ge=0, description="decoupled weight decay [1]")
    anneal_steps: int = Field(0, ge=0, description="steps to rate 0 before sampling [optimizer steps]")
    anneal_batch_size: int = Field(16, ge=1, description="global batch of the annealing [sequences]")
    evaluate_every: int = Field(100, ge=1, description="distance between metrics rows [optimizer steps]")
    evaluation_sequences: int = Field(256, ge=1, description="held-out sequences of a row [sequences]")
    deepspeed: Path | None = Field(None, description="DeepSpeed JSON; default: ZeRO stage 0")
    num_workers: int = Field(1, ge=1, description="data-parallel workers [ranks]")
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a rank [threads]")


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
    direction: DirectionConfig = Field(description="response-direction estimator over the training pool")
    num_modes: int = Field(4, ge=1, description="singular modes that are kept [modes]")


class SolveConfig(Section):
    scores: Literal["response_direction", "regression"] = Field(
        "response_direction", description="how susceptibilities reach every token of the pool"
    )
    component: str = Field(description="component whose susceptibilities are inverted")
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
    weight_min: float = Field(0, ge=0, lt=1, description="smallest sample weight rho [1]")
    weight_max: float = Field(4, gt=1, description="largest sample weight rho [1]")


class RetrainConfig(Section):
    arms: list[Arm] = Field(
        ["base", "plus", "minus", "permuted"], min_length=1, description="which sample weights to train with"
    )
    seeds: list[int] = Field(min_length=1, description="one retraining of every arm for each seed")
    num_steps: int = Field(ge=1, description="length of one retraining [optimizer steps]")
    evaluate_every: int = Field(100, ge=1, description="distance between metrics rows [optimizer steps]")
    start: Literal["initialisation", "baseline"] = Field(
        "initialisation", description="weights that a retraining starts from"
    )
    deepspeed: Path | None = Field(None, description="DeepSpeed JSON; default: ZeRO stage 0")
    num_workers: int = Field(1, ge=1, description="data-parallel workers of one arm [ranks]")
    concurrent_arms: int | None = Field(None, ge=1, description="retrainings at once; default: what fits [runs]")
    max_failures: int = Field(
        3, ge=0, description="restarts in a row of a training whose worker died, if it got no further [restarts]"
    )


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", description="name of the run, and of its directory")
    seed: int = Field(ge=0, lt=2**63, description="every random number of the run follows from it")
    device: Device = Field("auto", description="cpu, cuda, or auto: cuda if there is one")
    run_dir: RunPlace | None = Field(None, description="path or URL where the run is kept; default: runs/<name>")
    data: DataConfig = Field(description="the corpus and its tokens")
    model: ModelConfig = Field(ModelConfig(), description="the attention-only transformer")
    training: TrainingConfig = Field(description="the baseline run; its optimizer also retrains")
    sampling: SamplingConfig = Field(description="posterior chains around the baseline checkpoint")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="settings that calibrate tries")
    response: ResponseConfig = Field(description="susceptibilities from the chains")
    solve: SolveConfig = Field(description="sample weights from the susceptibilities")
    retrain: RetrainConfig = Field(description="training again on the weighted data")

    @property
    def run_directory(self) -> Path | str:
        return self.run_dir or Path("runs") / self.name
