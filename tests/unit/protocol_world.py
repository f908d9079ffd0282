"""A world in which shards, chains, messages and files fail as they like, and the promises it must keep all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from protocol_processes import RUN, Attempt, MemoryStorage, ProcessDied, Shard, is_ended, restored, snapshots_of

from patterning_dist.aggregation.protocol import Answer, Incarnation, PushId, Verdict
from patterning_dist.storage.snapshots import Snapshots


class Violation(AssertionError):
    """The protocol broke a promise."""


def require(holds: bool, promise: str) -> None:
    if not holds:
        raise Violation(promise)


@dataclass
class Message:
    """A call of a shard on its way."""

    sender: Attempt
    call: int
    shard: int
    kind: str  # open, push, close
    arguments: tuple


class World:
    """All processes, messages and files, and the promises they must keep after every step."""

    def __init__(
        self,
        num_shards: int,
        num_chains: int,
        window: int,
        total: int,
        choose: Callable[[int], int],
        is_deterministic: bool,
        may_damage: bool,
    ) -> None:
        self.num_shards, self.num_chains, self.window, self.total = num_shards, num_chains, window, total
        self.choose, self.is_deterministic, self.may_damage = choose, is_deterministic, may_damage
        self.storage = MemoryStorage()
        self.walked: set[tuple[str, ...]] = {()}
        self.messages: list[Message] = []
        self.answers: list[tuple[Message, Answer, str | None]] = []
        self.num_calls = self.num_flavours = 0
        self.driver, self.attempts = 0, [0] * num_chains
        self.complete: set[int] = set()
        self.untrusted: set[tuple[int, int]] = set()  # (shard, chain) whose newest snapshot may be damaged
        self.damaged: set[int] = set()  # chains with damaged files
        self.begun_anew: set[int] = set()  # chains that may have to start from nothing
        self.way_back = [0] * num_chains  # where a chain would start if everything died now
        self.highest: list[dict[int, Incarnation]] = [{} for _ in range(num_shards)]
        for shard in range(num_shards):
            for chain in range(num_chains):
                if self.choose(4) == 0:  # an earlier run with other inputs left this
                    old = {
                        "run": "other",
                        "incarnation": [9, 9],
                        "digests": ["00"] * 20,
                        "contents": [],
                        "record": "00",
                    }
                    snapshots_of(self.storage, shard, chain).write(20, json.dumps(old).encode())
        self.shards = [Shard(self.storage, shard, num_chains) for shard in range(num_shards)]
        self.zombies: list[Attempt] = []
        self.current = [self._start(chain, restart=False) for chain in range(num_chains)]

    # what attempts need

    def checkpoints(self, chain: int) -> Snapshots:
        return Snapshots(self.storage, "checkpoints", f"chain-{chain}")

    def flavour(self) -> int:
        """Of the pushes from here on: always the same, unless a replay may differ."""
        if self.is_deterministic or self.choose(2) == 0:
            return 0
        self.num_flavours += 1
        return self.num_flavours

    def send(self, sender: Attempt, shard: int, kind: str, arguments: tuple) -> int:
        self.num_calls += 1
        self.messages.append(Message(sender, self.num_calls, shard, kind, arguments))
        return self.num_calls

    # what may happen

    def deliver(self, message: Message, *, fuse: int | None = None, dies: bool = False) -> None:
        """Have a shard take a message; one that dies does so after some changes of files, or before it answers."""
        shard, (push, *_) = message.shard, message.arguments
        self.storage.fuse = fuse
        try:
            answer, record = getattr(self.shards[shard], message.kind)(*message.arguments)
        except ProcessDied:
            self.crash(shard)
            return
        finally:
            self.storage.fuse = None
        if dies:
            self.crash(shard)
            return
        if push.run == RUN and (shard, push.chain) not in self.untrusted:
            kept = restored(snapshots_of(self.storage, shard, push.chain)).mark.digests[: answer.durable]
            durable = self.shards[shard].held[push.chain].mark.digests[: answer.durable]
            require(kept == durable, "what is called durable survives the shard")
        seen = self.highest[shard].get(push.chain, Incarnation())
        if answer.verdict is not Verdict.ZOMBIE:
            require(push.run == RUN, "a push of another run is turned away")
            require(push.incarnation >= seen, "an incarnation that was shut out stays shut out while the shard lives")
            self.highest[shard][push.chain] = push.incarnation
        elif push.run == RUN:
            latest = self.current[push.chain].incarnation
            require(push.incarnation < latest, "the newest incarnation is never shut out")
        self.answers.append((message, answer, record))

    def hear(self, message: Message, answer: Answer, record: str | None) -> None:
        if not message.sender.is_over:
            message.sender.hear(message.call, answer, record)
            self._look_after(message.sender)

    def snapshot(self, shard: int, chain: int, fuse: int | None = None) -> None:
        self.storage.fuse = fuse
        try:
            if len(self.shards[shard].held[chain].mark.digests) > self.shards[shard].held[chain].mark.durable:
                self.shards[shard].snapshot(chain)
                self.untrusted.discard((shard, chain))
        except ProcessDied:
            self.crash(shard)
        finally:
            self.storage.fuse = None

    def crash(self, shard: int) -> None:
        """A shard dies, and is there again, with what its snapshots say."""
        self.storage.fuse = None
        self.highest[shard] = {}
        self.shards[shard] = Shard(self.storage, shard, self.num_chains)
        self.untrusted -= {(shard, chain) for chain in range(self.num_chains)}

    def replace(self, chain: int, *, lives_on: bool, restart: bool = False) -> None:
        """The driver takes an attempt for dead, rightly or not, and starts another."""
        if restart:
            self.begun_anew.add(chain)
        if lives_on:
            self.zombies.append(self.current[chain])
        else:
            self.current[chain].state = "dead"
        self.current[chain] = self._start(chain, restart)

    def restart_driver(self) -> None:
        """All attempts live on for a while; the new driver knows nothing but the count of drivers."""
        self.driver, self.attempts = self.driver + 1, [0] * self.num_chains
        self.complete.clear()
        for chain in range(self.num_chains):
            self.replace(chain, lives_on=True)

    def damage(self, folder: str, pick: int) -> None:
        """Flip a bit of a file."""
        files = [name for name in sorted(self.storage.files) if name.startswith(folder)]
        if not files:
            return
        name = files[pick % len(files)]
        content = bytearray(self.storage.files[name])
        content[pick % len(content)] ^= 1
        self.storage.files[name] = bytes(content)
        chain = int(name.split("chain-")[1].split(".")[0])
        self.damaged.add(chain)
        if folder == "shard":
            self.untrusted.add((int(name.split("/")[0].removeprefix("shard-")), chain))

    def intrude(self, shard: int, chain: int) -> None:
        """A worker of another run pushes what would fit here."""
        held = self.shards[shard].held[chain]
        push = PushId("other", chain, Incarnation(99, 99), len(held.mark.digests))
        message = Message(self.current[chain], -1, shard, "push", (push, held.mark.last, b"strange", "strange"))
        self.deliver(message)

    # promises

    def check(self) -> None:
        """The promises that hold at every moment."""
        for chain in range(self.num_chains):
            safe = []
            for shard in range(self.num_shards):
                held = self.shards[shard].held[chain]
                require(tuple(held.contents) in self.walked, "a shard holds the first pushes of one attempt, each once")
                require(len(held.contents) == len(held.mark.digests), "the mark is the number of pushes held")
                kept = restored(snapshots_of(self.storage, shard, chain))
                safe.append(len(kept.mark.digests))
            reach = [number for number in self.checkpoints(chain).numbers() if number <= min(safe)]
            now = max(reach, default=0)
            if self.is_deterministic and chain not in self.damaged | self.begun_anew:
                require(now >= self.way_back[chain], "checkpoints that may be needed are kept")
            self.way_back[chain] = now
            calls = self.current[chain].calls.values()
            in_flight = {sequence for _, kind, sequence in calls if kind == "push"}
            require(len(in_flight) <= self.window, "unanswered pushes stay within the window")
            if chain in self.complete and chain not in self.damaged:
                require(min(safe) == self.total, "a complete chain has all its pushes, durably, on every shard")
                contents = {tuple(shard.held[chain].contents) for shard in self.shards}
                require(len(contents) == 1, "a complete chain is the same attempt's on all shards")

    def finish(self) -> bool:
        """The driver looks at every chain that is said to be complete; whether all are."""
        for chain in list(self.complete):
            held = [shard.held[chain] for shard in self.shards]
            if not is_ended({shard: one.record for shard, one in enumerate(held)}):
                self.complete.discard(chain)  # its snapshot was damaged
                continue
            require({len(one.contents) for one in held} == {self.total}, "a chain that is used has all its pushes")
            require(len({tuple(one.contents) for one in held}) == 1, "a chain that is used is one attempt's")
        return len(self.complete) == self.num_chains

    def _start(self, chain: int, restart: bool) -> Attempt:
        self.attempts[chain] += 1
        return Attempt(self, chain, Incarnation(self.driver, self.attempts[chain]), restart)

    def _look_after(self, attempt: Attempt) -> None:
        chain = attempt.chain
        if attempt is not self.current[chain] or not attempt.is_over:
            return
        if attempt.state == "complete":
            self.complete.add(chain)
            return
        require(attempt.state == "conflict", "the newest incarnation is never shut out")
        require(not self.is_deterministic, "a chain that repeats itself exactly has no conflict")
        self.replace(chain, lives_on=False, restart=True)
