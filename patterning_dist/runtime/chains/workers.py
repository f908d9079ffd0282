"""Actors that hold a study: they run chains, solve for response directions and score shards of the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.actor import Actor, ActorHandle
from patterning_dist.runtime.chains.attempt import ChainStudy, Outcome, run_chain
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.restricted import RestrictedModel, Vector

_CHUNK = 16


# One that dies is made anew, and fills with the notes to come.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressBoard(Actor):
    """The last word of every chain or arm, for whoever draws the progress display."""

    def __init__(self) -> None:
        self._notes: dict[str, dict[str, Any]] = {}

    def note(self, key: str, **fields: Any) -> None:
        """Replace the note of ``key``: done, total, loss, healthy."""
        self._notes[key] = fields

    def read(self) -> dict[str, dict[str, Any]]:
        """All notes."""
        return self._notes


def progress_board() -> ActorHandle:
    """A board on the driver's node: it goes when the driver goes, and no sooner."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ProgressBoard.options(scheduling_strategy=here).remote()


MakeStudy = Callable[[str, Ranks], ChainStudy]  # (device, ranks) -> study, in the process that is to hold it


@ray.remote
class ModelWorker(Actor):
    """One process with a study loaded, for any number of tasks one after another."""

    def __init__(self, sampling: SamplingConfig, device: str) -> None:
        prepare_process(sampling.threads_per_worker)
        self.device = device

    def open_study(self, make_study: MakeStudy) -> None:
        """Load the study; what the user can put right is raised here."""
        self.study = make_study(self.device, Ranks())

    def chain(self, task: ChainTask, shards: list[ActorHandle], board: ActorHandle) -> Outcome:
        """See ``run_chain``."""
        return run_chain(self.study, Ranks(), task, shards, board)

    def direction(
        self, component: str, mean_position: np.ndarray, mean_gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """c_phi = Sigma E[grad phi] as a flat vector, with how conjugate gradients ended."""
        settings = self.study.config.response.direction
        model = self.study.restricted(component)
        model.place(_unflatten(mean_position, model))
        solution = response_direction(
            model,
            self.study.posterior(component),
            _unflatten(mean_gradient, model),
            model.freeze(self.study.hessian_tokens(), _CHUNK),
            max_iterations=settings.conjugate_gradient_iterations,
            tolerance=settings.tolerance,
        )
        flat = np.concatenate([t.cpu().double().numpy().ravel() for t in solution.vector.values()])
        report = {
            "num_iterations": solution.num_iterations,
            "relative_residual": solution.relative_residual,
            "negative_curvature": solution.negative_curvature,
        }
        return flat, report

    def score(
        self, component: str, mean_position: np.ndarray, directions: np.ndarray, ids: np.ndarray, probe: bool = False
    ) -> np.ndarray:
        """-grad l_i(w_bar) . c for the tokens of pool (or probe) sequences ``ids`` and every direction.

        Args:
            mean_position: w_bar, flat.
            directions: [direction, coordinate].
            ids: sequence ids.

        Returns:
            float32 [direction, sequence, position], not yet centred.
        """
        model = self.study.restricted(component)
        position = _unflatten(mean_position, model)
        step = self.study.config.response.direction.step * float(np.linalg.norm(mean_position))
        source = self.study.probe_source if probe else self.study.pool
        parts = []
        for start in range(0, len(ids), 16 * _CHUNK):
            tokens = torch.from_numpy(source.tokens(ids[start : start + 16 * _CHUNK]))
            batch = model.freeze(tokens, _CHUNK)
            parts.append(
                [
                    directional_losses(model, batch, position, _unflatten(c, model), step=step).float().numpy()
                    for c in directions
                ]
            )
        return np.concatenate([np.stack(part) for part in parts], axis=1)


def _unflatten(flat: np.ndarray, model: RestrictedModel) -> Vector:
    pieces, start = {}, 0
    for name, w in model.center.items():
        piece = flat[start : start + w.numel()].reshape(tuple(w.shape))
        pieces[name] = torch.from_numpy(np.ascontiguousarray(piece)).to(w)
        start += w.numel()
    return pieces


def model_workers(
    make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int, progress: Progress
) -> Workforce:
    """As many workers as the configuration or the cluster allows, at most one a task.

    On cuda every worker takes a GPU, elsewhere ``sampling.threads_per_worker`` CPUs.

    Raises:
        PatterningError: the cluster has not what one worker needs; says what is asked for and what is there.
    """

    def start(options: dict[str, int]) -> tuple[ActorHandle, ray.ObjectRef]:
        worker = ModelWorker.options(**options).remote(sampling, device)
        return worker, worker.open_study.remote(make_study)

    return fitting_workforce(start, sampling, device, num_tasks, progress)


def fitting_workforce(
    start: Callable[[dict[str, int]], tuple[ActorHandle, ray.ObjectRef]],
    sampling: SamplingConfig,
    device: str,
    num_tasks: int,
    progress: Progress,
) -> Workforce:
    """As many workers of one process each as the configuration or the cluster allows, at most one a task.

    Args:
        start: starts one with these options of Ray; the actor, and a reference that resolves when it can take tasks.
        sampling: section of the experiment: how many, and with how many threads.
        device: of the workers.
        num_tasks: that they share.
        progress: is told what is waited for.

    Raises:
        PatterningError: as in ``model_workers``.
    """
    resource, amount = need = ("GPU", 1) if device == "cuda" else ("CPU", sampling.threads_per_worker)
    nodes = sorted(node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"])
    options = {"num_gpus": 1, "num_cpus": 0} if resource == "GPU" else {"num_cpus": amount}
    fitting = sum(int(has // amount) for has in nodes)
    if fitting < 1:
        raise PatterningError(
            f"a worker needs {amount} {resource}, the nodes of the Ray cluster have "
            f"{', '.join(f'{has:g}' for has in nodes)}; lower sampling.threads_per_worker or add nodes"
        )
    return Workforce(lambda: start(options), min(sampling.workers or fitting, fitting, num_tasks), need, progress)
