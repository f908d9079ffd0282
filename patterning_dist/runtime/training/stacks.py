"""Stacks of small networks trained on Ray, a task a stack; a stack that is done is a file, and is not trained again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import ray
from ray.actor import ActorHandle

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.behaviour import Behaviour
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.chains.workers import fitting_workforce, progress_board
from patterning_dist.runtime.environment import ray_session
from patterning_dist.runtime.training.stack_worker import StackTask, StackTrainer, Trained
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.storage.files import write_npz
from patterning_dist.storage.mirror import Place


def train_stacks(
    config: ParenthesesConfig,
    device: str,
    place: Place,
    inputs: str,
    stacks: Sequence[StackTask],
    folder: Path,
    publish: Callable[[Path], None],
    progress: Progress,
) -> list[Trained]:
    """Train the stacks of which there is no file yet, side by side, and write one each.

    Args:
        config: of the run.
        device: of the trainers.
        place: of the run; its strings are read.
        inputs: hash of the strings and of the settings of a training.
        stacks: in the order in which they are begun.
        folder: of the files, <arm>-<first seed>.npz.
        publish: is given each file as soon as it is there.
        progress: shows the steps done, and the time left.

    Returns:
        All stacks, in their order.

    Raises:
        PatterningError: a network's parameters are not finite, or the cluster has no room.
    """
    files = [folder / f"{stack.arm}-{stack.seeds[0]}.npz" for stack in stacks]
    prints = [stack.fingerprint(inputs) for stack in stacks]
    found = [_read(file, fingerprint) for file, fingerprint in zip(files, prints, strict=True)]
    missing = [index for index, trained in enumerate(found) if trained is None]
    if not missing:
        return found
    if len(missing) < len(stacks):
        progress.say(f"{len(stacks) - len(missing)} of {len(stacks)} stacks of networks were trained before")
    with (
        ray_session(config.sampling.threads_per_worker),
        _trainers(config, device, place, len(missing), progress) as on,
    ):
        board = progress_board()
        progress.start("training networks (steps)", len(missing) * config.training.num_steps)

        def poll(results: list[Trained | None]) -> None:
            for index, trained in zip(missing, results, strict=True):
                if trained is not None and found[index] is None:
                    _refuse_not_finite(stacks[index], trained)
                    found[index] = trained
                    _write(files[index], trained, prints[index])
                    publish(files[index])
            notes = ray.get(board.read.remote())
            for key, note in sorted(notes.items()):
                progress.update_line(key, **note)
            progress.update(sum(note["done"] for note in notes.values()))

        on.run([lambda worker, s=stacks[index]: worker.train.remote(s, board) for index in missing], poll)
    return found


def _trainers(config: ParenthesesConfig, device: str, place: Place, number: int, progress: Progress) -> Workforce:
    def start(options: dict[str, int]) -> tuple[ActorHandle, ray.ObjectRef]:
        trainer = StackTrainer.options(**options).remote(config, device)
        return trainer, trainer.open.remote(place)

    return fitting_workforce(start, config.sampling, device, number, progress)


def _refuse_not_finite(stack: StackTask, trained: Trained) -> None:
    for name, values in trained.parameters.items():
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        if len(bad):
            raise PatterningError(
                f"arm {stack.arm}: {name} of the network of seed {stack.seeds[bad[0]]} is not finite after training; "
                "lower training.learning_rate"
            )


def _write(file: Path, trained: Trained, fingerprint: str) -> None:
    arrays: dict[str, Any] = {f"parameters/{name}": values for name, values in trained.parameters.items()}
    arrays |= {f"behaviour/{name}": values for name, values in trained.behaviour._asdict().items()}
    write_npz(file, arrays | {"header": np.array(json.dumps({"fingerprint": fingerprint}))})


def _read(file: Path, fingerprint: str) -> Trained | None:
    """The networks of a file; None if there is none, or one of other inputs."""
    try:
        with np.load(io.BytesIO(file.read_bytes())) as stored:
            header = json.loads(str(stored["header"]))
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
    if header.get("fingerprint") != fingerprint:
        return None

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): values for n, values in arrays.items() if n.startswith(prefix)}

    return Trained(under("parameters/"), Behaviour(**under("behaviour/")))
