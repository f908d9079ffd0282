"""Exactly-once pushes over a transport that may lose, repeat and reorder them, between processes that die. No Ray here.

A chain is a deterministic function of its settings, so the n-th push of a chain is always the same: whoever lost
something asks for it again, and whoever gets something twice drops it. The invariants
are in docs/explanation/exactly_once.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np

START = b""  # what comes before the first push
_DIGEST_BYTES = 16


class Verdict(StrEnum):
    """What a shard says to a push."""

    APPLIED = "applied"  # taken in now
    DUPLICATE = "duplicate"  # taken in before; dropped
    GAP = "gap"  # pushes are missing before it; send again from the shard's mark
    ZOMBIE = "zombie"  # of an incarnation, or a run, that has been replaced; stop
    CONFLICT = "conflict"  # not what this chain pushed before; start the chain over


class Incarnation(NamedTuple):
    """One attempt at a chain; a later one fences the earlier ones. Compared field by field."""

    driver: int = 0  # counts the starts of the driver on this run directory
    attempt: int = 0  # counts the starts of the chain under one driver


class PushId(NamedTuple):
    """Names one push."""

    run: str
    chain: int
    incarnation: Incarnation
    sequence: int  # counted from 0 by the chain


class Answer(NamedTuple):
    """What a shard answers to a push, or to a chain that asks where it stands."""

    verdict: Verdict
    mark: int  # pushes taken in: the sequence number that is wanted next
    durable: int  # pushes whose effect would survive the shard
    stop: bool = False  # the run is being stopped: write a checkpoint and leave


def block_digest(previous: bytes, arrays: Iterable[np.ndarray]) -> bytes:
    """Digest of a push and, through `previous`, of all pushes before it."""
    digest = hashlib.blake2b(previous, digest_size=_DIGEST_BYTES)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


@dataclass
class Mark:
    """A shard's side: which pushes of one chain it has taken in.

    Attributes:
        run: identity of the statistics: a push of another run is a zombie's.
        incarnation: highest that was seen.
        digests: of the pushes taken in, in order.
        durable: how many of them are in the newest snapshot.
    """

    run: str
    incarnation: Incarnation = field(default_factory=Incarnation)
    digests: list[bytes] = field(default_factory=list)
    durable: int = 0

    @property
    def last(self) -> bytes:
        """Digest of the last push taken in; it stands for all of them."""
        return self.digests[-1] if self.digests else START

    def judge(self, push: PushId, previous: bytes, digest: bytes) -> Verdict:
        """Decide on a push; after APPLIED the caller adds the contents to the statistics, in the same breath.

        Args:
            push: which one.
            previous: digest of the push before it, ``START`` for the first.
            digest: of this one.
        """
        if push.run != self.run or push.incarnation < self.incarnation:
            return Verdict.ZOMBIE
        self.incarnation = push.incarnation
        if push.sequence > len(self.digests):
            return Verdict.GAP
        if push.sequence < len(self.digests):
            return Verdict.DUPLICATE if self.digests[push.sequence] == digest else Verdict.CONFLICT
        if previous != self.last:
            return Verdict.CONFLICT
        self.digests.append(digest)
        return Verdict.APPLIED

    def judge_end(self, push: PushId, last: bytes) -> Verdict:
        """Decide whether all of a chain is here: APPLIED; else GAP, CONFLICT with the other shards, or ZOMBIE.

        Args:
            push: the one that would come next, so that its sequence number is the number of pushes.
            last: digest of the last push; without it a shard could end with the pushes of another attempt.
        """
        if not self.fence(push.run, push.incarnation):
            return Verdict.ZOMBIE
        if push.sequence > len(self.digests):
            return Verdict.GAP
        return Verdict.APPLIED if (push.sequence, last) == (len(self.digests), self.last) else Verdict.CONFLICT

    def fence(self, run: str, incarnation: Incarnation) -> bool:
        """Shut out earlier incarnations; False if this one is itself shut out."""
        if run != self.run or incarnation < self.incarnation:
            return False
        self.incarnation = incarnation
        return True

    def begin_anew(self, incarnation: Incarnation) -> None:
        """Forget all pushes; the caller empties the statistics in the same breath."""
        self.incarnation, self.digests, self.durable = incarnation, [], 0


@dataclass
class Sender:
    """A chain's side: how far every shard is, and where to go back to.

    Attributes:
        num_shards: shards that every push goes to.
        sequence: of the next push.
    """

    num_shards: int
    sequence: int = 0
    marks: list[int] = field(init=False)
    durable: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.marks, self.durable = [0] * self.num_shards, [0] * self.num_shards

    def heard(self, shard: int, answer: Answer) -> None:
        """Note what a shard says of itself; a shard that was restarted may be further back than it was."""
        self.marks[shard], self.durable[shard] = answer.mark, answer.durable

    def resume(self, checkpoints: Iterable[int]) -> int:
        """The checkpoint to go on from, 0 for the beginning: the newest that no shard is behind of.

        Args:
            checkpoints: sequence numbers of the next push at which the chain's state was kept.
        """
        return max((c for c in checkpoints if c <= min(self.marks)), default=0)

    def needed(self, checkpoints: Iterable[int]) -> int:
        """Checkpoints below this one will not be asked for again, whichever shards and chains die."""
        return max((c for c in checkpoints if c <= min(self.durable)), default=0)
