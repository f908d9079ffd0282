"""A queue: trainings one after another in a Ray Train ``TorchTrainer``, which is started again when a worker dies."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.actor import ActorHandle
from patterning_dist.runtime.environment import resolve_device, users_error
from patterning_dist.runtime.resources import nodes, training_resources
from patterning_dist.runtime.training.checkpoints import catch_sigterm, newest_step
from patterning_dist.runtime.training.worker import train_on_worker

# Ray Train waits a minute for the resources of a group: so many minutes a queue waits for what the cluster has lost.
_STARTS = 10


class _Torch(TorchConfig):
    """Torch process groups whose workers save their state on SIGTERM; handlers are set in a process's main thread."""

    @property
    def backend_cls(self) -> type[Backend]:
        parent: Any = super().backend_cls

        class CatchesSigterm(parent):
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                super().on_start(worker_group, backend_config)
                worker_group.execute(catch_sigterm)

        return CatchesSigterm


class _Trainer(TorchTrainer):
    """Without the actor that Ray Train starts for its own kind of data sets: trainings read none."""

    def _create_default_callbacks(self) -> list[Any]:
        parent: Any = super()  # checkers know the first version of Ray Train only
        return [
            callback for callback in parent._create_default_callbacks() if not isinstance(callback, DatasetsCallback)
        ]


def run_queue(arguments: dict[str, Any], name: str) -> None:
    """Train jobs until all are finished or the driver asks to stop.

    Only restarts without progress count against ``retrain.max_failures``: machines that die every day do not end a
    training of weeks, and one that dies at the same step again and again does.

    Args:
        arguments: those of ``train_on_worker``.
        name: of the queue.

    Raises:
        PatterningError: too many restarts without progress, no room in the cluster, or what a training raised for
            the user.
    """
    config, groups, control = (arguments[key] for key in ("config", "groups", "control"))
    failures, starts = 0, 0
    before = _progress(arguments)
    while True:
        try:
            _fit(arguments, name)
            return
        except (TrainingFailedError, RayActorError) as error:
            if (wrong := users_error(error)) is not None:
                raise wrong from None
            if ray.get(control.stopping.remote()):
                return
            if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
                starts = _wait_for_room(config, groups[0].lead.num_workers, control, starts)
                continue
            reason = _reason(error)
        starts, now = 0, _progress(arguments)
        failures = 1 if now > before else failures + 1
        before = now
        unfinished = [group for group in groups if not group.is_finished(config)]
        if not unfinished:
            return
        job = unfinished[0].lead
        where = f"step {now[1]} of {job.total_steps}"
        if failures > config.max_training_failures:
            raise PatterningError(
                f"{job.name}: a worker died {failures} times without getting further than {where} ({reason}); finished "
                "trainings are kept: look for memory or node failures, raise retrain.max_failures if machines die "
                "often, and run the same command to go on from there"
            )
        text = f"{job.name}: a worker died ({reason}); starting again from {where}"
        control.tell.remote("job_restarted", text, job=job.name, step=now[1])


def _fit(arguments: dict[str, Any], name: str) -> None:
    config, location, groups = (arguments[key] for key in ("config", "location", "groups"))
    device = resolve_device(config.device)
    need = training_resources(config, device, groups[0].lead.num_workers)
    # Ray Train counts every restart, this module those without progress. Checkers know its first version only.
    no_restarts: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0}
    # Nor the one that watches for preemption: workers catch SIGTERM themselves.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _Trainer(
        train_on_worker,
        train_loop_config=arguments,
        torch_config=_Torch(backend="gloo" if device == "cpu" else "nccl"),
        scaling_config=ScalingConfig(
            num_workers=need.num_ranks,
            use_gpu=need.gpus > 0,
            resources_per_worker=need.bundle,
            placement_strategy=need.fit(nodes()).strategy,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(location.path / "retrain" / ".ray"),
            failure_config=FailureConfig(**no_restarts),
        ),
    ).fit()


def _progress(arguments: dict[str, Any]) -> tuple[int, int]:
    """Finished groups of jobs, and the step of the newest checkpoint of the next one."""
    config, location, groups = (arguments[key] for key in ("config", "location", "groups"))
    location.fetch(*(name for group in groups for name in group.needs(location.path)))
    finished = [group.is_finished(config) for group in groups]
    if all(finished):
        return len(groups), 0
    group = groups[finished.index(False)]
    return sum(finished), newest_step(location.storage, location.path, group.lead, group.fingerprint(config))


def _reason(error: Exception) -> str:
    """One line on what became of a worker; a process that is gone says more than the others, which missed it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    causes = [getattr(f, "health_check_failure", None) or getattr(f, "_base_exc", f) for f in failures]
    causes.sort(key=lambda cause: not isinstance(cause, RayActorError))
    lines = str(causes[0]).strip().splitlines() or [type(causes[0]).__name__]
    line = next((line.strip() for line in lines if "because" in line), lines[0])
    return line.split(" Some common causes")[0].rstrip(".:")  # Ray lists what may kill a process


def _wait_for_room(config: Config, num_workers: int, control: ActorHandle, starts: int) -> int:
    """How often in a row the cluster was too small, now that a group of workers found no room for a minute.

    Raises:
        PatterningError: too often.
    """
    try:
        training_resources(config, resolve_device(config.device), num_workers).at_once(1, None)
    except PatterningError as error:
        if starts + 1 >= _STARTS:
            raise
        control.tell.remote("waiting", f"waiting for nodes: {error}")
        return starts + 1
    # What there is, other queues have: they will be through.
    control.tell.remote("waiting", "a training waits for room in the cluster")
    return 0
