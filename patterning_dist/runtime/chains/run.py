"""All chains of a study on Ray: workers run them, aggregator shards reduce them, the driver watches and mends."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray

from patterning_dist.aggregation.ledger import ChainRecord, LedgerPlan, Part
from patterning_dist.aggregation.protocol import START, Incarnation, PushId
from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.response.diagnostics import rank_rhat
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import progress_board
from patterning_dist.runtime.chains.aggregator import RESTART_TIMEOUT, AggregatorShard, answer_of
from patterning_dist.runtime.chains.attempt import Ending, MakeStudy, Outcome
from patterning_dist.runtime.chains.groups import chain_workers
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.metrics import Metrics
from patterning_dist.runtime.watch import Pulse, Watch
from patterning_dist.runtime.workforce import Loss, Workforce
from patterning_dist.storage.store import Storage

# Of the notice of half a minute that a preempted machine is given: first for chains to reach the end of a block, then
# for snapshots.
_WIND_DOWN, _LAST_SNAPSHOTS = 12.0, 8.0
_STARTS = "sampling/starts.json"
_RHAT_EVERY, _RHAT_DRAWS = 15.0, 8  # seconds between two looks at R-hat, and draws that it takes at least


@dataclass(frozen=True)
class ChainsPlan:
    """A set of chains on one component, and what becomes of their statistics.

    Attributes:
        ledger: what the shards are to know.
        analysis: called in every shard with its part when all chains are through; returns what the driver is to know.
        after: a subject whose statistics the analysis reads, if any.
    """

    ledger: LedgerPlan
    analysis: Callable[[Part], Any]
    after: str | None = None


class ChainsResult(NamedTuple):
    """A subject whose chains are through.

    ``traces`` [draw, 1 + observable] of every chain; ``parts`` what the analysis returned, in the order of the shards.
    """

    records: list[ChainRecord]
    traces: list[np.ndarray]
    parts: list[Any]


class Events(NamedTuple):
    """Who hears of what happens on the way."""

    finished: Callable[[str, ChainsResult], None]  # a subject; its snapshots may be relied on
    event: Callable[..., None]  # kind, and fields


def run_chains(
    name: str,
    make_study: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    storage: Storage,
    subjects: Mapping[str, ChainsPlan],
    events: Events,
    progress: Progress,
) -> None:
    """Run the chains of all subjects side by side, from wherever an earlier driver left them.

    Args:
        name: of the run.
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        storage: of the run; holds snapshots and checkpoints.
        subjects: in the order in which they are begun.
        events: see there.
        progress: shows a line a chain.

    Raises:
        PatterningError: a subject has fewer healthy chains than sampling.min_chains, said as soon as it is certain; or
            processes die faster than they can be replaced.
    """
    with contextlib.ExitStack() as resources:
        resources.enter_context(ray_session(sampling.threads_per_worker))
        plans = {subject: plan.ledger for subject, plan in subjects.items()}
        number = sampling.aggregator_shards
        shards = [
            AggregatorShard.remote(name, plans, shard, number, storage, sampling.snapshot_seconds)
            for shard in range(number)
        ]
        num_tasks = sum(plan.num_chains for plan in plans.values())
        workers = resources.enter_context(chain_workers(make_study, sampling, device, num_tasks, progress))
        run = _Run(name, sampling, storage, subjects, events, progress, shards)
        try:
            run.run(workers)
        except BaseException:
            run.stop(workers)
            for actor in (*shards, run.board):  # as for workers: the traceback keeps them
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor)
            raise


class _Run:
    def __init__(
        self,
        name: str,
        sampling: SamplingConfig,
        storage: Storage,
        subjects: Mapping[str, ChainsPlan],
        events: Events,
        progress: Progress,
        shards: list[ActorHandle],
    ) -> None:
        self.name, self.sampling, self.storage, self.subjects, self.events = name, sampling, storage, subjects, events
        self.progress, self.shards, self.board = progress, shards, progress_board()
        self.watch = Watch(self.board, sampling.progress_timeout, self._say_stalled)
        for number, shard in enumerate(shards):
            self.watch.guard(_shard_name(number), shard, "and goes on from its snapshots")
        self.tasks = [(subject, n) for subject, plan in subjects.items() for n in range(plan.ledger.num_chains)]
        self.driver = _count_start(storage, any(storage.names(f"sampling/{subject}/shard-0") for subject in subjects))
        self.attempts = [0] * len(self.tasks)
        self.restart: set[int] = set()
        self.failures = [0] * len(self.tasks)  # since the chain last got further than before
        self.furthest = [-1] * len(self.tasks)
        self.faults: dict[int, str] = {}  # of a chain, what the last attempt raised or where it hung
        self.finishing: dict[str, list[ray.ObjectRef]] = {}
        self.finish_by: dict[str, float] = {}
        self.finished: set[str] = set()
        self.metrics, self.rhat_at = Metrics(run=name), 0.0

    def run(self, workers: Workforce) -> None:
        self.progress.start(
            "sampling the posterior", sum(self.subjects[subject].ledger.num_draws for subject, _ in self.tasks)
        )
        calls = [(self._key(index), partial(self._call, index)) for index in range(len(self.tasks))]
        workers.run(calls, self._poll, self.watch, self._lost)

    def stop(self, workers: Workforce) -> None:
        """Let chains write checkpoints and shards snapshots, within the notice that a preempted machine has."""
        with contextlib.suppress(Exception):
            ray.wait([shard.stop.remote() for shard in self.shards], num_returns=len(self.shards), timeout=1.0)
            workers.wind_down(_WIND_DOWN)
            # Once more: chains have pushed since, and their checkpoints are of use up to what is durable here.
            last = [shard.stop.remote() for shard in self.shards]
            ray.wait(last, num_returns=len(last), timeout=_LAST_SNAPSHOTS)

    def _say_stalled(self, text: str) -> None:
        self.events.event("stalled", text=text)
        self.progress.say(text)

    def _call(self, index: int, worker: ActorHandle, pulse: Pulse) -> ray.ObjectRef:
        subject, number = self.tasks[index]
        self.attempts[index] += 1
        task = ChainTask(
            run=self.name,
            subject=subject,
            number=number,
            incarnation=Incarnation(self.driver, self.attempts[index]),
            restart=index in self.restart,
            plan=self.subjects[subject].ledger,
            storage=self.storage,
            draws_per_push=self.sampling.draws_per_push,
            snapshot_seconds=self.sampling.snapshot_seconds,
        )
        self.restart.discard(index)
        return worker.chain.remote(task, self.shards, pulse)

    def _poll(self, outcomes: list[Outcome | None]) -> bool:
        """Look after everything once; whether there is something left to wait for besides the chains."""
        for key, note in sorted(self.watch.notes.items()):
            self.progress.update_line(key, **note)
        for index, outcome in enumerate(outcomes):
            if outcome is not None and outcome.ending is not Ending.CLOSED:
                reason = f"attempt {self.attempts[index]} ended: {outcome.ending}"
                if outcome.ending is Ending.CONFLICT:
                    self.restart.add(index)
                outcomes[index] = self._lost(index, Loss(reason))
        self.progress.update(sum(self._done(index, outcome) for index, outcome in enumerate(outcomes)))
        self._refuse_hopeless(outcomes)
        self._measure_rhat()
        for subject, plan in self.subjects.items():
            if subject in self.finished or (plan.after in self.subjects and plan.after not in self.finished):
                continue
            mine = [index for index, (name, _) in enumerate(self.tasks) if name == subject]
            if all(outcomes[index] is not None for index in mine):
                self._finish(subject, mine, outcomes)
        return len(self.finished) < len(self.subjects)

    def _done(self, index: int, outcome: Outcome | None) -> int:
        """Draws of a chain, for the progress display."""
        if outcome is not None:
            return self.subjects[self.tasks[index][0]].ledger.num_draws
        return self.watch.notes.get(self._key(index), {"done": 0})["done"]

    def _key(self, index: int) -> str:
        subject, number = self.tasks[index]
        return f"{subject} chain {number}"

    def _lost(self, index: int, loss: Loss) -> Outcome | None:
        """A chain lost its worker: it is tried again, unless that happens too often without its getting further.

        What it raised twice, or where it hung twice, would come again: once more is enough.
        """
        (subject, number), (reason, fault) = self.tasks[index], loss
        done = self._done(index, None)
        self.failures[index] = 1 if done > self.furthest[index] else self.failures[index] + 1
        self.furthest[index] = max(done, self.furthest[index])
        self.metrics.add("patterning_chain_restarts", 1, subject=subject, chain=number)
        self.events.event("chain_lost", subject=subject, chain=number, draws=done, reason=reason)
        again = fault is not None and self.faults.get(index) == fault
        self.faults[index] = fault or ""
        if self.failures[index] <= self.sampling.max_chain_failures and not again:
            return None
        lost = f"lost {self.failures[index]} times without getting beyond draw {done}; last: {reason}"
        record = ChainRecord(number, False, f"{reason}; the same twice" if again else lost)
        incarnation = Incarnation(self.driver, self.attempts[index] + 1)
        push = PushId(self.subjects[subject].ledger.run, number, incarnation, 0)
        for shard in range(len(self.shards)):
            answer_of(self.shards, shard, "close", subject, push, START, record, meanwhile=self.watch.look)
        return Outcome(Ending.CLOSED, record)

    def _finish(self, subject: str, mine: list[int], outcomes: list[Outcome | None]) -> None:
        """Have the shards analyse a subject; a chain that one of them turns out not to have is run again."""
        if subject not in self.finishing:
            self.finishing[subject] = [
                shard.finish.remote(
                    subject, self.subjects[subject].analysis, self.watch.pulse(_shard_name(shard_number))
                )
                for shard_number, shard in enumerate(self.shards)
            ]
            self.finish_by.setdefault(subject, time.monotonic() + RESTART_TIMEOUT)
        _, waiting = ray.wait(self.finishing[subject], num_returns=len(self.shards), timeout=0)
        if waiting:
            return
        try:
            answers = ray.get(self.finishing.pop(subject))
        except ray.exceptions.RayActorError as error:
            if time.monotonic() > self.finish_by[subject]:
                raise PatterningError(
                    f"{subject}: aggregator shards die whenever its statistics are analysed ({error}); look for memory "
                    "failures, raise sampling.aggregator_shards, and run the same command again to resume"
                ) from error
            return  # asked again at the next look
        self._say_damaged()
        for index in mine:
            ended = [records[self.tasks[index][1]] for records, _, _ in answers]
            # Records of different attempts do not count: each may be of other draws.
            if ended[0] is None or any(record != ended[0] for record in ended):
                self.events.event("chain_missing", subject=subject, chain=self.tasks[index][1])
                outcomes[index] = None
        if any(outcomes[index] is None for index in mine):
            return
        records, traces, _ = answers[0]
        self.events.finished(subject, ChainsResult(records, traces, [part for _, _, part in answers]))
        self.finished.add(subject)
        num_excluded = sum(not record.healthy for record in records)
        self.metrics.hold("patterning_chains_excluded", num_excluded, subject=subject)
        for shard in self.shards:
            shard.drop.remote(subject)
        self.storage.clear(f"sampling/{subject}/checkpoints")

    def _measure_rhat(self) -> None:
        """R-hat of the loss of every subject so far, for whoever watches the metrics."""
        if time.monotonic() < self.rhat_at:
            return
        self.rhat_at = time.monotonic() + _RHAT_EVERY
        for subject in self.subjects.keys() - self.finished:
            try:
                losses = ray.get(self.shards[0].losses.remote(subject), timeout=1.0)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                return  # it has more important things to do
            length = min(map(len, losses), default=0)
            if len(losses) > 1 and length >= _RHAT_DRAWS:
                rhat = rank_rhat(np.stack([trace[:length] for trace in losses]))
                self.metrics.hold("patterning_rhat", rhat, subject=subject)
                self.progress.measured(subject, rhat=rhat)

    def _say_damaged(self) -> None:
        for shard in range(len(self.shards)):
            for message in answer_of(self.shards, shard, "damaged", meanwhile=self.watch.look):
                self.events.event("damaged", message=message)
                self.progress.say(message)

    def _refuse_hopeless(self, outcomes: list[Outcome | None]) -> None:
        needed = self.sampling.min_chains
        for subject in self.subjects:
            mine = [o and o.record for (name, _), o in zip(self.tasks, outcomes, strict=True) if name == subject]
            failed = [record for record in mine if record is not None and not record.healthy]
            if failed and len(mine) - len(failed) < needed:
                raise PatterningError(
                    f"component {subject}: {len(failed)} of {len(mine)} chains failed, so fewer than "
                    f"sampling.min_chains = {needed} can be healthy; chain {failed[0].chain}: {failed[0].reason}"
                )


def _shard_name(number: int) -> str:
    return f"aggregator shard {number}"


def _count_start(storage: Storage, has_snapshots: bool) -> int:
    """How often drivers have sampled in this run directory, this one included: it fences what they left running."""
    try:
        starts = json.loads(storage.read(_STARTS))["starts"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # A count that was lost must not begin again below what the snapshots know; seconds are beyond any count.
        starts = int(time.time()) if has_snapshots else 0
    storage.write(_STARTS, json.dumps({"starts": starts + 1}).encode())
    return starts + 1
