"""Training jobs on the cluster: as many side by side as fit, each a Ray Train ``TorchTrainer``."""

from __future__ import annotations

from pathlib import Path

import ray
from ray.actor import ActorHandle

from patterning_dist.config import Config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import ray_session, resolve_device
from patterning_dist.runtime.train_worker import train_on_worker
from patterning_dist.runtime.workers import ProgressBoard
from patterning_dist.training.job import TrainingJob


def run_jobs(
    config: Config, directory: Path, jobs: list[TrainingJob], label: str, progress: Progress, concurrent: int | None
) -> None:
    """Train all jobs, shared out over lanes; the jobs of a lane follow each other in one set of workers.

    Args:
        config: of the run.
        directory: of the run.
        jobs: all with the same number of ranks.
        label: for the progress display, which shows a line a job.
        progress: the display.
        concurrent: lanes at most; None: what the cluster holds.

    Raises:
        PatterningError: the cluster cannot hold even one job, or a training failed in a way the user can mend.
    """
    with ray_session(config.training.threads_per_worker):
        num_lanes = min(_num_fitting(config, jobs[0].num_workers), concurrent or len(jobs), len(jobs))
        board = ProgressBoard.remote()
        progress.start(label, sum(job.num_steps + job.anneal_steps for job in jobs))
        running = [
            _run_lane.remote(config, directory, jobs[lane::num_lanes], board, f"lane-{lane}")
            for lane in range(num_lanes)
        ]
        while running:
            done, running = ray.wait(running, timeout=0.5)
            notes = ray.get(board.read.remote())
            for key, note in sorted(notes.items()):
                progress.update_line(key, **note)
            progress.update(sum(note["done"] for note in notes.values()))
            ray.get(done)


@ray.remote(num_cpus=0)
def _run_lane(config: Config, directory: Path, jobs: list[TrainingJob], board: ActorHandle, lane: str) -> None:
    """Train jobs one after another with a ``TorchTrainer``; one whose worker dies is restarted."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    device = resolve_device(config.device)
    TorchTrainer(
        train_on_worker,
        train_loop_config={"config": config, "directory": str(directory), "jobs": jobs, "board": board},
        torch_config=TorchConfig(backend="gloo" if device == "cpu" else "nccl"),
        scaling_config=ScalingConfig(
            num_workers=jobs[0].num_workers,
            use_gpu=device != "cpu",
            resources_per_worker={"CPU": config.training.threads_per_worker},
        ),
        run_config=RunConfig(
            name=lane,
            storage_path=str(directory.resolve() / "retrain" / ".ray"),
            failure_config=FailureConfig(max_failures=config.retrain.max_failures),
        ),
    ).fit()


def _num_fitting(config: Config, num_workers: int) -> int:
    """How many jobs of ``num_workers`` ranks the cluster can hold at once.

    Raises:
        PatterningError: not even one; says what is asked for and what is there.
    """
    there = ray.cluster_resources()
    need = {"CPU": config.training.threads_per_worker * num_workers}
    if resolve_device(config.device) == "cuda":
        need["GPU"] = num_workers
    fitting = min(int(there.get(resource, 0) // amount) for resource, amount in need.items())
    if fitting < 1:
        asked = ", ".join(f"{amount} {resource}" for resource, amount in need.items())
        found = ", ".join(f"{there.get(resource, 0):g} {resource}" for resource in need)
        raise PatterningError(
            f"one training needs {asked}, the Ray cluster has {found}; "
            "lower num_workers or threads_per_worker, or add nodes"
        )
    return fitting
