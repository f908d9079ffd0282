"""Actors that hold a study: they run chains, solve for response directions and score shards of the pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.response.ledger import ChainRecord
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.sampling.chain import Chain, ChainFailure, Draw
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.restricted import RestrictedModel, Vector

# Seconds between two notes of a chain to the progress board.
_NOTE_EVERY = 0.5
_CHUNK = 16


@ray.remote(num_cpus=0)
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


class ChainStudy(Protocol):
    """What a worker needs of a study: any of its chains."""

    def chain(self, unit: str, number: int, **changes: Any) -> Chain: ...


MakeStudy = Callable[[str, Ranks], ChainStudy]  # (device, ranks) -> study, in the process that is to hold it


def run_chain(
    study: ChainStudy, unit: str, number: int, aggregator: ActorHandle, board: ActorHandle, draws_per_push: int
) -> ChainRecord:
    """Run one chain to its end, pushing its draws to the aggregator; a failed chain is a record, not an error.

    Args:
        study: held by this process.
        unit: the set of chains that share a ledger: a component.
        number: of the chain.
        aggregator, board: actors that take in draws and notes of progress.
        draws_per_push: draws sent at once.
    """
    started = time.monotonic()
    key = f"{unit} chain {number}"
    record = ChainRecord(number)
    ray.get(aggregator.open.remote(unit, number))
    arrays: dict[str, np.ndarray] = {}
    try:
        chain = study.chain(unit, number)
        arrays["center_losses"] = chain.center_losses
        try:
            _push_draws(chain, unit, aggregator, board, key, draws_per_push)
        finally:
            record.steps = chain.state.step
        if chain.sums is not None:
            arrays["sums"] = chain.sums.numpy() / chain.num_draws
    except ChainFailure as failure:
        record.healthy, record.reason = False, str(failure)
        board.note.remote(key, done=0, total=1, loss=None, healthy=False)
    record.seconds = time.monotonic() - started
    ray.get(aggregator.close.remote(unit, record, arrays))
    return record


def _push_draws(
    chain: Chain, unit: str, aggregator: ActorHandle, board: ActorHandle, key: str, draws_per_push: int
) -> None:
    noted, unacknowledged = 0.0, None
    total = chain.settings.num_draws
    for sequence_number, draws in enumerate(_batched(chain.draws(), draws_per_push)):
        block = []
        for draw in draws:
            block.append(draw)
            if time.monotonic() - noted > _NOTE_EVERY or draw.number + 1 == total:
                board.note.remote(key, done=draw.number + 1, total=total, loss=draw.mean_loss, healthy=True)
                noted = time.monotonic()
        # At most one push is under way: a slow aggregator slows the chain down instead of filling memory.
        if unacknowledged is not None:
            ray.get(unacknowledged)
        unacknowledged = aggregator.push.remote(
            unit,
            chain.number,
            sequence_number,
            np.stack([d.observables for d in block]),
            np.stack([d.losses for d in block]).astype(np.float32),
            np.array([d.mean_loss for d in block]),
        )
    ray.get(unacknowledged)


@ray.remote
class ModelWorker:
    """One process with a study loaded, for any number of tasks one after another."""

    def __init__(self, make_study: MakeStudy, sampling: SamplingConfig, device: str) -> None:
        prepare_process(sampling.threads_per_worker)
        self.draws_per_push = sampling.draws_per_push
        self.study = make_study(device, Ranks())

    def chain(self, unit: str, number: int, aggregator: ActorHandle, board: ActorHandle) -> ChainRecord:
        """See ``run_chain``."""
        return run_chain(self.study, unit, number, aggregator, board, self.draws_per_push)

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


def _batched(draws: Iterable[Draw], size: int) -> Iterator[Iterator[Draw]]:
    """Lazy blocks of ``size`` draws; each block must be used up before the next is asked for."""
    iterator = iter(draws)
    for first in iterator:

        def block(first: Draw = first) -> Iterator[Draw]:
            yield first
            for _, draw in zip(range(size - 1), iterator, strict=False):
                yield draw

        yield block()


def _unflatten(flat: np.ndarray, model: RestrictedModel) -> Vector:
    pieces, start = {}, 0
    for name, w in model.center.items():
        piece = flat[start : start + w.numel()].reshape(tuple(w.shape))
        pieces[name] = torch.from_numpy(np.ascontiguousarray(piece)).to(w)
        start += w.numel()
    return pieces


def model_workers(make_study: MakeStudy, sampling: SamplingConfig, device: str, num_tasks: int) -> list[ActorHandle]:
    """As many workers as the configuration or the cluster allows, at most one a task.

    On cuda every worker takes a GPU, elsewhere ``sampling.threads_per_worker`` CPUs.

    Raises:
        PatterningError: the cluster has not what one worker needs; says what is asked for and what is there.
    """
    there = ray.cluster_resources()
    if device == "cuda":
        need, options = ("GPU", 1), {"num_gpus": 1, "num_cpus": 0}
    else:
        need, options = ("CPU", sampling.threads_per_worker), {"num_cpus": sampling.threads_per_worker}
    resource, amount = need
    fitting = int(there.get(resource, 0) // amount)
    if fitting < 1:
        raise PatterningError(
            f"a chain worker needs {amount} {resource}, the Ray cluster has {there.get(resource, 0):g}; "
            "lower sampling.threads_per_worker or add nodes"
        )
    wanted = min(sampling.workers or fitting, fitting, num_tasks)
    return [ModelWorker.options(**options).remote(make_study, sampling, device) for _ in range(wanted)]


def run_tasks(
    workers: list[ActorHandle],
    calls: list[Callable[[ActorHandle], ray.ObjectRef]],
    poll: Callable[[list[Any]], None],
) -> list[Any]:
    """Hand calls to workers as they become free; results in the order of the calls.

    Args:
        workers: idle actors.
        calls: each takes a worker and starts one task on it.
        poll: called about twice a second with the results so far (None: not yet).
    """
    results: list[Any] = [None] * len(calls)
    waiting, running, idle = list(enumerate(calls)), {}, list(workers)
    while waiting or running:
        while waiting and idle:
            index, call = waiting.pop(0)
            worker = idle.pop()
            running[call(worker)] = (index, worker)
        done, _ = ray.wait(list(running), timeout=0.5)
        for reference in done:
            index, worker = running.pop(reference)
            results[index] = ray.get(reference)
            idle.append(worker)
        poll(results)
    return results
