"""Windows walked on workers, a task a subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.chains.attempt import MakeStudy
from patterning_dist.runtime.pool import Call, pool_tasks
from patterning_dist.runtime.tasks import Result
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.walk import NUM_SPREAD, Window, walk


def walk_windows(
    opener: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    run: RunDirectory,
    windows: Mapping[str, Window],
    inputs: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Result]:
    """Walk the windows of subjects, see ``training.walk``.

    Args:
        opener: opens the subjects in a worker; the component of each is all that its training moves.
        sampling: section of the experiment.
        device: of the workers.
        run: holds the results: what an earlier driver got done is kept.
        windows: of the subjects.
        inputs: subject -> JSON of hashes of all that its result follows from besides.
        progress: shows the subjects done.

    Returns:
        Subject -> what ``walk`` returns of it.
    """
    calls = [
        Call(name, name, _settings(windows[name]), _walk, (name, windows[name]), file=f"{name}.npz") for name in inputs
    ]
    with pool_tasks(opener, sampling, device, run, inputs.__getitem__, len(calls), progress) as run_calls:
        return dict(zip(inputs, run_calls("walking the windows", calls), strict=True))


def _settings(window: Window) -> list[Any]:
    sections = [section.model_dump(mode="json") for section in (window.training, window.settings)]
    return [sections[0], len(window.factors), window.tau, window.clipping, NUM_SPREAD, sections[1]]


def _walk(worker: Any, name: str, window: Window) -> Result:
    return walk(worker.study, name, window)
