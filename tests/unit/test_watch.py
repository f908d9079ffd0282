"""What makes no progress is said, and then given up; what is slow, or not heard for another's sake, is not."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from patterning_dist import heartbeat
from patterning_dist.runtime import watch
from patterning_dist.runtime.boards import _Board
from patterning_dist.runtime.watch import Watch

TIMEOUT = 40.0


@dataclass
class Actor:
    """One that answers, unless it is stopped; it is made again when it is killed."""

    living: Any
    is_stopped: bool = False
    is_starting: bool = False
    num_killed: int = 0

    def __getattr__(self, method: str) -> Any:
        return Remote(self, method)


@dataclass
class Remote:
    actor: Actor
    method: str

    def remote(self, *arguments: Any) -> Answer:
        return Answer(self.actor, lambda: getattr(self.actor.living, self.method)(*arguments))


@dataclass(eq=False)
class Answer:
    actor: Actor
    call: Any


class Shard:
    def ping(self) -> None:
        pass


@dataclass
class Scene:
    """A watch, its clock, and what it says."""

    now: float = 0.0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.board, self.shard = Actor(_Board()), Actor(Shard())

    def monotonic(self) -> float:
        return self.now

    def pass_by(self, seconds: float, step: float = 0.5, beats: dict[str, float] | None = None) -> None:
        """Time goes by; ``beats``: names, and the seconds between two beats of each."""
        end = self.now + seconds
        while self.now < end:
            self.now += step
            for name, every in (beats or {}).items():
                if not self.board.is_stopped:
                    self.board.living.beat(name, "process", int(self.now / every), "draw 3")
            self.watch.look()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene()

    def kill(actor: Actor, no_restart: bool) -> None:
        assert not no_restart
        actor.is_stopped, actor.num_killed, actor.living = False, actor.num_killed + 1, type(actor.living)()

    monkeypatch.setattr(watch, "time", scene)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([], refs) if refs[0].actor.is_stopped else (refs, []))
    monkeypatch.setattr(ray, "get", lambda reference, timeout: copy.deepcopy(reference.call()))
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(watch, "has_process", lambda actor: not actor.is_starting)
    scene.watch = Watch(scene.board, TIMEOUT, scene.said.append)
    scene.watch.guard("shard 0", scene.shard, "and comes back")
    return scene


def test_silence_is_said_and_then_ends(scene: Scene) -> None:
    name = scene.watch.begin("chain 3").name
    scene.board.living.note("chain 3", done=17, total=320)
    scene.pass_by(5, beats={name: 0.5})
    scene.pass_by(8)
    assert not scene.said
    scene.pass_by(8)
    assert scene.said == ["chain 3 has shown nothing for 10 s: 17 of 320 done, in draw 3"]
    assert scene.watch.stalled("chain 3") is None
    scene.pass_by(30)
    assert len(scene.said) == 1
    assert scene.watch.stalled("chain 3") == (
        "no progress for 46 s, 17 of 320 done, in draw 3; sampling.progress_timeout is 40 s",
        "draw 3",
    )
    scene.watch.end("chain 3")
    scene.watch.begin("chain 3")  # on another worker
    scene.pass_by(20, beats={name: 0.5})  # as before: of the worker that was given up
    assert scene.watch.stalled("chain 3") is None
    assert scene.said[1:] == ["chain 3 has shown nothing for 10 s: 17 of 320 done"]


def test_what_is_slow_has_the_time_that_it_takes(scene: Scene) -> None:
    name = scene.watch.begin("chain 3").name
    scene.pass_by(90, beats={name: 30.0})
    scene.said.clear()
    scene.pass_by(110)
    assert scene.watch.stalled("chain 3") is None and len(scene.said) == 1
    scene.pass_by(30)
    assert scene.watch.stalled("chain 3") is not None


def test_what_loads_its_model_has_longer(scene: Scene) -> None:
    name = scene.watch.begin("chain 3").name
    scene.board.living.beat(name, "process", 0, "")
    scene.pass_by(110)
    assert scene.watch.stalled("chain 3") is None
    scene.pass_by(20)
    assert scene.watch.stalled("chain 3") == (
        "no progress for 130 s, nothing done yet; sampling.progress_timeout is 40 s",
        "",
    )


def test_nobody_is_blamed_for_the_silence_of_the_board_or_of_the_driver(scene: Scene) -> None:
    name = scene.watch.begin("chain 3").name
    scene.pass_by(5, beats={name: 0.5})
    scene.pass_by(600, step=600)  # this process was stopped
    scene.board.is_stopped = True
    scene.pass_by(39)
    assert scene.watch.stalled("chain 3") is None and scene.board.num_killed == 0
    assert scene.said == ["the progress board has shown nothing for 10 s: no answer"]
    scene.pass_by(3)
    assert scene.board.num_killed == 1 and not scene.board.is_stopped
    assert scene.said[1:] == ["the progress board: no answer for 40 s; it is killed, and made again"]
    scene.pass_by(30)
    assert scene.watch.stalled("chain 3") is None
    scene.pass_by(10)
    assert scene.watch.stalled("chain 3") is not None  # it has been heard of no more


def test_an_actor_is_killed_for_silence_and_not_for_a_long_call_with_progress(scene: Scene) -> None:
    scene.pass_by(30)
    scene.shard.is_stopped = True
    scene.pass_by(200, beats={"shard 0": 2.0})
    assert scene.shard.num_killed == 0 and not scene.said
    scene.pass_by(60)
    assert scene.shard.num_killed == 1
    assert scene.said == [
        "shard 0 has shown nothing for 10 s: no answer",
        "shard 0: no answer for 40 s; it is killed, and comes back",
    ]


def test_an_actor_that_is_being_made_has_all_the_time_that_it_takes(scene: Scene) -> None:
    for actor in (scene.board, scene.shard):
        actor.is_stopped = actor.is_starting = True
    scene.pass_by(500)
    assert scene.shard.num_killed == scene.board.num_killed == 0 and not scene.said
    scene.board.is_starting = False
    scene.pass_by(60)
    assert scene.shard.num_killed == 0 and scene.board.num_killed == 1


def test_beats_of_what_has_ended_are_forgotten(scene: Scene) -> None:
    names = [scene.watch.begin(f"task {n}").name for n in range(3)]
    scene.pass_by(2, beats=dict.fromkeys(names, 0.5))
    for n in (0, 2):
        scene.watch.end(f"task {n}")
    scene.pass_by(1)
    assert list(scene.board.living._beats) == names[1:2]


def test_places_are_kept_with_what_is_raised_in_them() -> None:
    before, _ = heartbeat.state()
    with pytest.raises(ValueError, match="boom") as caught, heartbeat.inside("draw 6"):
        assert heartbeat.where() == "draw 6"
        with heartbeat.inside("observable norm"):
            heartbeat.beat()
            raise ValueError("boom")
    assert heartbeat.raised_in(caught.value) == "draw 6, observable norm"
    assert heartbeat.where() == "" == heartbeat.raised_in(ValueError())
    assert heartbeat.state()[0] == before + 5
