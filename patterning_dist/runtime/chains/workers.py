"""Actors that hold a study: they run chains, solve for response directions and score shards of the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patterning_dist.config import SamplingConfig
from patterning_dist.progress import Progress
from patterning_dist.runtime.chains.attempt import ChainStudy, Outcome, run_chain
from patterning_dist.runtime.chains.pushes import ChainTask
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.resources import sampling_resources
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.restricted import RestrictedModel, Vector

_CHUNK = 16


# One that dies is made anew, and fills with the notes to come.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ProgressBoard:
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


Result = dict[str, Any]  # of a durable task: arrays, and values that JSON has
MakeStudy = Callable[[str, Ranks], ChainStudy]  # (device, ranks) -> study, in the process that is to hold it


@ray.remote
class ModelWorker:
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

    def direction(self, component: str, mean_position: np.ndarray, mean_gradient: np.ndarray) -> Result:
        """c_phi = Sigma E[grad phi] as a flat vector ``direction``, with how conjugate gradients ended."""
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
        return {
            "direction": np.concatenate([t.cpu().double().numpy().ravel() for t in solution.vector.values()]),
            "num_iterations": solution.num_iterations,
            "relative_residual": solution.relative_residual,
            "negative_curvature": solution.negative_curvature,
        }

    def score(
        self, component: str, mean_position: np.ndarray, directions: np.ndarray, ids: np.ndarray, probe: bool
    ) -> Result:
        """-grad l_i(w_bar) . c for the tokens of pool (or probe) sequences ``ids`` and every direction.

        Args:
            mean_position: w_bar, flat.
            directions: [direction, coordinate].
            ids: sequence ids.

        Returns:
            ``scores``, float32 [direction, sequence, position], not yet centred.
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
        return {"scores": np.concatenate([np.stack(part) for part in parts], axis=1)}


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

    Raises:
        PatterningError: the cluster cannot hold one worker.
    """
    need = sampling_resources(sampling, device)

    def start() -> tuple[ActorHandle, ray.ObjectRef]:
        worker = ModelWorker.options(**need.options).remote(sampling, device)
        return worker, worker.open_study.remote(make_study)

    return Workforce(start, need.at_once(num_tasks, sampling.workers).number, need, progress)
