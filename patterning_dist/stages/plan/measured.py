"""Times and memory by a probe of the real pieces, on the machine or the cluster that there is."""

from __future__ import annotations

from dataclasses import dataclass

from patterning_dist.config import Config, DirectionConfig
from patterning_dist.config.window import without_window
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.cost import ChainCounts
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.runtime.probe.chains import probe_chains
from patterning_dist.runtime.resources import nodes
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.plan.sampling import Chains, count_chains, representatives
from patterning_dist.stages.plan.table import Plan, StagePlan, in_order
from patterning_dist.stages.plan.training import Trainings, Trial, probe_trainings
from patterning_dist.stages.sample import open_subjects, solved_subjects
from patterning_dist.stages.windows import plain_subject, window_of
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.walk import Window


@dataclass(frozen=True)
class Timed:
    """Sets of chains, and which of them stand for all.

    Attributes:
        subjects: opened in this process.
        counts: subject -> what its chains do.
        standing_for: subject -> the one whose times stand for it.
        solved: the subject of section solve; empty without one.
    """

    subjects: Subjects
    counts: dict[str, ChainCounts]
    standing_for: dict[str, str]
    solved: str

    @classmethod
    def of(cls, config: Config, opener: OpenSubjects) -> Timed:
        """Of an experiment."""
        subjects: Subjects = opener("cpu", Ranks())
        components = {name: subject.component for name, subject in subjects.by_name.items()}
        standing_for = representatives(subjects.task.skeleton(), components, subjects.gradients_of)
        solved = solved_subjects(config, subjects.by_name)[0] if config.solve else ""
        return cls(subjects, count_chains(subjects), standing_for, solved)

    def wanted(self, pending: set[str]) -> dict[str, bool]:
        """Subjects whose pieces pending stages ask for, and whether they take gradients at every draw."""
        names = set(self.standing_for.values()) if pending & {"sample", "validate"} else set[str]()
        if self.solved and pending & {"solve", "check"}:
            names.add(self.standing_for[self.solved])
        return {name: name in self.subjects.gradients_of for name in self.standing_for if name in names}

    @property
    def num_chains(self) -> int:
        """Of all subjects."""
        return sum(subject.num_chains for subject in self.counts.values())


class Measured:
    """Probes on Ray.

    Args:
        config: of the run.
        workspace: a run directory to be written to.

    Attributes:
        config: of the run.
    """

    has_times = True
    unfit: frozenset[str] = frozenset()

    def __init__(self, config: Config, workspace: RunDirectory) -> None:
        self.config, self.workspace, self.device = config, workspace, resolve_device(config.device)
        self.on_cluster = False

    def trainings(self, trial: Trial) -> Trainings:
        """What trainings like a trial's take."""
        return probe_trainings(self.config, self.workspace, self.device, trial)

    def chains(self, pending: set[str]) -> Chains:
        """Time what stands for all sets of chains, and what pending stages ask of them."""
        config, opener = self.config, open_subjects(self.config, self.workspace.location, self.device)
        timed = Timed.of(config, opener)
        direction = solved_direction(config)
        probe = probe_chains(
            opener,
            timed.subjects.sampling,
            self.device,
            timed.wanted(pending),
            timed.num_chains,
            (timed.solved, direction) if direction is not None and "solve" in pending else None,
            walked(config) if pending & {"solve", "predict"} else None,
        )
        return Chains(config, timed.subjects, timed.counts, timed.standing_for, probe)

    def plan(self, stages: list[str], found: dict[str, StagePlan], statistics: int, seconds: float) -> Plan:
        """All of it, with what the cluster has."""
        there = nodes() if self.on_cluster else []
        cluster = {kind: sum(node.total.get(kind, 0) for node in there) for kind in ("CPU", "GPU")} | {
            "nodes": len(there)
        }
        shards = self.config.sampling.aggregator_shards
        return Plan(
            self.config.name,
            self.device,
            in_order(stages, found),
            statistics,
            shards,
            cluster if there else {},
            seconds,
        )


def solved_direction(config: Config) -> DirectionConfig | None:
    """The response-direction estimator, where stage solve takes it."""
    return config.response.direction if config.solve and config.solve.scores == "response_direction" else None


def walked(config: Config) -> tuple[Subject, Window] | None:
    """A subject whose window is walked, by stage predict or for ``solve.max_cost``; None: no arm has one."""
    arms = config.retrain.arm_list if config.retrain is not None and config.predict is not None else []
    lead = next((a for a in arms if a.weights is not None and without_window(config, a) is None), None)
    return None if lead is None else (plain_subject(config, lead)[1], window_of(config, lead))
