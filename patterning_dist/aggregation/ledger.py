"""What one aggregator shard holds of the chains of one subject: co-moments of its probe columns, and their marks.

Plain Python, so that the aggregator actor and a study without Ray are the same arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from patterning_dist.aggregation.protocol import Answer, Incarnation, Mark, PushId, Verdict
from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import CoMoments, healthy_chains
from patterning_dist.storage.snapshots import Snapshots, pack, unpack
from patterning_dist.storage.store import Storage


@dataclass
class ChainRecord:
    """One chain: how it ended, how long it took, and how hot it was.

    ``seconds`` is the chain's own wall time, of its last attempt; ``reason`` says why an unhealthy chain is left out.
    ``temperatures``, ``step_biases`` (nats) and ``stiff_temperatures`` are means over consecutive blocks of the steps
    after burn-in, see ``Chain.temperatures``; empty of chains that failed. ``spectrum``: the numbers of
    ``SpectrumEnds``, where taken.
    """

    chain: int
    healthy: bool = True
    reason: str = ""
    draws: int = 0
    steps: int = 0
    seconds: float = 0.0
    temperatures: list[float] = field(default_factory=list)
    step_biases: list[float] = field(default_factory=list)
    stiff_temperatures: list[float] = field(default_factory=list)
    spectrum: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class LedgerPlan:
    """What all shards know of a subject, a set of chains on one component.

    Attributes:
        run: identity of the statistics: changes with whatever they follow from.
        observables: names, in the order of the pushes.
        num_columns: probe columns of all shards together (losses, then means of samples).
        num_draws: planned draws of a chain.
        num_batches: batches of consecutive draws, for batch means.
        num_chains: planned chains.
    """

    run: str
    observables: tuple[str, ...]
    num_columns: int
    num_draws: int
    num_batches: int
    num_chains: int

    def columns(self, shard: int, num_shards: int) -> slice:
        """The probe columns of a shard: contiguous, sizes differ by one at most."""
        return slice(self.num_columns * shard // num_shards, self.num_columns * (shard + 1) // num_shards)


@dataclass
class _Chain:
    moments: CoMoments
    mark: Mark
    center_losses: np.ndarray  # of the shard's columns and of their mean L, at w*
    traces: list[np.ndarray] = field(default_factory=list)  # each [draw, 1 + observable]; of the first shard only
    record: ChainRecord | None = None  # once the chain is closed


@dataclass(frozen=True)
class Part:
    """What a shard knows of a subject whose chains are all through.

    Attributes:
        shard, num_shards: which of how many.
        columns: of all probe columns, which are here.
        chains: co-moments of the healthy chains; the last column is the mean loss L.
        excluded: chain -> why it is left out.
        center_losses: l_i(w*) of the columns and of L [column], nats.
    """

    shard: int
    num_shards: int
    columns: slice
    chains: list[CoMoments]
    excluded: dict[int, str]
    center_losses: np.ndarray

    @property
    def loss_weights(self) -> np.ndarray:
        """L among these columns, for ``susceptibility``: the last one, and nothing else."""
        weights = np.zeros(self.columns.stop - self.columns.start + 1)
        weights[-1] = 1
        return weights


class Ledger:
    """Statistics of all chains of one subject on one shard.

    Memory is O(chains * batches * observables * columns of the shard). Chains are read from their snapshots when they
    are first asked for. The mean loss L over all columns is kept as a further column, so that every shard can take
    l_i - L by itself.

    Args:
        plan: of the subject.
        shard, num_shards: which of how many.
        storage: of the run.
        subject: name, and folder under sampling/.
        damaged: hears of damaged snapshots.
    """

    def __init__(
        self,
        plan: LedgerPlan,
        shard: int,
        num_shards: int,
        storage: Storage,
        subject: str,
        damaged: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.plan, self.shard, self.num_shards = plan, shard, num_shards
        self.columns = plan.columns(shard, num_shards)
        folder = f"sampling/{subject}/shard-{shard}"
        self.snapshots = [Snapshots(storage, folder, f"chain-{n}", damaged) for n in range(plan.num_chains)]
        self._chains: dict[int, _Chain] = {}

    def open(
        self, push: PushId, center_losses: np.ndarray | None = None, *, restart: bool = False
    ) -> tuple[Answer, ChainRecord | None]:
        """Where a chain stands, and how it ended if it has; earlier incarnations are shut out.

        Args:
            push: run, chain and incarnation; the sequence number does not matter.
            center_losses: [column + 1] l_i(w*) of this shard's columns and L(w*), nats.
            restart: forget what earlier incarnations pushed; once an incarnation, however often it asks.
        """
        entry = self._entry(push.chain)
        restart = restart and push.incarnation > entry.mark.incarnation
        if not entry.mark.fence(push.run, push.incarnation):
            return self._answer(entry, Verdict.ZOMBIE), None
        if restart:
            self.snapshots[push.chain].delete()
            entry = self._chains[push.chain] = self._empty(push.chain)
            entry.mark.begin_anew(push.incarnation)
        if center_losses is not None:
            entry.center_losses = np.asarray(center_losses, np.float64)
        return self._answer(entry, Verdict.DUPLICATE), entry.record

    def push(
        self,
        push: PushId,
        previous: bytes,
        digest: bytes,
        observables: np.ndarray,
        losses: np.ndarray,
        mean_losses: np.ndarray,
    ) -> Answer:
        """Take in consecutive draws, once.

        Args:
            push, previous, digest: see ``Mark.judge``.
            observables: [draw, observable] deviations from the centre.
            losses: [draw, column] deviations from the centre, of this shard's columns, nats.
            mean_losses: [draw] L(w) - L(w*), nats.
        """
        entry = self._entry(push.chain)
        verdict = entry.mark.judge(push, previous, digest)
        if verdict is Verdict.APPLIED:
            mean_losses = np.asarray(mean_losses, np.float64)[:, None]
            try:
                entry.moments.update(observables, np.concatenate([losses, mean_losses], axis=1))
            except BaseException:
                entry.mark.digests.pop()  # it was not taken in after all
                raise
            if self.shard == 0:
                entry.traces.append(np.concatenate([mean_losses, observables], axis=1))
        return self._answer(entry, verdict)

    def close(self, push: PushId, last: bytes, record: ChainRecord) -> Answer:
        """Note how a chain ended, durably.

        Args:
            push: the one that would come next; all before it must be here, unless the chain failed.
            last: digest of the last push.
            record: of the chain.
        """
        entry = self._entry(push.chain)
        if record.healthy:
            verdict = entry.mark.judge_end(push, last)
        else:
            verdict = Verdict.APPLIED if entry.mark.fence(push.run, push.incarnation) else Verdict.ZOMBIE
        if verdict is Verdict.APPLIED:
            entry.record = replace(record, draws=entry.moments.num_recorded)
            self.snapshot(push.chain)
        return self._answer(entry, verdict)

    def snapshot(self, chain: int) -> int:
        """Write statistics and mark of a chain in one file, then delete the one before; returns bytes written."""
        entry = self._chains[chain]
        header = {
            "run": entry.mark.run,
            "incarnation": entry.mark.incarnation,
            "digests": [digest.hex() for digest in entry.mark.digests],
            "record": entry.record and asdict(entry.record),
        }
        arrays = {f"moments/{name}": value for name, value in entry.moments.state_dict().items()}
        arrays["traces"] = self.traces(chain)
        arrays["center_losses"] = entry.center_losses
        content = pack(arrays | {"header": np.array(json.dumps(header))})
        mark = len(entry.mark.digests)
        self.snapshots[chain].write(mark, content)
        self.snapshots[chain].delete(below=mark)
        entry.mark.durable = mark
        return len(content)

    def traces(self, chain: int) -> np.ndarray:
        """Mean loss and observables of a chain's draws [draw, 1 + observable]; empty on all shards but the first."""
        entry = self._entry(chain)
        return np.concatenate([*entry.traces, np.zeros((0, 1 + len(self.plan.observables)))])

    def volatile(self) -> list[int]:
        """Chains whose newest pushes are in no snapshot."""
        return [n for n, entry in self._chains.items() if len(entry.mark.digests) > entry.mark.durable]

    def records(self) -> list[ChainRecord | None]:
        """How every planned chain ended; None: not yet."""
        return [self._entry(chain).record for chain in range(self.plan.num_chains)]

    def part(self) -> Part:
        """The finished statistics of this shard.

        What a chain says of itself is checked: one that lacks draws, or whose moments are not finite, is left out.

        Raises:
            PatterningError: a chain is not through.
        """
        if unfinished := [chain for chain, record in enumerate(self.records()) if record is None]:
            raise PatterningError(f"chains {unfinished} are not through; run them first")
        records = [record for record in self.records() if record is not None]
        claimed = [self._chains[record.chain].moments for record in records if record.healthy]
        healthy, excluded = healthy_chains(claimed)
        excluded = {r.chain: r.reason for r in records if not r.healthy} | excluded
        center = self._chains[healthy[0].chain if healthy else 0].center_losses
        return Part(self.shard, self.num_shards, self.columns, healthy, excluded, center)

    def _answer(self, entry: _Chain, verdict: Verdict) -> Answer:
        return Answer(verdict, len(entry.mark.digests), entry.mark.durable)

    def _empty(self, chain: int) -> _Chain:
        plan, width = self.plan, self.columns.stop - self.columns.start + 1
        moments = CoMoments.empty(chain, plan.num_draws, len(plan.observables), width, plan.num_batches)
        return _Chain(moments, Mark(plan.run), np.zeros(width))

    def _entry(self, chain: int) -> _Chain:
        if chain not in self._chains:
            stored = self.snapshots[chain].newest()
            entry = self._empty(chain) if stored is None else _restored(unpack(stored[1]))
            if entry.mark.run != self.plan.run:  # of other inputs; its numbers must not outlive those to come
                self.snapshots[chain].delete()
                entry = self._empty(chain)
            self._chains[chain] = entry
        return self._chains[chain]


def stored_moments(arrays: dict[str, np.ndarray]) -> CoMoments:
    """The co-moments in a snapshot."""
    prefix = "moments/"
    return CoMoments.from_state_dict({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)})


def _restored(arrays: dict[str, np.ndarray]) -> _Chain:
    header = json.loads(str(arrays["header"]))
    digests = [bytes.fromhex(digest) for digest in header["digests"]]
    mark = Mark(header["run"], Incarnation(*header["incarnation"]), digests, durable=len(digests))
    record = header["record"] and ChainRecord(**header["record"])
    return _Chain(stored_moments(arrays), mark, arrays["center_losses"], [arrays["traces"]], record)
