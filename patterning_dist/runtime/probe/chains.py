"""Pieces of chains and of scoring, timed at their real sizes in as many processes at once as the run will use."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.chains.workers import MakeStudy
from patterning_dist.runtime.probe.ranks import ProbeGroup, probe_groups
from patterning_dist.runtime.resources import sampling_resources
from patterning_dist.sampling.chain import ChainFailure
from patterning_dist.sampling.direction import directional_losses, response_direction
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.study import Study

# Seconds: how long the steps of one component are timed, and how long a process may take for anything at all.
_STEPS_BUDGET = 2.5
_TIMEOUT = 600.0
_MIN_STEPS, _MAX_STEPS, _BLOCKS = 2, 24, 3
_CHUNK, _SHARD = 16, 128  # sequences of a forward pass as in ``runtime.workers``, and of a piece of the pool


@dataclass(frozen=True)
class UnitTimes:
    """One component's chains on one process.

    Attributes:
        opening: from the study to a chain at its first step.
        step: of the sampler.
        draw: measuring all losses, and gradients where they are taken.
        num_coordinates: free coordinates of the component.
        gradient_bytes, state_bytes, activation_bytes: of the largest rank.
    """

    opening: Seconds
    step: Seconds
    draw: Seconds
    num_coordinates: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class SolveTimes:
    """Of the response-direction estimator.

    Attributes:
        opening: from the study to the frozen batch of the Hessian.
        product: one Hessian-vector product.
        num_products: conjugate gradients took at the probe's checkpoint.
        freeze, direction: one sequence of the pool, and that along one direction.
    """

    opening: Seconds
    product: Seconds
    num_products: int
    freeze: Seconds
    direction: Seconds


@dataclass(frozen=True)
class ChainProbe:
    """All that was measured on the chain workers; ``process_bytes`` is the largest memory of any of them."""

    num_workers: int
    starting: Seconds
    units: dict[str, UnitTimes]
    solve: SolveTimes | None
    weight_bytes: int
    process_bytes: int


def probe_chains(
    make_study: MakeStudy,
    sampling: SamplingConfig,
    device: str,
    units: dict[str, bool],
    num_tasks: int,
    solve_component: str | None = None,
) -> ChainProbe:
    """Time the pieces of chains, and of solving, on all workers at once.

    Args:
        make_study: opens the study in a worker.
        sampling: section of the experiment.
        device: of the workers.
        units: sets of chains to be timed, and whether gradients are taken at every draw of them.
        num_tasks: chains of the whole run.
        solve_component: component whose response directions are solved for; None: they are not.

    Raises:
        PatterningError: the cluster cannot hold one chain, or the study cannot be opened.
    """
    need = sampling_resources(sampling, device, sampling.ranks_per_chain)
    number = need.at_once(num_tasks, sampling.workers).number
    started = time.monotonic()
    with probe_groups(
        [[need.options] * need.num_ranks] * number, device, sampling.threads_per_worker, _TIMEOUT
    ) as groups:
        run_together(groups, _open, make_study)
        starting = time.monotonic() - started
        measured = {
            unit: _joined(run_together(groups, _time_unit, unit, sampling.batch_size, gradients))
            for unit, gradients in units.items()
        }
        solve = None
        if solve_component is not None:
            solve = _joined_solve(run_together(groups, _time_solve, solve_component))
        memory = run_together(groups, process_bytes)
        weights = run_together(groups, _weight_bytes)
    return ChainProbe(number, Seconds.about(starting, 0.25), measured, solve, max(weights), max(memory))


def run_together(groups: list[ProbeGroup], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of every group at once; all results.

    Raises:
        PatterningError: no answer in time.
    """
    calls = [call for group in groups for call in group.begin(function, *arguments)]
    try:
        return ray.get(calls, timeout=_TIMEOUT)
    except ray.exceptions.GetTimeoutError:
        raise PatterningError(
            f"the probe: {function.__name__.strip('_')} had no answer within {_TIMEOUT:g} s; the model is too large "
            "for these processes, or they wait for each other: try `patterning doctor`"
        ) from None


def _open(rank: Any, make_study: MakeStudy) -> None:
    rank.study = make_study(rank.device, Ranks(rank.rank, rank.size))


def _seconds(rank: Any, call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if rank.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _time_unit(rank: Any, unit: str, batch_size: int, gradients: bool) -> dict[str, Any]:
    chains = []
    # Burn-in is left out, and with it, as in every changed chain, what a whole run records besides.
    opening = _seconds(
        rank, lambda: chains.append(rank.study.chain(unit, 0, burn_in=0, num_draws=_BLOCKS + 1, steps_between_draws=1))
    )
    chain = chains[0]
    target, ids = chain.target, np.arange(batch_size)
    activations = SavedBytes(target.live().values())
    with activations.watch():
        target.gradient(ids)
    gradient = _seconds(rank, lambda: target.gradient(ids))
    measuring = min(_seconds(rank, target.measure) for _ in range(2))
    splitting = _seconds(rank, target.split_gradients) if gradients else 0.0
    # The same number on all ranks of a group, for they step together.
    num_steps = int(_agreed(rank, min(max(_STEPS_BUDGET / _BLOCKS / gradient, _MIN_STEPS), _MAX_STEPS)))
    chain.settings = replace(chain.settings, steps_between_draws=num_steps)
    steps: list[float] = []
    try:
        draws, before = chain.draws(), None
        for _ in draws:
            now = time.perf_counter()
            if before is not None:
                steps.append((now - before - measuring) / num_steps)
            before = time.perf_counter()
    except ChainFailure:  # a fresh model is no place of rest; what was timed until then counts
        steps = steps or [1.2 * gradient]
    return {
        "opening": opening,
        "steps": steps,
        "draw": measuring + splitting,
        "num_coordinates": chain.num_coordinates,
        "gradient_bytes": _bytes(target.center),
        "state_bytes": sum(_bytes(v) for v in chain.state._asdict().values() if isinstance(v, dict)),
        "activation_bytes": activations.total,
    }


def _joined(results: list[dict[str, Any]]) -> UnitTimes:
    sizes = ("gradient_bytes", "state_bytes", "activation_bytes")
    return UnitTimes(
        opening=Seconds.measured([r["opening"] for r in results]),
        step=Seconds.measured([step for r in results for step in r["steps"]]),
        draw=Seconds.measured([r["draw"] for r in results]),
        num_coordinates=results[0]["num_coordinates"],
        **{name: max(r[name] for r in results) for name in sizes},
    )


def _time_solve(rank: Any, component: str) -> dict[str, float]:
    study: Study = rank.study
    found: dict[str, Any] = {}

    def prepare() -> None:
        found["model"] = study.restricted(component)
        found["batch"] = found["model"].freeze(study.hessian_tokens(), _CHUNK)

    opening = _seconds(rank, prepare)
    model, center = found["model"], found["model"].center
    ids = np.arange(min(_SHARD, study.pool.num_sequences))
    tokens = torch.from_numpy(study.pool.tokens(ids))
    gradient = study.target(component).split_gradients()[0]
    settings = study.config.response.direction

    def solve() -> None:
        found["solution"] = response_direction(
            model,
            study.posterior(component),
            gradient,
            found["batch"],
            max_iterations=settings.conjugate_gradient_iterations,
            tolerance=settings.tolerance,
        )

    solving = _seconds(rank, solve)
    num_products = max(found["solution"].num_iterations, 1)
    freeze = _seconds(rank, lambda: found.update(pool=model.freeze(tokens, _CHUNK)))
    directions = [
        _seconds(rank, lambda: directional_losses(model, found["pool"], center, center, step=1e-3)) for _ in range(2)
    ]
    return {
        "opening": opening,
        "product": solving / num_products,
        "num_products": num_products,
        "freeze": freeze / len(ids),
        "direction": sum(directions) / len(directions) / len(ids),
    }


def _joined_solve(results: list[dict[str, float]]) -> SolveTimes:
    times = {name: Seconds.measured([r[name] for r in results]) for name in results[0] if name != "num_products"}
    return SolveTimes(num_products=results[0]["num_products"], **times)


def _agreed(rank: Any, value: float) -> float:
    """The smallest of a group's values."""
    smallest = torch.tensor(value)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return smallest.item()


class SavedBytes:
    """Bytes that forward passes keep for the backward pass, the weights left out."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._seen = {w.untyped_storage().data_ptr() for w in weights}
        self.total = 0

    def watch(self) -> AbstractContextManager:
        """Forward passes inside count."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def process_bytes(rank: Any) -> int:
    """The largest memory that a process has held: of its GPU, or all of it."""
    if rank.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _weight_bytes(rank: Any) -> int:
    """Of the model that the last chain walked on, this rank's part."""
    study = rank.study
    model = study.checkpoint() if isinstance(study, Study) else study.model(study.config.model.checkpoints[0])
    parts = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in parts)
