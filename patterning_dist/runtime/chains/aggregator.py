"""The parameter server: shards, each an actor that reduces its probe columns of all chains as their draws arrive.

A shard is restarted by Ray wherever there is room when its process or node dies, and goes on from its snapshots; chains
send again what those do not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from patterning_dist.aggregation.ledger import ChainRecord, Ledger, LedgerPlan, Part
from patterning_dist.aggregation.protocol import Answer, PushId
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.actor import Actor, ActorHandle
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.runtime.watch import Pulse
from patterning_dist.storage.store import Storage

# Snapshots take at most this share of a shard's time, however long one takes.
_SNAPSHOT_SHARE = 0.05
RESTART_TIMEOUT = 300.0  # seconds until a shard that died must answer again
ANSWER_TIMEOUT = 600.0  # seconds for any one answer of a shard
_MEANWHILE_EVERY = 1.0  # seconds


@ray.remote(num_cpus=0, max_restarts=-1)  # one call at a time, by Ray's default
class AggregatorShard(Actor):
    """Ledgers of all subjects, over one contiguous range of probe columns.

    Args:
        run: name of the run, for metrics.
        plans: of the subjects that are to be sampled.
        shard, num_shards: which of how many.
        storage: of the run; what a shard that was restarted goes on from.
        snapshot_seconds: between two snapshots of one chain, at least.
    """

    def __init__(
        self,
        run: str,
        plans: dict[str, LedgerPlan],
        shard: int,
        num_shards: int,
        storage: Storage,
        snapshot_seconds: float,
    ) -> None:
        self._metrics = Metrics(run=run, shard=shard)
        self._damaged: list[str] = []
        self._ledgers = {
            subject: Ledger(plan, shard, num_shards, storage, subject, self._damaged.append)
            for subject, plan in plans.items()
        }
        self._shard, self._snapshot_seconds = shard, snapshot_seconds
        self._last: dict[tuple[str, int], float] = {}  # monotonic time of a chain's last snapshot
        self._busy_until = 0.0
        self._stop = False

    def open(
        self, subject: str, push: PushId, center_losses: np.ndarray | None, restart: bool
    ) -> tuple[Answer, ChainRecord | None]:
        """See ``Ledger.open``."""
        answer, record = self._ledgers[subject].open(push, center_losses, restart=restart)
        return answer._replace(stop=self._stop), record

    def push(self, subject: str, push: PushId, previous: bytes, digest: bytes, *draws: np.ndarray) -> Answer:
        """See ``Ledger.push``; takes a snapshot of the chain where one is due."""
        ledger, key = self._ledgers[subject], (subject, push.chain)
        answer = ledger.push(push, previous, digest, *draws)
        now = time.monotonic()
        due = now - self._last.setdefault(key, now) >= self._snapshot_seconds and now >= self._busy_until
        if due and answer.mark > answer.durable:
            self._snapshot(ledger, push.chain, key)
            answer = answer._replace(durable=answer.mark)
        return answer._replace(stop=self._stop)

    def close(self, subject: str, push: PushId, last: bytes, record: ChainRecord) -> Answer:
        """See ``Ledger.close``."""
        return self._ledgers[subject].close(push, last, record)._replace(stop=self._stop)

    def ping(self) -> None:
        """Answered when all calls before it are."""

    def finish(
        self, subject: str, analysis: Callable[[Part], Any] | None, pulse: Pulse
    ) -> tuple[list[ChainRecord | None], Any, Any]:
        """Records of a subject, traces of its chains (of the first shard), and what ``analysis`` makes of this part.

        The analysis is not begun while a chain is missing: its record is None then, and it is to be run again.
        """
        ledger = self._ledgers[subject]
        records = ledger.records()
        if None in records:
            return records, [], None
        traces = [ledger.traces(chain) for chain in range(len(records))] if self._shard == 0 else []
        with pulse.sent():
            return records, traces, analysis and analysis(ledger.part())

    def losses(self, subject: str) -> list[np.ndarray]:
        """Mean losses of the draws of every chain so far [draw]; empty on all shards but the first."""
        ledger = self._ledgers.get(subject)
        return [ledger.traces(chain)[:, 0] for chain in range(ledger.plan.num_chains)] if ledger else []

    def drop(self, subject: str) -> None:
        """Let go of a subject that is finished."""
        del self._ledgers[subject]

    def stop(self) -> None:
        """Take snapshots of all that is not durable, and tell chains with every answer to come to a stop."""
        self._stop = True
        for subject, ledger in self._ledgers.items():
            for chain in ledger.volatile():
                self._snapshot(ledger, chain, (subject, chain))

    def damaged(self) -> list[str]:
        """Files that were found damaged since the last call, a line each."""
        found = list(self._damaged)
        self._damaged.clear()
        return found

    def _snapshot(self, ledger: Ledger, chain: int, key: tuple[str, int]) -> None:
        started = time.monotonic()
        num_bytes = ledger.snapshot(chain)
        self._last[key] = now = time.monotonic()
        self._busy_until = now + (now - started) * (1 / _SNAPSHOT_SHARE - 1)
        self._metrics.observe("patterning_snapshot_seconds", now - started)
        self._metrics.set("patterning_snapshot_bytes", num_bytes)


def awaited(answer: ray.ObjectRef, meanwhile: Callable[[], object]) -> Any:
    """An answer of a shard; ``meanwhile`` is called about once a second until it is there.

    Raises:
        GetTimeoutError, RayActorError: of Ray.
    """
    give_up_at = time.monotonic() + ANSWER_TIMEOUT
    while not ray.wait([answer], timeout=_MEANWHILE_EVERY)[0]:
        meanwhile()
        if time.monotonic() > give_up_at:
            break
    return ray.get(answer, timeout=_MEANWHILE_EVERY)


def answer_of(
    shards: list[ActorHandle], number: int, method: str, *arguments: Any, meanwhile: Callable[[], object]
) -> Any:
    """The answer of one shard to a call of a method, asked again when its process dies; see ``awaited``.

    Raises:
        PatterningError: it does not come back in time.
    """
    deadline = time.monotonic() + RESTART_TIMEOUT
    while True:
        try:
            return awaited(getattr(shards[number], method).remote(*arguments), meanwhile)
        except ray.exceptions.GetTimeoutError:
            raise PatterningError(
                f"aggregator shard {number} of {len(shards)} gave no answer within {ANSWER_TIMEOUT:g} s; look at the "
                "disk and the load of its node, and run the same command again to resume"
            ) from None
        except ray.exceptions.RayActorError as error:
            if time.monotonic() > deadline:
                raise PatterningError(
                    f"aggregator shard {number} of {len(shards)} died and did not come back within "
                    f"{RESTART_TIMEOUT:g} s ({str(error).splitlines()[0]}); run the same command again to resume"
                ) from error
            meanwhile()
            time.sleep(0.5)
