"""One attempt at one chain, on one rank or several: draws, pushes, checkpoints, and going back after a loss.

Rank 0 talks to the aggregator and decides; the other ranks of a chain group do as it says, between any two blocks.
"""

from __future__ import annotations

import enum
import re
import time
import traceback
from collections.abc import Callable, Generator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import torch

from patterning_dist.aggregation.files import rank_part
from patterning_dist.aggregation.ledger import ChainRecord
from patterning_dist.aggregation.protocol import START, Verdict, block_digest
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.heartbeat import raised_in
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import Notes
from patterning_dist.runtime.chains.pushes import WINDOW, Block, ChainTask, ShardClient
from patterning_dist.runtime.workforce import TaskFailed
from patterning_dist.sampling.chain import Chain, ChainFailure
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.temperature import Temperatures
from patterning_dist.storage.snapshots import Snapshots, pack
from patterning_dist.training.state import decode, encode

_CHECKPOINT_SHARE = 0.05  # of a chain's time, at most


class ChainStudy(Protocol):
    """What a worker needs of a study: any of its chains."""

    def chain(self, name: str, number: int, **changes: Any) -> Chain: ...


MakeStudy = Callable[[str, Ranks], ChainStudy]  # (device, ranks) -> study, in the process that is to hold it


class Ending(enum.StrEnum):
    """Why an attempt is over."""

    CLOSED = "closed"  # the chain is through, healthy or not, and all shards know it durably
    STOPPED = "stopped"  # the run is being stopped
    SUPERSEDED = "superseded"  # a later incarnation has taken over
    CONFLICT = "conflict"  # the replay was not what was pushed before: the chain has to start over


class Outcome(NamedTuple):
    """How an attempt ended; ``record`` where it is closed."""

    ending: Ending
    record: ChainRecord | None = None


class _Action(enum.IntEnum):
    DRAW = 0
    CHECKPOINT = 1
    RESTORE = 2
    RESULTS = 3
    END = 4


Decision = tuple[_Action, int]


def run_chain(
    study: ChainStudy, ranks: Ranks, task: ChainTask, shards: list[ActorHandle], board: ActorHandle
) -> Outcome | None:
    """Run one chain to its end, from wherever earlier attempts left it; a failed chain is a record, not an error.

    Args:
        study: held by this process.
        ranks: of the chain group; every rank calls this.
        task: what is to be done.
        shards: of the aggregator.
        board: actor that takes notes of progress.

    Returns:
        How it ended; None on all ranks but the first.

    Raises:
        PatterningError: what the user can put right.
        TaskFailed: anything else that model, data, observables or statistics raised, with its place.
    """
    attempt = _Attempt(study, ranks, task, board)
    try:
        if ranks.rank > 0:
            attempt.follow()
            return None
        return attempt.lead(ShardClient(task, shards))
    except (PatterningError, ray.exceptions.RayError):
        raise
    except Exception as error:
        raise TaskFailed(_words(error)) from error


def _words(error: Exception) -> str:
    """What was raised, at which draw, and by which line outside of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    words = re.sub("0x[0-9a-f]+", "0x...", first_line(error))  # an address is another one every time
    return f"{raised_in(error) or 'at the checkpoint'}: {type(error).__name__}: {words} ({place})"


class _Attempt:
    def __init__(self, study: ChainStudy, ranks: Ranks, task: ChainTask, board: ActorHandle) -> None:
        self.study, self.ranks, self.task = study, ranks, task
        self.note = Notes(board, task.key, task.plan.num_draws)
        self.started = time.monotonic()
        self.chain: Chain | None = None
        self.sequence, self.digest = 0, START  # of the next push, and of the one before it
        self.block: Block  # the last draws, on rank 0
        folder, name = f"sampling/{task.subject}/checkpoints", f"chain-{task.number}-rank-{ranks.rank}"
        self.checkpoints = Snapshots(task.storage, folder, name, damaged=lambda message: None)
        if task.restart:
            self.checkpoints.delete()
        self.checkpoint_at = self.started + task.snapshot_seconds
        self.is_restored = False
        self.temperatures = Temperatures([], [], [])

    def follow(self) -> None:
        """Do as rank 0 says, to the end."""
        try:
            while True:
                action, number = self._agree(_Action.DRAW, 0)
                if action is _Action.END:
                    if number:
                        self.checkpoints.delete()
                    return
                self._do(action, number)
        except ChainFailure:  # the same on all ranks; rank 0 records it
            pass

    def lead(self, client: ShardClient) -> Outcome:
        """Decide, and tell the other ranks."""
        decisions = self._decide(client)
        try:
            while True:
                try:
                    decision = next(decisions)
                except StopIteration as end:
                    outcome = end.value
                    break
                self._do(*self._agree(*decision))
            closed = outcome.ending is Ending.CLOSED
            self._agree(_Action.END, int(closed))
        except ChainFailure as failure:
            record = self._record(healthy=False, reason=str(failure))
            self.note(0, healthy=False)
            client.settle(0)
            closed = client.close(self.digest, record) is not Verdict.ZOMBIE
            outcome = Outcome(Ending.CLOSED, record) if closed else Outcome(Ending.SUPERSEDED)
        if closed:
            self.checkpoints.delete()
        return outcome

    def _decide(self, client: ShardClient) -> Generator[Decision, None, Outcome]:
        """What all ranks do next, one thing after another; returns the outcome."""
        task = self.task
        verdict, records = client.open(None, 0.0, task.restart)
        if verdict is Verdict.ZOMBIE:
            return Outcome(Ending.SUPERSEDED)
        if records[0] is not None and all(record == records[0] for record in records):
            return Outcome(Ending.CLOSED, records[0])
        verdict = yield from self._resume(client)
        while True:
            if verdict is Verdict.GAP:
                verdict = yield from self._resume(client)
                continue
            if verdict in (Verdict.ZOMBIE, Verdict.CONFLICT):
                return Outcome(Ending.SUPERSEDED if verdict is Verdict.ZOMBIE else Ending.CONFLICT)
            if client.stop:
                yield _Action.CHECKPOINT, 0
                return Outcome(Ending.STOPPED)
            if self.sequence == task.num_pushes:
                verdict = client.settle(0)
                if verdict in (Verdict.APPLIED, Verdict.DUPLICATE):
                    yield _Action.RESULTS, 0
                    record = self._record()
                    verdict = client.close(self.digest, record)
                    if verdict is Verdict.APPLIED:
                        return Outcome(Ending.CLOSED, record)
                continue
            yield _Action.DRAW, 0
            client.push(self.block)
            client.metrics.add("patterning_draws", len(self.block.mean_losses))
            client.metrics.set("patterning_chain_loss_nats", self.block.mean_losses[-1])
            verdict = client.settle(WINDOW - 1, self.block.losses.nbytes)
            if time.monotonic() >= self.checkpoint_at and self.sequence < task.num_pushes:
                started = time.monotonic()
                yield _Action.CHECKPOINT, client.sender.needed(self.checkpoints.numbers())
                client.metrics.observe("patterning_checkpoint_seconds", time.monotonic() - started)

    def _resume(self, client: ShardClient) -> Generator[Decision, None, Verdict]:
        """Go to a candidate that no shard is behind of: where the chain is, a checkpoint, or the beginning."""
        verdict = client.settle(0)  # what is under way would come between
        if verdict in (Verdict.ZOMBIE, Verdict.CONFLICT):
            return verdict
        if self.chain is None:
            yield _Action.RESTORE, 0
        chain = self._begun()
        verdict, _ = client.open(chain.center_losses, chain.center_mean_loss, False)
        if verdict is Verdict.ZOMBIE:
            return verdict
        candidates = {0, self.sequence, *self.checkpoints.numbers()}
        while (candidate := client.sender.resume(candidates)) != self.sequence:
            yield _Action.RESTORE, candidate
            if not self.is_restored:  # damaged, or not there on another rank
                candidates.discard(candidate)
        client.sender.sequence = self.sequence
        return Verdict.APPLIED

    def _begun(self) -> Chain:
        """The chain: the first thing that is decided is where it starts."""
        assert self.chain is not None, f"{self.task.key} has not been started"
        return self.chain

    def _agree(self, action: _Action, number: int) -> Decision:
        """What rank 0 has decided, on all ranks."""
        mine = [action, number] if self.ranks.rank == 0 else [0, 0]
        agreed, number = self.ranks.sum(torch.tensor(mine)).tolist()
        return _Action(agreed), number

    def _do(self, action: _Action, number: int) -> None:
        if action is _Action.DRAW:
            self._draw()
        elif action is _Action.CHECKPOINT:
            self._checkpoint(number)
        elif action is _Action.RESULTS:
            self._write_results()
        else:
            self._restore(number)

    def _draw(self) -> None:
        draws = []
        for draw in islice(self._begun().draws(), self.task.draws_per_push):
            draws.append(draw)
            if self.ranks.rank == 0:
                self.note(draw.number + 1, draw.mean_loss)
        self.sequence += 1
        if self.ranks.rank > 0:
            return
        arrays = (
            np.stack([draw.observables for draw in draws]),
            np.stack([draw.losses for draw in draws]).astype(np.float32),
            np.array([draw.mean_loss for draw in draws]),
        )
        self.block = Block(self.digest, block_digest(self.digest, arrays), *arrays)
        self.digest = self.block.digest

    def _checkpoint(self, needed: int) -> None:
        """Write this rank's part, and delete those before the one that is needed (0: none)."""
        started = time.monotonic()
        self._flush()
        state = {"run": self.task.plan.run, "digest": self.digest.hex(), "chain": self._begun().state_dict()}
        self.checkpoints.write(self.sequence, encode(state))
        self.checkpoints.delete(below=needed)
        now = time.monotonic()
        self.checkpoint_at = now + max(self.task.snapshot_seconds, (now - started) * (1 / _CHECKPOINT_SHARE - 1))

    def _restore(self, number: int) -> None:
        """Go to a checkpoint, or to the beginning (0); ``is_restored`` says whether all ranks could."""
        self._flush()  # or else what is held would be taken for what follows the checkpoint
        if number == 0:
            self.chain = self.study.chain(self.task.subject, self.task.number)
            self.sequence, self.digest, self.is_restored = 0, START, True
            return
        content = self.checkpoints.read(number)
        state = (content and decode(content)) or {}
        is_ours = state.get("run") == self.task.plan.run  # not of other inputs, nor damaged
        self.is_restored = self.ranks.sum(torch.tensor(int(is_ours))).item() == self.ranks.size
        if self.is_restored:
            self._begun().load_state_dict(state["chain"])
            self.sequence, self.digest = number, bytes.fromhex(state["digest"])

    def _flush(self) -> None:
        for statistic in self.chain.statistics.values() if self.chain is not None else ():
            statistic.flush()

    def _write_results(self) -> None:
        """What the chain's statistics have come to, this rank's part, and its temperatures."""
        task, self.temperatures = self.task, self._begun().temperatures()
        for name, statistic in self._begun().statistics.items():
            if (result := statistic.result()) is not None:
                part = rank_part(task.number, self.ranks.rank, self.ranks.size)
                Snapshots(task.storage, f"sampling/{task.subject}/{name}", part).write(task.num_pushes, pack(result))

    def _record(self, healthy: bool = True, reason: str = "") -> ChainRecord:
        steps = 0 if self.chain is None else self.chain.state.step
        spectrum = [] if self.chain is None or self.chain.spectrum is None else list(self.chain.spectrum)
        seconds = time.monotonic() - self.started
        return ChainRecord(self.task.number, healthy, reason, 0, steps, seconds, *self.temperatures, spectrum)
