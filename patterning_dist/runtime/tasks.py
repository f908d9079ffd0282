"""Durable tasks: one whose result is stored is not run again, however the driver before this one ended.

The driver stores the results, not the worker that computed them. They pass through the driver anyway, and it alone
holds the lock (at a URL: the lease) of the run: a worker that an earlier driver left behind can write nothing over
them. A kill costs the tasks under way.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import ray

from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.boards import progress_board
from patterning_dist.runtime.watch import Pulse, Watch
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.storage.files import write_npz
from patterning_dist.storage.run import RunDirectory

Result = dict[str, Any]  # of a durable task: arrays, and values that JSON has
Start = Callable[[ActorHandle, Pulse], ray.ObjectRef]


@dataclass(frozen=True)
class Task:
    """A task with a durable result.

    Attributes:
        key: of its notes on the progress board; its name for the user.
        file: of the result, relative to the run directory; .npz.
        fingerprint: of all that the result follows from: a file with another one is written again.
        start: (worker, pulse) -> reference to the result; idempotent, for a lost task is tried again.
    """

    key: str
    file: str
    fingerprint: str
    start: Start


def run_tasks(
    tasks: Sequence[Task],
    run: RunDirectory,
    start_workers: Callable[[int], Workforce],
    progress: Progress,
    label: str,
    *,
    what: str,
    timeout: float,
    steps: int = 1,
) -> Sequence[Result]:
    """Run the tasks that have no stored result, side by side, and store each result as it comes.

    Args:
        tasks: in the order in which they are begun.
        run: holds the files.
        start_workers: (number of tasks left) -> workers for them; not called if none is left. The caller ends them.
        progress: shows what is done.
        label: of the bar.
        what: the tasks are, for messages.
        timeout: ``sampling.progress_timeout`` [s].
        steps: of progress that each task makes; one that notes none makes all at its end.

    Returns:
        Every result, in the order of the tasks, read from its file whenever it is asked for: all of them may be
        more than this process can hold.
    """
    run.location.fetch(*{str(Path(task.file).parent) for task in tasks})
    is_done = [_read(run.path / task.file, task, progress) is not None for task in tasks]
    missing = [index for index, done in enumerate(is_done) if not done]
    stored = _Stored(tasks, run, progress)
    if len(missing) < len(tasks):
        progress.say(f"{len(tasks) - len(missing)} of {len(tasks)} {what} were done before")
    if not missing:
        return stored
    workers = start_workers(len(missing))
    watch = Watch(progress_board(), timeout, progress.say)
    progress.start(label, len(missing) * steps)

    def poll(results: list[Result | None]) -> None:
        new = []
        for place, (index, result) in enumerate(zip(missing, results, strict=True)):
            if result is not None and not is_done[index]:
                new.append(run.path / tasks[index].file)
                _write(new[-1], result, tasks[index].fingerprint)
                is_done[index], results[place] = True, {}
        if new:
            run.publish(*new)
        for key, note in sorted(watch.notes.items()):
            progress.update_line(key, **note)
        done = [steps if is_done[i] else watch.notes.get(tasks[i].key, {"done": 0})["done"] for i in missing]
        progress.update(sum(done))

    workers.run([(tasks[index].key, tasks[index].start) for index in missing], poll, watch)
    return stored


class _Stored(Sequence[Result]):
    def __init__(self, tasks: Sequence[Task], run: RunDirectory, progress: Progress) -> None:
        self._tasks, self._run, self._progress = tasks, run, progress

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Result]: ...
    def __getitem__(self, index: int | slice) -> Result | Sequence[Result]:
        if isinstance(index, slice):
            return _Stored(self._tasks[index], self._run, self._progress)
        task = self._tasks[index]
        if (result := _read(self._run.path / task.file, task, self._progress)) is None:
            raise PatterningError(
                f"{self._run.path / task.file}: is gone or damaged since it was written; run the same command again"
            )
        return result


def _write(file: Path, result: Result, fingerprint: str) -> None:
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    header = {name: value for name, value in result.items() if name not in arrays} | {"fingerprint": fingerprint}
    header["digest"] = digest(arrays, header)
    write_npz(file, arrays | {"header": np.array(json.dumps(header))})


def _read(file: Path, task: Task, progress: Progress) -> Result | None:
    """The stored result; None if there is none of these inputs, or if it is damaged, which is said."""
    try:
        # From memory: of a torn file numpy would forget to close it.
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = json.loads(str(arrays.pop("header")))
        intact = header.pop("digest") == digest(arrays, header)
    except FileNotFoundError:
        return None
    except Exception:  # there is hardly an error that a damaged file does not raise in numpy
        intact = False
    if not intact:
        progress.say(f"{file} is damaged: {task.key} is computed again")
        return None
    return arrays | header if header.pop("fingerprint") == task.fingerprint else None


def digest(arrays: dict[str, np.ndarray], header: Result) -> str:
    """SHA-256 of arrays by name, and of values that JSON has."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
