"""A chain's side of the push protocol over Ray: blocks of draws go to all aggregator shards, answers come back."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import ray

from patterning_dist.aggregation.ledger import ChainRecord, LedgerPlan
from patterning_dist.aggregation.protocol import Answer, Incarnation, PushId, Sender, Verdict
from patterning_dist.heartbeat import beat
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.chains.aggregator import answer_of, awaited
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.storage.store import Storage

WINDOW = 2  # pushes that may be unacknowledged: a slow aggregator slows the chain down instead of filling memory
# From the answer that asks least of a chain to the one that asks most.
_SEVERITY = (Verdict.APPLIED, Verdict.DUPLICATE, Verdict.GAP, Verdict.CONFLICT, Verdict.ZOMBIE)


@dataclass(frozen=True)
class ChainTask:
    """One attempt at one chain.

    Attributes:
        run: name of the run, for metrics.
        subject: the set of chains that the chain is one of.
        number: of the chain.
        incarnation: of this attempt.
        restart: what earlier attempts left is dropped.
        plan: of the subject.
        storage: of the run; takes the chain's checkpoints.
        draws_per_push: draws sent at once.
        snapshot_seconds: between two checkpoints, at least.
    """

    run: str
    subject: str
    number: int
    incarnation: Incarnation
    restart: bool
    plan: LedgerPlan
    storage: Storage
    draws_per_push: int
    snapshot_seconds: float

    @property
    def key(self) -> str:
        """What messages and the progress display call the chain."""
        return f"{self.subject} chain {self.number}"

    @property
    def num_pushes(self) -> int:
        """Pushes of the whole chain."""
        return -(-self.plan.num_draws // self.draws_per_push)


class Block(NamedTuple):
    """Consecutive draws, as they are pushed; digests as in ``Mark.judge``, arrays as in ``Ledger.push``."""

    previous: bytes
    digest: bytes
    observables: np.ndarray
    losses: np.ndarray
    mean_losses: np.ndarray


class ShardClient:
    """What rank 0 of a chain knows of the shards.

    Args:
        task: names the pushes.
        shards: actors, in the order of their columns.
    """

    def __init__(self, task: ChainTask, shards: list[ActorHandle]) -> None:
        self.task, self.shards = task, shards
        self.sender = Sender(len(shards))
        self.stop = False  # a shard said that the run is being stopped
        self.metrics = Metrics(run=task.run, subject=task.subject, chain=task.number)
        self._columns = [task.plan.columns(shard, len(shards)) for shard in range(len(shards))]
        self._in_flight: deque[tuple[float, list[ray.ObjectRef]]] = deque()

    def open(self, center_losses: np.ndarray | None, center_mean: float, restart: bool) -> tuple[Verdict, list]:
        """Ask all shards where the chain stands, waiting for those that are being restarted; records, where closed."""
        worst, records = Verdict.APPLIED, []
        for number, columns in enumerate(self._columns):
            center = None if center_losses is None else np.append(center_losses[columns], center_mean)
            answer, record = answer_of(
                self.shards, number, "open", self.task.subject, self._push(), center, restart, meanwhile=beat
            )
            worst = self._heard(number, answer, worst)
            records.append(record)
        return worst, records

    def push(self, block: Block) -> None:
        """Send a block to all shards, without waiting for answers."""
        push = self._push()
        refs: list[ray.ObjectRef] = []
        for shard, columns in zip(self.shards, self._columns, strict=True):
            losses = np.ascontiguousarray(block.losses[:, columns])
            refs.append(
                shard.push.remote(
                    self.task.subject, push, block.previous, block.digest, block.observables, losses, block.mean_losses
                )
            )
        self._in_flight.append((time.monotonic(), refs))
        self.sender.sequence += 1
        self.metrics.set("patterning_unacknowledged_pushes", len(self._in_flight))

    def settle(self, limit: int, num_bytes: int = 0) -> Verdict:
        """Wait until at most ``limit`` pushes are unanswered; the most severe of the answers.

        A shard that died leaves open whether it took a push in: as good as a gap, for its mark will tell.
        """
        worst = Verdict.APPLIED
        while len(self._in_flight) > limit:
            sent, refs = self._in_flight.popleft()
            for number, ref in enumerate(refs):
                try:
                    answer = awaited(ref, meanwhile=beat)  # it is the shard that is slow
                except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                    worst = max(worst, Verdict.GAP, key=_SEVERITY.index)
                    continue
                worst = self._heard(number, answer, worst)
                self.metrics.observe("patterning_push_seconds", time.monotonic() - sent, shard=number)
                self.metrics.add("patterning_push_bytes", num_bytes // len(refs), shard=number)
                self.metrics.add("patterning_pushes", 1, verdict=answer.verdict)
        self.metrics.set("patterning_unacknowledged_pushes", len(self._in_flight))
        return worst

    def close(self, last: bytes, record: ChainRecord) -> Verdict:
        """Note on all shards how the chain ended, durably."""
        worst = Verdict.APPLIED
        for number in range(len(self.shards)):
            answer = answer_of(
                self.shards, number, "close", self.task.subject, self._push(), last, record, meanwhile=beat
            )
            worst = self._heard(number, answer, worst)
        return worst

    def _push(self) -> PushId:
        return PushId(self.task.plan.run, self.task.number, self.task.incarnation, self.sender.sequence)

    def _heard(self, shard: int, answer: Answer, worst: Verdict) -> Verdict:
        self.sender.heard(shard, answer)
        self.stop |= answer.stop
        return max(worst, answer.verdict, key=_SEVERITY.index)
