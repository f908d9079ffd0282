"""Progress has a deadline: a worker, shard or board that is stopped, hung or slow is found as surely as one that died.

Whatever computes beats (``patterning_dist.heartbeat``); a thread of its process sends the count to the board, and the
driver looks by its own clock whether it changes. After a while without a change that is said; after
``sampling.progress_timeout``, or a multiple of the longest pause there has been, the process is killed. From there on
it is one that died, and is replaced as such.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from patterning_dist import heartbeat
from patterning_dist.runtime.actor import ActorHandle

_SEND_EVERY = 1.0  # seconds between two counts that a process sends
_ASK_EVERY = 5.0  # seconds between two questions to an actor that has no task of its own
_WAIT_FOR_BOARD = 1.0  # seconds, in one look
_MOST = 5.0  # seconds that one look counts for: this process may have been stopped itself
_SAID_AFTER, _SAID_SHARE = 30.0, 0.25  # seconds of silence until it is said, and their largest share of the time-out
_PAUSES = 4  # the longest pause so far, times this, is never too long: slow models are not killed
LOADING = 3  # time-outs for what loads a model: there are no beats in that
PROGRESS_KEY = "sampling.progress_timeout"


class Pulse(NamedTuple):
    """Goes with a task to its worker: the board, and the name under which the task's beats are kept there."""

    board: ActorHandle
    name: str

    @contextlib.contextmanager
    def sent(self) -> Iterator[None]:
        """While this is entered, the beats of this process go to the board; a rank is one process of several."""
        over, process = threading.Event(), uuid.uuid4().hex

        def send() -> None:
            last = None
            while True:
                if (state := heartbeat.state()) != last:
                    last = state
                    self.board.beat.remote(self.name, process, *state)
                if over.wait(_SEND_EVERY):
                    return

        thread = threading.Thread(target=send, name="patterning-pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def with_pulse(worker: Any, pulse: Pulse, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(worker, *arguments)`` in a worker, its beats sent."""
    with pulse.sent():
        return function(worker, *arguments)


def has_process(actor: ActorHandle) -> bool:
    """Whether an actor is there: neither waiting for room, nor being made, nor dead."""
    return ray._private.state.actors(actor._actor_id.hex()).get("State") == "ALIVE"


@dataclass
class _Silence:
    """How long there has been no other sign than the last."""

    seconds: float = 0.0
    sign: Any = None
    num_signs: int = 0
    is_said: bool = False
    longest: float = 0.0

    def look(self, sign: Any, passed: float) -> None:
        if sign == self.sign:
            self.seconds += passed
            return
        if self.num_signs > 1:  # before that something was loaded
            self.longest = max(self.longest, self.seconds)
        self.sign, self.seconds, self.is_said = sign, 0.0, False
        self.num_signs += 1


@dataclass
class _Guarded:
    """An actor that is asked for an answer now and then."""

    actor: ActorHandle
    name: str
    remedy: str
    silence: _Silence = field(default_factory=_Silence)
    answer: ray.ObjectRef | None = None
    ask_at: float = 0.0


class Watch:
    """The driver's eye on all that works for it; ``look`` is to be called about twice a second, and never waits long.

    Args:
        board: that tasks send notes and beats to; on the driver's node.
        timeout: seconds without progress, see ``sampling.progress_timeout``.
        tell: takes lines for the user.
    """

    def __init__(self, board: ActorHandle, timeout: float, tell: Callable[[str], None]) -> None:
        self.board, self.timeout, self._tell = board, timeout, tell
        self.notes: dict[str, dict[str, Any]] = {}  # of the tasks, as last heard
        self._looked, self._num_begun, self._longest = time.monotonic(), 0, 0.0
        self._names: dict[str, str] = {}  # task -> name of its beats
        self._silences: dict[str, _Silence] = {}  # by task
        self._guarded: list[_Guarded] = []
        self._board = _Guarded(board, "the progress board", "and made again")

    def begin(self, task: str) -> Pulse:
        """A task is about to be given to a worker; what the one before sends from now on is not its own."""
        self._num_begun += 1
        self._names[task], self._silences[task] = f"{task} #{self._num_begun}", _Silence()
        return Pulse(self.board, self._names[task])

    def end(self, task: str) -> None:
        """A task has come to an end, of whatever kind."""
        self._names.pop(task, None)
        self._silences.pop(task, None)

    def guard(self, name: str, actor: ActorHandle, remedy: str) -> None:
        """Watch an actor with a method ``ping``, which is restarted where it is killed; its beats go by its name."""
        self._guarded.append(_Guarded(actor, name, remedy))

    def pulse(self, name: str) -> Pulse:
        """For a long call of an actor that is guarded under this name."""
        return Pulse(self.board, name)

    def look(self) -> None:
        """Hear the board; say what has been silent for a while, and kill what is guarded and silent for too long."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _MOST), now
        beats = self._hear(passed)
        for guarded in self._guarded:
            self._ask(guarded, now, passed, None if beats is None else beats.get(guarded.name))
        if beats is None:
            return  # tasks may have sent what nobody could take
        for task, silence in self._silences.items():
            silence.look(beats.get(self._names[task]), passed)
            self._longest = max(self._longest, silence.longest)
            self._say(silence, task, self._where(task))

    def stalled(self, task: str) -> tuple[str, str] | None:
        """What is to be said of a task that has made no progress for too long, and where it was (empty: nowhere)."""
        silence = self._silences[task]
        is_loading = silence.num_signs < 2  # the first is that it has been begun
        if silence.seconds <= self._most(silence) * (LOADING if is_loading else 1):
            return None
        words = f"no progress for {silence.seconds:.0f} s, {self._where(task)}; {PROGRESS_KEY} is {self.timeout:g} s"
        return words, self._places(task)

    def _hear(self, passed: float) -> dict[str, Any] | None:
        """Beats by name and process, or None as long as the board is silent."""
        asked = self._board
        if asked.answer is None:
            names = [*self._names.values(), *(guarded.name for guarded in self._guarded)]
            asked.answer = self.board.read.remote(names)
        if not ray.wait([asked.answer], timeout=_WAIT_FOR_BOARD)[0]:
            asked.silence.look(asked.silence.sign, passed)
            self._judge(asked)
            return None
        reference, asked.answer, asked.silence = asked.answer, None, _Silence()
        try:
            self.notes, beats = ray.get(reference, timeout=_WAIT_FOR_BOARD)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None
        return beats

    def _ask(self, guarded: _Guarded, now: float, passed: float, beats: Any) -> None:
        if guarded.answer is None:
            if now < guarded.ask_at:
                return
            guarded.answer, guarded.silence = guarded.actor.ping.remote(), _Silence(sign=beats)
        if ray.wait([guarded.answer], timeout=0)[0]:  # or dead: Ray restarts it
            guarded.answer, guarded.ask_at = None, now + _ASK_EVERY
            return
        guarded.silence.look(beats if beats is not None else guarded.silence.sign, passed)
        self._judge(guarded)

    def _judge(self, guarded: _Guarded) -> None:
        if guarded.silence.seconds > self._after(guarded.silence) and not has_process(guarded.actor):
            guarded.silence.seconds = 0.0  # it is still, or again, on its way
        self._say(guarded.silence, guarded.name, "no answer")
        if guarded.silence.seconds > self._most(guarded.silence):
            self._tell(f"{guarded.name}: no answer for {guarded.silence.seconds:.0f} s; it is killed, {guarded.remedy}")
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(guarded.actor, no_restart=False)
            guarded.silence = _Silence(sign=guarded.silence.sign, is_said=True)

    def _most(self, silence: _Silence) -> float:
        return max(self.timeout, _PAUSES * max(self._longest, silence.longest))

    def _after(self, silence: _Silence) -> float:
        """Seconds until silence is said."""
        own = min(_SAID_AFTER, _SAID_SHARE * self.timeout)
        return max(own, _PAUSES / 2 * max(self._longest, silence.longest))

    def _say(self, silence: _Silence, name: str, what: str) -> None:
        if silence.seconds > self._after(silence) and not silence.is_said:
            silence.is_said = True
            self._tell(f"{name} has shown nothing for {silence.seconds:.0f} s: {what}")

    def _where(self, task: str) -> str:
        note = self.notes.get(task)
        done = f"{note['done']} of {note['total']} done" if note else "nothing done yet"
        places = self._places(task)
        return f"{done}, in {places}" if places else done

    def _places(self, task: str) -> str:
        """Where the processes of a task said they were."""
        processes = self._silences[task].sign or {}
        return " and ".join(dict.fromkeys(place for _, place in processes.values() if place))
