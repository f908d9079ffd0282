"""Which set of chains is calibrated, and what its trials follow from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from patterning_dist.config import ComponentConfig, Config
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.measure.plans import subject_plans
from patterning_dist.measure.subjects import Subjects
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.sample import open_subjects, subject_name
from patterning_dist.storage.files import FileHashes
from patterning_dist.storage.run import RunDirectory

# What calibration chooses itself, or what does not bear on a trial.
_CHOSEN: dict[str, Any] = {
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
class Calibrated:
    """The set of chains that is calibrated.

    Attributes:
        config: of the run.
        opener: opens it in a worker.
        subjects: opened in this process.
        name: of the set of chains.
        component: that moves.
        num_sets: sets of chains of the full run.
        inputs: hash of all that a trial follows from besides its setting and its length.
    """

    config: Config
    opener: OpenSubjects
    subjects: Subjects
    name: str
    component: str
    num_sets: int
    inputs: str

    @property
    def takes_gradients(self) -> bool:
        """Whether the full run takes gradients at every draw of it."""
        return self.name in self.opener.gradients_of


def calibrated_subject(config: Config, run: RunDirectory) -> Calibrated:
    """The chains at one checkpoint, on one component.

    Raises:
        PatterningError: model or data are not there, or do not fit together.
    """
    device = resolve_device(config.device)
    opener = open_subjects(config, run.location, device)
    component = config.calibration.component or opener.sampling.components[0].name
    name = subject_name(config.calibration.checkpoint or config.checkpoints[-1], component)
    sampling = opener.sampling.model_copy(update=_CHOSEN | {"components": [ComponentConfig(name=component)]})
    bare = replace(opener, sampling=sampling, by_name={name: opener.by_name[name]}, thin=None)
    hashes = FileHashes(run.manifest.get("hashes", {}))
    inputs = subject_plans(bare(device, Ranks()), run, sha256=hashes)[name].fingerprint
    return Calibrated(config, opener, opener(device, Ranks()), name, component, len(opener.by_name), inputs)
