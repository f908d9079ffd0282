"""Stage ``sample``: chains around every reference -> LLC, and the responses of LLC and free energy to every string."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.stages.references import read_references
from patterning_dist.experiments.two_rules.stages.weighting import PLAIN
from patterning_dist.experiments.two_rules.task import COMPONENT, BracketTask
from patterning_dist.measure.measure import Measured, measure, write_summaries
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.measure.subject import Subject
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.storage.run import RunDirectory


def sample(config: ParenthesesConfig, run: RunDirectory, progress: Progress) -> list[Path]:
    """Sample around every reference under plain weights; returns the files written."""
    subjects = {
        f"{reference.rule}-{number}": subject(config, number, "baseline", reference.index)
        for number, reference in enumerate(read_references(run.path / "baseline"))
    }
    measured = sample_subjects(config, run, "sample", subjects, progress)
    return [*measured.files, *write_summaries(run, config.name, measured, num_modes=1)]


def subject(
    config: ParenthesesConfig, number: int, folder: str, index: int, weights: str = PLAIN, strength: float = 1.0
) -> Subject:
    """The chains around a network.

    Args:
        config: of the run.
        number: chains of subjects of different numbers share neither noise nor minibatches; of the same, both.
        folder: of the stacked networks, relative to the run directory.
        index: of the network in there.
        weights: table of rho, likewise.
        strength: on the line from plain weights to those.
    """
    mixed = np.random.SeedSequence([config.seed, number]).generate_state(1, np.uint64)[0]
    seed = int(mixed >> np.uint64(1))
    return Subject(f"{folder}:{index}", COMPONENT, stream=COMPONENT, weights=weights, strength=strength, seed=seed)


def sample_subjects(
    config: ParenthesesConfig,
    run: RunDirectory,
    stage: str,
    subjects: Mapping[str, Subject],
    progress: Progress,
    *,
    under_weights: bool = False,
) -> Measured:
    """Run the chains of every subject on Ray actors; what they record are rho_i l_i, rho of plain training.

    Under other weights there are no rows of LLC and free energy, see ``OpenSubjects.weighted``.

    Raises:
        PatterningError: a subject has fewer healthy chains than sampling.min_chains.
    """
    num_strings = config.task.num_balanced + config.task.num_unequal
    networks = {f"{s.checkpoint.partition(':')[0]}/networks.safetensors" for s in subjects.values()}
    opener = OpenSubjects(
        partial(BracketTask, config),
        run.location,
        ("data", *sorted({*networks, *(s.weights for s in subjects.values() if s.weights)})),
        config.sampling.model_copy(update={"probe_sequences": num_strings}),
        config.seed,
        dict(subjects),
    )
    opener = opener.weighted(opener.by_name) if under_weights else opener
    return measure(run, config.name, stage, opener, resolve_device(config.device), progress)
