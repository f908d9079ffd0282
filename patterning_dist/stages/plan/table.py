"""A plan: what every stage takes, in numbers, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from patterning_dist.response.cost import NOTHING, Seconds

# What a probe of seconds does not see: that the machine is slower or faster an hour later.
_DRIFT = 0.05


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        name: of the stage.
        what: counts in words.
        seconds: wall time; nothing where it is done already.
        processes, cores: at once, and CPU threads of each.
        on_device: whether each of them takes a GPU, if the run has any.
        process_bytes: memory of one of them.
        disk_bytes: that it adds to the run directory.
        is_done: by an earlier run.
        details: counts and parts of the memory.
    """

    name: str
    what: str
    seconds: Seconds = NOTHING
    processes: int = 1
    cores: int = 1
    on_device: bool = False
    process_bytes: int | None = None
    disk_bytes: int = 0
    is_done: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All stages, the memory of the aggregator, and what the cluster has.

    ``analysis`` is of a plan by arithmetic: layouts that were tried, draws for a wanted error; ``notes`` says it in
    words, with all that is assumed.
    """

    name: str
    device: str
    stages: list[StagePlan]
    aggregator_bytes: int
    aggregator_shards: int
    cluster: dict[str, float]
    probe_seconds: float
    notes: list[str] = field(default_factory=list)
    analysis: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> Seconds:
        """Of all that is still to be done."""
        total = NOTHING
        for stage in self.stages:
            total += stage.seconds
        return Seconds(total.value, total.low * (1 - _DRIFT), total.high * (1 + _DRIFT))

    @property
    def device_hours(self) -> float:
        """CPU-hours of the cores in use, or GPU-hours where there are GPUs."""
        return (
            sum(
                stage.seconds.value * stage.processes * (1 if self.device == "cuda" else stage.cores)
                for stage in self.stages
                if self.device != "cuda" or stage.on_device
            )
            / 3600
        )

    @property
    def disk_bytes(self) -> int:
        """That the run directory still grows by."""
        return sum(stage.disk_bytes for stage in self.stages if not stage.is_done)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the totals."""
        totals = {"seconds": asdict(self.seconds), "disk_bytes": self.disk_bytes, self._hours: self.device_hours}
        return asdict(self) | {"total": totals}

    def render(self) -> Group:
        """The table, and lines for what is not of one stage."""
        table = Table(
            Column("stage", no_wrap=True), Column("min:s (from, to)", no_wrap=True), Column("processes", no_wrap=True),
            Column("each", justify="right", no_wrap=True), Column("disk", justify="right", no_wrap=True), "what",
            box=None, pad_edge=False,
        )  # fmt: skip
        for stage in self.stages:
            if stage.is_done:
                table.add_row(stage.name, "0:00", "", "", "", "done")
                continue
            memory = "" if stage.process_bytes is None else size(stage.process_bytes)
            each = "1 GPU" if stage.on_device and self.device == "cuda" else f"{stage.cores} CPU"
            processes = f"{stage.processes} x {each}" if stage.process_bytes else ""
            table.add_row(stage.name, span(stage.seconds), processes, memory, size(stage.disk_bytes), Text(stage.what))
        lines = [
            f"aggregator: {size(self.aggregator_bytes)} of statistics over {self.aggregator_shards} actors",
            *(self._memory(stage) for stage in self.stages if stage.details.get("weight_bytes")),
            f"the cluster: {self.cluster['nodes']:g} nodes, {self.cluster['CPU']:g} CPUs, {self.cluster['GPU']:g} GPUs"
            if self.cluster
            else "the cluster: not asked, nothing to be done needs it",
            f"{'by arithmetic' if self.analysis else 'measured'} in {self.probe_seconds:.0f} s",
            *self.notes,
        ]
        summary = [Text(self.summary, style="bold")] if self.stages else []
        return Group(*([table] if self.stages else []), *(Text(line) for line in lines), *summary)

    @property
    def summary(self) -> str:
        """One line: time with its interval, hours, disk."""
        low, high = duration(self.seconds.low), duration(self.seconds.high)
        hours = f"{self.device_hours:.2g} {self._hours.replace('_', '-').upper().replace('HOURS', 'hours')}"
        return f"total: about {duration(self.seconds.value)} ({low} to {high}), {hours}, {size(self.disk_bytes)}"

    @property
    def _hours(self) -> str:
        return "gpu_hours" if self.device == "cuda" else "cpu_hours"

    @staticmethod
    def _memory(stage: StagePlan) -> str:
        parts = {
            name: stage.details[key]
            for name, key in (
                ("weights", "weight_bytes"), ("gradients", "gradient_bytes"), ("optimizer", "optimizer_bytes"),
                ("sampler", "state_bytes"), ("activations", "activation_bytes"),
            )
            if key in stage.details
        }  # fmt: skip
        return f"{stage.name}: a rank holds {', '.join(f'{name} {size(amount)}' for name, amount in parts.items())}"


def in_order(stages: Sequence[str], found: Mapping[str, StagePlan]) -> list[StagePlan]:
    """Plans of stages, that of starting Ray before all; one that is missing is named."""
    plans = [found.get(stage) or StagePlan(stage, "not measured") for stage in stages]
    return [found["start"], *plans] if "start" in found else plans


def duration(seconds: float) -> str:
    """8 min 40 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def span(seconds: Seconds) -> str:
    """1:21 (1:10, 1:35)."""

    def clock(value: float) -> str:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}:{rest:02}"

    return f"{clock(seconds.value)} ({clock(seconds.low)}, {clock(seconds.high)})"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
