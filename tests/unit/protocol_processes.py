"""The processes of the model check of the push protocol: shards, and attempts at chains.

Marks, senders, digests and snapshots are the real ones. Statistics are the list of what was taken in, so that whatever
is lost, repeated or mixed can be seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from patterning_dist.aggregation.protocol import START, Answer, Incarnation, Mark, PushId, Sender, Verdict, block_digest
from patterning_dist.storage.snapshots import Snapshots

RUN = "run"


class ProcessDied(Exception):
    """In the middle of what it was doing."""


@dataclass
class MemoryStorage:
    """Files in memory; after ``fuse`` further changes the process that makes them dies."""

    files: dict[str, bytes] = field(default_factory=dict)
    fuse: int | None = None

    def read(self, name: str) -> bytes:
        return self.files[name]

    def write(self, name: str, content: bytes) -> None:
        self._burn()
        self.files[name] = content

    def delete(self, name: str) -> None:
        self._burn()
        self.files.pop(name, None)

    def names(self, folder: str) -> list[str]:
        return sorted(n.removeprefix(f"{folder}/") for n in self.files if n.startswith(f"{folder}/"))

    def _burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise ProcessDied


@dataclass
class Held:
    """What a shard has of one chain."""

    mark: Mark
    contents: list[str] = field(default_factory=list)
    record: str | None = None  # of the end of the chain: digest of its last push


def snapshots_of(storage: MemoryStorage, shard: int, chain: int) -> Snapshots:
    return Snapshots(storage, f"shard-{shard}", f"chain-{chain}")


def restored(snapshots: Snapshots) -> Held:
    """What a shard that is started now would have."""
    if (stored := snapshots.newest()) is None:
        return Held(Mark(RUN))
    header = json.loads(stored[1])
    digests = [bytes.fromhex(digest) for digest in header["digests"]]
    mark = Mark(header["run"], Incarnation(*header["incarnation"]), digests, len(digests))
    return Held(mark, header["contents"], header["record"]) if mark.run == RUN else Held(Mark(RUN))


class Shard:
    """One process of an aggregator shard, the way the ledger does it."""

    def __init__(self, storage: MemoryStorage, number: int, num_chains: int) -> None:
        self.snapshots = [snapshots_of(storage, number, chain) for chain in range(num_chains)]
        self.held = [restored(snapshots) for snapshots in self.snapshots]
        for held, snapshots in zip(self.held, self.snapshots, strict=True):
            if not held.mark.digests:  # of another run: a higher number would hide the snapshots to come
                snapshots.delete()

    def open(self, push: PushId, restart: bool) -> tuple[Answer, str | None]:
        held = self.held[push.chain]
        restart = restart and push.incarnation > held.mark.incarnation  # or else it is a repetition of the question
        if not held.mark.fence(push.run, push.incarnation):
            return self._answer(held, Verdict.ZOMBIE), None
        if restart:
            self.snapshots[push.chain].delete()
            held.contents, held.record = [], None
            held.mark.begin_anew(push.incarnation)
        return self._answer(held, Verdict.DUPLICATE), held.record

    def push(self, push: PushId, previous: bytes, digest: bytes, content: str) -> tuple[Answer, None]:
        held = self.held[push.chain]
        verdict = held.mark.judge(push, previous, digest)
        if verdict is Verdict.APPLIED:
            held.contents.append(content)
        return self._answer(held, verdict), None

    def close(self, push: PushId, last: bytes) -> tuple[Answer, None]:
        held = self.held[push.chain]
        verdict = held.mark.judge_end(push, last)
        if verdict is Verdict.APPLIED:
            held.record = last.hex()
            self.snapshot(push.chain)
        return self._answer(held, verdict), None

    def snapshot(self, chain: int) -> None:
        held, mark = self.held[chain], len(self.held[chain].mark.digests)
        header = {
            "run": held.mark.run,
            "incarnation": held.mark.incarnation,
            "digests": [digest.hex() for digest in held.mark.digests],
            "contents": held.contents,
            "record": held.record,
        }
        self.snapshots[chain].write(mark, json.dumps(header).encode())
        self.snapshots[chain].delete(below=mark)
        held.mark.durable = mark

    def _answer(self, held: Held, verdict: Verdict) -> Answer:
        return Answer(verdict, len(held.mark.digests), held.mark.durable)


class Surroundings(Protocol):
    """What an attempt needs of its world."""

    num_shards: int
    window: int
    total: int
    walked: set[tuple[str, ...]]  # every prefix of pushes that any attempt has come by

    def checkpoints(self, chain: int) -> Snapshots:
        """Of a chain, of all its attempts."""
        ...

    def flavour(self) -> int:
        """What tells pushes from those of another attempt, where a replay differs."""
        ...

    def send(self, sender: Attempt, shard: int, kind: str, arguments: tuple) -> int:
        """Call a shard (open, push, close); returns the number of the call."""
        ...


class Attempt:
    """One process that runs one chain, from its start to its end or its death.

    Args:
        world: around it.
        chain: number.
        incarnation: of the attempt.
        restart: what earlier attempts left is dropped.
    """

    def __init__(self, world: Surroundings, chain: int, incarnation: Incarnation, restart: bool) -> None:
        self.world, self.chain, self.incarnation, self.restart = world, chain, incarnation, restart
        self.sender = Sender(world.num_shards)
        self.checkpoints = world.checkpoints(chain)
        self.digest, self.path, self.flavour = START, (), 0
        self.calls: dict[int, tuple[int, str, int]] = {}  # unanswered: shard, kind, sequence
        self.records: dict[int, str | None] = {}
        self.closed: set[int] = set()
        self.is_first, self.state = True, "opening"  # running, draining, closing; over: see is_over
        self._ask()

    @property
    def is_over(self) -> bool:
        return self.state in ("complete", "conflict", "zombie", "dead")

    @property
    def num_in_flight(self) -> int:
        return len({sequence for _, kind, sequence in self.calls.values() if kind == "push"})

    def move(self) -> bool:
        """Push or close, where that is the next thing to do; whether it was."""
        if self.state == "running" and self.sender.sequence == self.world.total and not self.calls:
            self.state = "closing"
            self._call_all("close", self.digest)
        elif (
            self.state == "running"
            and self.sender.sequence < self.world.total
            and self.num_in_flight < self.world.window
        ):
            content = f"{RUN}/{self.chain}/{self.sender.sequence}/{self.flavour}"
            previous, self.digest = self.digest, digest_of(self.digest, content)
            self.path = (*self.path, content)
            self.world.walked.add(self.path)
            self._call_all("push", previous, self.digest, content)
            self.sender.sequence += 1
        else:
            return False
        return True

    def checkpoint(self) -> None:
        """Keep the state, and drop what will not be asked for again."""
        if self.state in ("running", "draining") and not self.is_first:
            state = {"digest": self.digest.hex(), "path": self.path}
            self.checkpoints.write(self.sender.sequence, json.dumps(state).encode())
            self.checkpoints.delete(below=self.sender.needed(self.checkpoints.numbers()))

    def lose_patience(self) -> None:
        """Take all calls for lost, and ask the shards where they are."""
        if not self.is_over:
            self._ask()

    def hear(self, call: int, answer: Answer, record: str | None) -> None:
        """Take in an answer, unless it is to a call that was given up."""
        if self.is_over or call not in self.calls:
            return
        shard, kind, _ = self.calls.pop(call)
        self.sender.heard(shard, answer)
        if answer.verdict in (Verdict.ZOMBIE, Verdict.CONFLICT):
            self.state = answer.verdict.value
            return
        if kind == "open":
            self.records[shard] = record
        if kind == "close" and answer.verdict is Verdict.APPLIED:
            self.closed.add(shard)
        if answer.verdict is Verdict.GAP:
            self.state = "draining"
        if not self.calls and self.state == "draining":
            self._ask()
        elif not self.calls and self.state == "opening":
            self._go_on()
        elif len(self.closed) == self.world.num_shards:
            self.state = "complete"

    def _ask(self) -> None:
        self.state, self.calls = "opening", {}
        self.records.clear()
        self.closed.clear()
        self._call_all("open", self.restart)

    def _go_on(self) -> None:
        if self.restart:
            self.checkpoints.delete()
            self.restart = False
        if self.is_first and is_ended(self.records):
            self.state = "complete"
            return
        candidates = set(self.checkpoints.numbers()) | ({self.sender.sequence} if not self.is_first else set())
        while (candidate := self.sender.resume(candidates)) > 0:
            if candidate == self.sender.sequence and not self.is_first:
                break
            if (stored := self.checkpoints.read(candidate)) is not None:
                state = json.loads(stored)
                self.digest, self.path = bytes.fromhex(state["digest"]), tuple(state["path"])
                break
            candidates.discard(candidate)  # damaged
        else:
            self.digest, self.path = START, ()
        self.sender.sequence, self.is_first, self.state = candidate, False, "running"
        self.flavour = self.world.flavour()

    def _call_all(self, kind: str, *arguments: object) -> None:
        push = PushId(RUN, self.chain, self.incarnation, self.sender.sequence)
        for shard in range(self.world.num_shards):
            call = self.world.send(self, shard, kind, (push, *arguments))
            self.calls[call] = (shard, kind, self.sender.sequence)


def is_ended(records: dict[int, str | None]) -> bool:
    """Whether all shards have the same end of a chain."""
    return None not in records.values() and len(set(records.values())) == 1


def digest_of(previous: bytes, content: str) -> bytes:
    return block_digest(previous, [np.frombuffer(content.encode(), np.uint8)])
