"""The experiment file as a whole. What one section asks of another is checked in checks.py."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from patterning_dist.config.calibration import CalibrationConfig
from patterning_dist.config.component_names import with_canonical_names
from patterning_dist.config.data import DataConfig
from patterning_dist.config.model import AttentionOnlyConfig, ModelConfig
from patterning_dist.config.response import CheckConfig, PredictConfig, ResponseConfig, SolveConfig
from patterning_dist.config.root import Root
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.config.section import Section
from patterning_dist.config.training import MAX_FAILURES, RetrainConfig, TrainingConfig
from patterning_dist.config.validation import ValidationConfig

BASELINE = "baseline"  # the checkpoint that stage train makes


class TracesConfig(Section):
    thin: int = Field(1, ge=1, description="every thin-th draw is kept [draws]")


class Config(Root):
    """The loop: checkpoint -> chains -> chi -> weights -> check -> weighted retraining -> report.

    ``sampling`` is all that it needs besides model and data; stages whose section is missing are left out.
    """

    data: DataConfig | None = Field(None, description="training and held-out samples; a task of your own has them")
    model: ModelConfig = Field(AttentionOnlyConfig(), description="the model, and its checkpoints if there are some")
    training: TrainingConfig | None = Field(
        None, description="the baseline run where no checkpoint is given; its optimizer also retrains"
    )
    sampling: SamplingConfig = Field(description="posterior chains around every checkpoint")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="settings that calibrate tries")
    traces: TracesConfig | None = Field(None, description="keep the probe losses of every draw; default: they are not")
    response: ResponseConfig = Field(ResponseConfig(), description="susceptibilities from the chains")
    solve: SolveConfig | None = Field(None, description="sample weights from the susceptibilities")
    check: CheckConfig | None = Field(None, description="the response under weights, measured by coupled chains")
    predict: PredictConfig | None = Field(None, description="what the arms will come to, before they are trained")
    retrain: RetrainConfig | None = Field(None, description="training again on the weighted data")
    validation: ValidationConfig | None = Field(None, description="LDS and QLD of attribution scores, by retrainings")

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, raw: Any) -> Any:
        """A model without a kind is the attention-only transformer, data without one is text; components by our names.

        Modules and tasks of the user's own have names of their own.
        """
        if isinstance(raw, dict):
            for section, kind in (("model", "attention_only"), ("data", "text")):
                if isinstance(raw.get(section), dict) and "kind" not in raw[section]:
                    raw = raw | {section: {"kind": kind} | raw[section]}
            model = raw.get("model")
            if not isinstance(model, dict) or model["kind"] in ("attention_only", "huggingface"):
                raw = with_canonical_names(raw)
        return raw

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that are sampled around."""
        return self.model.given_checkpoints or [BASELINE]

    @property
    def max_training_failures(self) -> int:
        """Restarts in a row of a training that gets no further, the baseline's included."""
        return MAX_FAILURES if self.retrain is None else self.retrain.max_failures
