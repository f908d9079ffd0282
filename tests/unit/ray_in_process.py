"""Ray without processes: actors are objects of this process, and any of them dies at a moment of one's choice.

Only ``.remote``, ``ray.get``, ``ray.wait`` and what asks after the cluster are replaced. Every moment at which
something leaves a process has a number: a call of an actor, and a file that is written or deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import ray

from patterning_dist.runtime import boards, model_workers, resources, watch, workforce
from patterning_dist.runtime.chains import aggregator, attempt, pushes, run
from patterning_dist.runtime.resources import Node

Moment = tuple[str, str, str]  # (who, of whom, what): worker, AggregatorShard, push
_UNAVAILABLE = 2  # calls that find a shard not yet restarted


class ProcessDied(BaseException):
    """Unwinds what a process was doing; nothing in the process may catch it."""

    def __init__(self, process: Actor | None) -> None:
        super().__init__()
        self.process = process  # None: the driver, and with it all the others


# Decides what happens at a moment, by its number: nothing (None), or one of ``kinds`` of it.
Strike = Callable[[int, Moment], str | None]


def kinds(moment: Moment) -> tuple[str, ...]:
    """What can happen at a moment.

    ``caller`` or ``callee`` dies before or after the callee has done its work, or a file is changed; the answer is lost
    on the way; the message is late, and its sender dead meanwhile; the driver is killed, or told to stop.
    """
    who, whom, what = moment
    if whom == "files":
        return "caller before", "caller after"
    if (who, whom) == ("ModelWorker", "AggregatorShard"):
        either = ("caller before", "caller after", "callee before", "callee after", "answer lost", "late")
        return *either, "driver", "stop"
    if whom == "AggregatorShard" and what not in ("stop", "ping"):
        return "callee before", "callee after", "driver"
    return ("callee before", "driver") if whom == "ModelWorker" else ()


@dataclass
class Actor:
    """A process: how to make its object, and the object while it lives."""

    world: World
    make: Callable[[], Any]
    name: str
    restarts: bool
    living: Any = None
    unavailable: int = 0
    life: int = 0

    def __getattr__(self, method: str) -> Remote:
        if method.startswith("__"):
            raise AttributeError(method)
        return Remote(self, method)

    def die(self) -> None:
        self.living, self.life, self.unavailable = None, self.life + 1, _UNAVAILABLE


@dataclass
class Remote:
    actor: Actor
    method: str

    def remote(self, *arguments: Any, **options: Any) -> Reference:
        return self.actor.world.call(self.actor, self.method, arguments, options)


@dataclass(eq=False)
class Reference:
    """An answer; that of an actor which died before it was fetched never comes."""

    actor: Actor
    life: int
    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        if self.error is None and self.actor.restarts and self.life != self.actor.life:
            raise ray.exceptions.RayActorError
        if self.error is not None:
            raise self.error
        return self.value


@dataclass
class ActorClass:
    """Takes the place of what ``ray.remote`` makes of a class."""

    world: World
    original: Any

    def options(self, **_: Any) -> ActorClass:
        return self

    def remote(self, *arguments: Any) -> Actor:
        original = self.original.__ray_actor_class__
        return Actor(self.world, lambda: original(*arguments), original.__name__, original.__name__ != "ModelWorker")


@dataclass
class Clock:
    """Takes the place of the module ``time``: a second passes with every call, and with every wait what it takes."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Files:
    """A ``Storage`` in memory, whose changes are moments of the process that makes them."""

    world: World
    contents: dict[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        if name not in self.contents:
            raise FileNotFoundError(name)
        return self.contents[name]

    def write(self, name: str, content: bytes) -> None:
        self.world.change("write", name, lambda: self.contents.__setitem__(name, content))

    def delete(self, name: str) -> None:
        self.world.change("delete", name, lambda: self.contents.pop(name, None))

    def names(self, folder: str) -> list[str]:
        return sorted(n.removeprefix(f"{folder}/") for n in self.contents if n.startswith(f"{folder}/"))

    def clear(self, folder: str) -> None:
        for name in self.names(folder):
            self.delete(f"{folder}/{name}")


class World:
    """All processes and files of one run of chains.

    Args:
        strike: what goes wrong, and when.
    """

    def __init__(self, strike: Strike) -> None:
        self.strike, self.clock, self.files = strike, Clock(), Files(self)
        self.moments: list[Moment] = []
        self.stack: list[Actor] = []  # who is at work: the driver when empty
        self.shards: list[Actor] = []
        self.late: tuple[int, Callable[[], Any]] | None = None
        self.is_over = self.is_told_to_stop = False

    @property
    def who(self) -> str:
        return self.stack[-1].name if self.stack else "driver"

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """For as long as the patch lasts, all that this process asks of Ray happens here."""
        for module in (aggregator, attempt, boards, pushes, run, watch, workforce):
            patch.setattr(module, "time", self.clock)
        patch.setattr(watch.Pulse, "sent", lambda pulse: contextlib.nullcontext())
        for module in (watch, workforce):
            patch.setattr(module, "has_process", lambda actor: True)
        patch.setattr(run, "AggregatorShard", ActorClass(self, aggregator.AggregatorShard))
        patch.setattr(model_workers, "ModelWorker", ActorClass(self, model_workers.ModelWorker))
        patch.setattr(run, "progress_board", ActorClass(self, boards.ProgressBoard).remote)
        for module in (resources, workforce):
            patch.setattr(module, "nodes", lambda: [Node("here", "here", {"CPU": 1.0}, {"CPU": 1.0})])
        for name, function in {
            "get": self._get,
            "wait": self._wait,
            "kill": _kill,
            "is_initialized": lambda: True,
        }.items():
            patch.setattr(ray, name, function)
        patch.setattr(  # they were ray.kill and has_process when it was defined
            workforce.Workforce.__init__, "__defaults__", (_kill, None, lambda actor: True)
        )

    def restart(self) -> None:
        """A new driver, on the same files."""
        self.stack, self.shards, self.late, self.is_over, self.is_told_to_stop = [], [], None, False, False

    def call(self, actor: Actor, method: str, arguments: tuple, options: dict[str, Any]) -> Reference:
        """One call of an actor, done at once, unless this is where something happens to it."""
        kind = self._at((self.who, actor.name, method))
        self.clock.now += 1
        self._deliver_late()
        if kind == "caller before":
            raise self._death()
        if kind == "late":
            self.late = (len(self.moments) + 8, lambda: self._do(actor, method, arguments, options))
            raise self._death()
        if kind == "callee before":
            actor.die()
        reference = self._do(actor, method, arguments, options)
        if kind == "callee after":
            actor.die()
            reference.error = ray.exceptions.RayActorError()
        if kind == "answer lost":
            reference.error = ray.exceptions.GetTimeoutError()
        if kind == "caller after":
            raise self._death()
        return reference

    def change(self, what: str, name: str, do: Callable[[], Any]) -> None:
        """One change of a file by whoever is at work."""
        kind = self._at((self.who, "files", what))
        if kind == "caller before":
            raise self._death()
        do()
        if kind == "caller after":
            raise self._death()

    def _death(self) -> ProcessDied:
        """Of whoever is at work."""
        self.is_over = not self.stack
        return ProcessDied(self.stack[-1] if self.stack else None)

    def _at(self, moment: Moment) -> str | None:
        if self.is_over:
            raise ProcessDied(None)
        kind = self.strike(len(self.moments), moment)
        self.moments.append(moment)
        if kind == "driver":
            self.is_over = True
            raise ProcessDied(None)
        if kind == "stop":
            self.is_told_to_stop = True
            for shard in self.shards:  # as the driver does, while the chains are under way
                self._do(shard, "stop", (), {})
        return kind

    def _deliver_late(self) -> None:
        if self.late is not None and len(self.moments) >= self.late[0]:
            (_, deliver), self.late = self.late, None
            deliver()

    def _do(self, actor: Actor, method: str, arguments: tuple, options: dict[str, Any]) -> Reference:
        reference = Reference(actor, actor.life)
        if actor.unavailable:
            actor.unavailable -= 1
            reference.error = ray.exceptions.RayActorError()
            return reference
        self.stack.append(actor)
        try:
            if actor.living is None:
                actor.living = actor.make()
            if actor.name == "AggregatorShard" and actor not in self.shards:
                self.shards.append(actor)
            result = getattr(actor.living, method)(*map(_sent, arguments), **options)
            reference.value = result
        except ProcessDied as death:
            if death.process is not actor:  # of its caller, or of all
                raise
            actor.die()
            reference.error = ray.exceptions.RayActorError()
        except Exception as error:
            reference.error = error
        finally:
            self.stack.pop()
        return reference

    def _get(self, references: Reference | list[Reference], timeout: float | None = None) -> Any:
        return [r.get() for r in references] if isinstance(references, list) else references.get()

    def _wait(self, references: list[Reference], **_: Any) -> tuple[list[Reference], list[Reference]]:
        if self.is_over:
            raise ProcessDied(None)
        if self.is_told_to_stop and not self.stack:
            self.is_told_to_stop = False
            raise KeyboardInterrupt
        self.clock.now += 0.1
        return references, []


def _kill(actor: Actor) -> None:
    """Nothing is left running here, whoever forgets it."""


def _sent(argument: Any) -> Any:
    """As it arrives: nobody can change what it was made of, or it."""
    if not isinstance(argument, np.ndarray):
        return argument
    copy = argument.copy()
    copy.setflags(write=False)
    return copy
