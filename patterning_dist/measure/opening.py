"""What opens the subjects of an experiment in the process that is to hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patterning_dist.config.sampling import PosteriorQuantityConfig, SamplingConfig
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.mirror import Location
from patterning_dist.tasks.held_out import HeldOutPart
from patterning_dist.tasks.task import Task


@dataclass(frozen=True)
class OpenSubjects:
    """How to open ``Subjects`` in a worker, wherever the run is kept; goes to other processes.

    Attributes:
        open_task: (run directory, device) -> task.
        location: of the run.
        files: names there that tasks and chains read.
        sampling, seed, by_name, gradients_of, positions_of, thin, part: see ``Subjects``.
    """

    open_task: Callable[[Path, str], Task]
    location: Location
    files: tuple[str, ...]
    sampling: SamplingConfig
    seed: int
    by_name: dict[str, Subject]
    gradients_of: frozenset[str] = frozenset()
    positions_of: dict[str, int] = field(default_factory=dict)
    thin: int | None = None
    part: HeldOutPart = "observed"

    def weighted(self, by_name: dict[str, Subject], *files: str, **changes: Any) -> OpenSubjects:
        """Subjects under weights, whose tables and checkpoints ``files`` name; ``changes`` replace other fields.

        Rows of LLC and free energy are left out: they are responses of the plain posterior.
        """
        measured = [o for o in self.sampling.observables if not isinstance(o, PosteriorQuantityConfig)]
        sampling = self.sampling.model_copy(update={"observables": measured})
        return replace(self, by_name=by_name, files=(*self.files, *files), sampling=sampling, thin=None, **changes)

    def __call__(self, device: str, ranks: Ranks) -> Subjects:
        """In the process that is to hold them."""
        directory = self.location.fetch(*self.files)
        return Subjects(
            self.open_task(directory, device),
            self.sampling,
            self.seed,
            directory,
            self.by_name,
            gradients_of=self.gradients_of,
            positions_of=self.positions_of,
            thin=self.thin,
            part=self.part,
            device=device,
            ranks=ranks,
        )
