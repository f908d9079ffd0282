"""Workers that take tasks one after another, and are replaced when their process or node dies."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ray

from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.resources import Resources, nodes
from patterning_dist.runtime.watch import LOADING, PROGRESS_KEY, Pulse, Watch, has_process

_ROOM_TIMEOUT = 600.0  # seconds without any worker, until the resources of one must have become free
_SAID_AFTER = 15.0  # seconds after which it is said what is waited for
_MAX_LOSSES = 3  # workers that one task may lose, unless its caller has a rule of its own
_LOOK_EVERY = 5.0  # seconds between two looks whether a worker that is loading has its process


class WorkerLost(Exception):
    """What a worker raises whose task was lost through no fault of the task's: it is to be given to another."""


class TaskFailed(WorkerLost):
    """The task itself raised: it is given to a fresh worker once, in case that it was the machine.

    Args:
        cause: what was raised, and where.
        text: the same with the process that it happened in; default: the cause.
    """

    def __init__(self, cause: str, text: str | None = None) -> None:
        super().__init__(cause, text)
        self.cause_text, self.text = cause, text or cause

    def __str__(self) -> str:
        return self.text


class Loss(NamedTuple):
    """A task that was lost: what happened, and what will happen again where the task is to blame; else None."""

    reason: str
    fault: str | None = None


Call = tuple[str, Callable[[ActorHandle, Pulse], ray.ObjectRef]]
Lost = Callable[[int, Loss], Any]  # (index of the task, what happened) -> a result, or None: try again


class Workforce:
    """A number of workers of one kind; as a context, they go at its end.

    Args:
        start_worker: starts one worker; the actor, and a reference that resolves when it can take tasks.
        number: of workers.
        need: what one worker takes, for messages.
        progress: hears what is waited for.
        dismiss: ends a worker, or gives back what one that died leaves behind.
        keep: takes a worker in that is idle at the end; None: it ends.
        has_room: whether a worker that is starting has what it needs, and only loads.
    """

    def __init__(
        self,
        start_worker: Callable[[], tuple[ActorHandle, ray.ObjectRef]],
        number: int,
        need: Resources,
        progress: Progress,
        dismiss: Callable[[ActorHandle], None] = ray.kill,
        keep: Callable[[ActorHandle], None] | None = None,
        has_room: Callable[[ActorHandle], bool] = has_process,
    ) -> None:
        self._dismiss, self._keep, self._has_room = dismiss, keep, has_room
        self._start_worker, self.number, self._need, self._progress = start_worker, number, need, progress
        self._starting: dict[ray.ObjectRef, ActorHandle] = {}
        self._idle: list[ActorHandle] = []
        self._running: dict[ray.ObjectRef, tuple[int, ActorHandle]] = {}
        self._condemned: dict[ray.ObjectRef, Loss] = {}  # of the running: killed, and why
        self._opening: dict[ray.ObjectRef, float] = {}  # of the starting, once they have a process: since when
        self._look_at, self._num_not_opened = 0.0, 0
        self._alone_since = time.monotonic()  # how long there has been no worker at all
        self._said, self._say_again_at = "", 0.0
        for _ in range(number):
            self._start()

    def run(
        self,
        calls: Sequence[Call],
        poll: Callable[[list[Any]], Any],
        watch: Watch,
        lost: Lost | None = None,
    ) -> list[Any]:
        """Hand calls to workers as they become free; results in the order of the calls.

        Args:
            calls: name of a task, as in its notes, and what starts it on a worker; it may be started again elsewhere.
            poll: called about twice a second with the results so far (None: not yet). It may put None in place of a
                result, to have the task run again; while it returns something true it is called again.
            watch: finds tasks without progress, whose workers are killed.
            lost: decides about a task whose worker died; by default it is tried again, a few times.

        Raises:
            PatterningError: no worker found room in time or could be started, or a task has lost too many.
        """
        assert len({name for name, _ in calls}) == len(calls), "notes and beats of a task go by its name"
        results: list[Any] = [None] * len(calls)
        waiting, losses, busy = deque(range(len(calls))), Counter[int](), False

        def give_up(index: int, loss: Loss) -> None:
            losses[index] += 1
            if losses[index] > _MAX_LOSSES:
                raise PatterningError(
                    f"{losses[index]} worker processes died at the same task ({loss.reason}); look for memory or node "
                    "failures, and run the same command again to resume"
                )

        while waiting or self._running or busy:
            while waiting and self._idle:
                index, worker = waiting.popleft(), self._idle.pop()
                name, start = calls[index]
                self._running[start(worker, watch.begin(name))] = (index, worker)
            pending = [*self._running, *self._starting]
            if not pending:
                time.sleep(0.1)
            for reference in ray.wait(pending, timeout=0.5)[0] if pending else ():
                if reference in self._starting:
                    self._started(reference)
                    continue
                # Kept until its result is there: what else a task raises ends this, and its worker has to go too.
                index, worker = self._running[reference]
                watch.end(calls[index][0])
                try:
                    results[index] = ray.get(reference, timeout=watch.timeout)  # on its way from another node
                    del self._running[reference]
                    self._idle.append(worker)
                except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, WorkerLost) as error:
                    del self._running[reference]
                    loss = self._condemned.pop(reference, None) or loss_of(error)
                    if isinstance(error, WorkerLost) and not isinstance(error, TaskFailed):
                        self._idle.append(worker)  # it restarts its ranks with the next task
                    else:  # what a task raised in the middle of something may have left anything behind
                        self._replace(worker)
                    results[index] = (lost or give_up)(index, loss)
                    if results[index] is None:
                        waiting.append(index)
            watch.look()
            self._kill_stalled([name for name, _ in calls], watch)
            self._check_opening(watch.timeout)
            self._check_room(bool(waiting or self._running))
            before = list(results)
            busy = poll(results)
            again = [i for i, (a, b) in enumerate(zip(before, results, strict=True)) if a is not None and b is None]
            waiting.extend(again)
        return results

    def __enter__(self) -> Workforce:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._keep is not None:
            while self._idle:
                self._keep(self._idle.pop())
        # Left to garbage collection, a worker that still waits for room would take it from the next workforce: the
        # traceback of what ended this one keeps the handles.
        for worker in (*self._starting.values(), *self._idle, *(worker for _, worker in self._running.values())):
            with contextlib.suppress(ray.exceptions.RayError):  # no Ray any more: it must not hide what ended this
                self._dismiss(worker)

    def wind_down(self, seconds: float) -> None:
        """Give the tasks under way some time to come to an end of their own."""
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running), timeout=seconds)

    def _start(self) -> None:
        worker, ready = self._start_worker()
        self._starting[ready] = worker

    def _started(self, reference: ray.ObjectRef) -> None:
        worker = self._starting[reference]  # likewise
        self._opening.pop(reference, None)
        try:
            ray.get(reference)
            del self._starting[reference]
            self._idle.append(worker)
            self._num_not_opened = 0
        except WorkerLost:
            del self._starting[reference]
            self._idle.append(worker)  # as above
        except ray.exceptions.RayActorError as error:
            del self._starting[reference]
            if error.actor_init_failed:  # by an error of its own, which would come again
                raise PatterningError(f"a worker cannot be started: {str(error).strip().splitlines()[-1]}") from error
            time.sleep(0.5)  # its node may be on its way out
            self._replace(worker)

    def _replace(self, worker: ActorHandle) -> None:
        self._dismiss(worker)
        self._start()

    def _kill_stalled(self, names: Sequence[str], watch: Watch) -> None:
        """Kill the workers of tasks that make no progress: what comes of that is what comes of a death."""
        for reference, (index, worker) in self._running.items():
            if reference not in self._condemned and (stalled := watch.stalled(names[index])) is not None:
                reason, where = stalled
                # Where the same happens again at the same place, the task hangs and not its machine.
                self._condemned[reference] = Loss(reason, f"no progress in {where}" if where else None)
                self._progress.say(f"{names[index]}: {reason}; its worker is killed, and replaced")
                ray.kill(worker)

    def _check_opening(self, timeout: float) -> None:
        """Kill workers that have a process, and do not come to an end of loading what their tasks are about."""
        now = time.monotonic()
        if not self._starting or now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
        for reference, worker in self._starting.items():
            if reference not in self._opening:
                if has_process(worker):
                    self._opening[reference] = now
            elif now - self._opening[reference] > LOADING * timeout:
                self._num_not_opened += 1
                text = f"a worker did not load what its tasks are about within {LOADING * timeout:.0f} s"
                if self._num_not_opened > _MAX_LOSSES:
                    raise PatterningError(
                        f"{text}, {self._num_not_opened} times; if that takes so long, raise {PROGRESS_KEY} "
                        f"({timeout:g})"
                    )
                self._progress.say(f"{text}; it is replaced")
                del self._opening[reference]
                ray.kill(worker)

    def _check_room(self, is_needed: bool) -> None:
        """Waiting for room is bounded, and says what it waits for."""
        if self._idle or self._running or not is_needed:
            self._alone_since, self._said = time.monotonic(), ""
            return
        now = time.monotonic()
        waited = now - self._alone_since
        if waited < _SAID_AFTER:
            return
        if any(map(self._has_room, self._starting.values())):
            self._alone_since = now
            return
        state = self._need.shortage(nodes())
        if waited > _ROOM_TIMEOUT:
            raise PatterningError(
                f"no worker could be started within {_ROOM_TIMEOUT:g} s: {state}; wait for other work to end or add "
                "nodes, and run the same command again to resume"
            )
        if state != self._said and (not self._said or now >= self._say_again_at):  # dead nodes go from the count late
            self._said, self._say_again_at = state, now + _SAID_AFTER
            self._progress.say(f"waiting for a worker: {state}")


def loss_of(error: BaseException) -> Loss:
    """What became of a task, in one line."""
    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause  # as it was raised in the worker
    fault = error.cause_text if isinstance(error, TaskFailed) else None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "exit" in line.lower() or "died" in line.lower() or "node" in line.lower()]
    return Loss((reasons or lines or [type(error).__name__])[-1].partition(" Some common causes")[0], fault)
