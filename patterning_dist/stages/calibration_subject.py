"""Which set of chains is calibrated, and what its trials follow from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from patterning_dist.config import ComponentConfig, Config, SamplingConfig, StudyConfig
from patterning_dist.runtime.chains.workers import MakeStudy
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.model_study import ModelStudy
from patterning_dist.sampling.study import Study, open_study
from patterning_dist.stages.study import open_model_study
from patterning_dist.stages.study_inputs import unit_fingerprints
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

# What calibration chooses itself, or what does not bear on a trial.
_CHOSEN = {
    "num_chains": 1,
    "num_draws": 1,
    "burn_in": 0,
    "steps_between_draws": 1,
    "inverse_temperature": 1.0,
    "localization": 1.0,
    "step_size": 1.0,
    "num_batches": 2,
    "draws_per_push": 1,
    "min_chains": 1,
    "workers": None,
    "threads_per_worker": 1,
}


@dataclass(frozen=True)
class Subject:
    """The set of chains that is calibrated, of a run or of a study.

    Attributes:
        config: of the run or the study.
        study: opened in this process.
        make_study: opens it in a worker.
        unit: the study's name of the set of chains.
        component: that moves.
        num_units: sets of chains of the full run.
        takes_gradients: whether the full run takes gradients at every draw of this one.
        inputs: hash of all that a trial follows from besides its setting and its length.
    """

    config: Config | StudyConfig
    study: Study | ModelStudy
    make_study: MakeStudy
    unit: str
    component: str
    num_units: int
    takes_gradients: bool
    inputs: str


def run_subject(config: Config, run: RunDirectory, upstream: str) -> Subject:
    """The chains around the baseline checkpoint of a run; upstream: fingerprint of the stage that made it."""
    component = _component(config)
    bare = _without_chosen(config.sampling, component)
    return Subject(
        config=config,
        study=Study(config, run.path, resolve_device(config.device)),
        make_study=partial(open_study, config, run.place),
        unit=component,
        component=component,
        num_units=len(config.sampling.components),
        takes_gradients=component == config.response.direction.component,
        inputs=stage_fingerprint("calibrate", {"sampling": bare.model_dump(mode="json")}, [upstream]),
    )


def study_subject(config: StudyConfig, run: RunDirectory) -> Subject:
    """The chains at one checkpoint of a study.

    Raises:
        PatterningError: model or data are not there, or do not fit together.
    """
    device, component = resolve_device(config.device), _component(config)
    unit = f"{config.calibration.checkpoint or config.model.checkpoints[-1]}/{component}"
    study = ModelStudy(config, run.path, device)
    study.check()
    bare = config.model_copy(update={"sampling": _without_chosen(config.sampling, component), "traces": None})
    return Subject(
        config=config,
        study=study,
        make_study=partial(open_model_study, config, run.place),
        unit=unit,
        component=component,
        num_units=len(config.model.checkpoints) * len(config.sampling.components),
        takes_gradients=False,
        inputs=unit_fingerprints(ModelStudy(bare, run.path, device), run)[unit],
    )


def _component(config: Config | StudyConfig) -> str:
    return config.calibration.component or config.sampling.components[0].name


def _without_chosen(sampling: SamplingConfig, component: str) -> SamplingConfig:
    return sampling.model_copy(update=_CHOSEN | {"components": [ComponentConfig(name=component)]})
