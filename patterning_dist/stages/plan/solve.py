"""What stage solve takes: scores of the pool, and the weights themselves."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from patterning_dist.data.induction import token_features
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.response.cost import NOTHING, Seconds, makespan
from patterning_dist.response.extrapolate import extrapolate
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.runtime.pool import SHARD_SAMPLES, SUBSET_TASKS
from patterning_dist.stages.cost import MAX_WALKS
from patterning_dist.stages.plan.passes import control_tasks, moment_seconds, share_by_chain
from patterning_dist.stages.plan.predict import walk_seconds
from patterning_dist.stages.plan.sampling import Chains
from patterning_dist.stages.plan.table import StagePlan
from patterning_dist.stages.rounds import later_rounds
from patterning_dist.storage.files import write_parquet

# Entries that the solver is timed on, and sequences that features are; times grow in proportion to their number.
_MAX_ENTRIES, _MAX_SEQUENCES = 250_000, 512
_ARMS = 2  # of which weights are solved for: plus and minus
_TABLES = 4  # of a row an entry that the stage writes: three arms and chi of the pool, about as long each


def plan_solve(chains: Chains, solved: Sequence[str], folder: Path) -> StagePlan:
    """Stage solve on the chains of one of the subjects; ``folder`` is written to."""
    settings = chains.config.solve
    assert settings is not None
    by_chain = share_by_chain(chains)
    num_observables, num_entries = len(_observables(chains)), chains.subjects.num_training_losses
    scoring = {
        "response_direction": lambda: _direction_seconds(chains, solved[0]),
        "regression": lambda: _regression_seconds(chains, solved[0]),
        "plain": chains.reduction_seconds,
        "first_moment": lambda: moment_seconds(chains, solved),
    }
    controls, passes = settings.controls, control_tasks(chains, solved[0])
    on_workers = settings.scores in ("response_direction", "first_moment") or bool(passes)
    tables = _TABLES + len(controls)
    solutions = _ARMS + sum(control.kind != "permuted" for control in controls)
    return StagePlan(
        "solve",
        f"{num_entries:,} weights",
        scoring[settings.scores]()
        + (chains.probe.starting + makespan(passes, chains.probe.num_workers) if passes else NOTHING)
        + _weights_seconds(chains, folder, solutions, tables)
        + (NOTHING if settings.max_cost is None else walk_seconds(chains, _ARMS) * MAX_WALKS),
        chains.probe.num_workers * chains.config.sampling.ranks_per_chain if on_workers else 1,
        chains.config.sampling.threads_per_worker,
        on_device=on_workers,
        process_bytes=chains.probe.process_bytes,
        # chi of the pool with errors of a part of it, and the tables of weights, compressed
        disk_bytes=round(num_entries * (4 * num_observables * (1 + by_chain) + 1 + (tables - 1) * 4)),
    )


def plan_rounds(chains: Chains, solved: Sequence[str], folder: Path) -> StagePlan | None:
    """What arms in rounds add to stage retrain: chains, scores and weights between the rounds; None: there are none."""
    later = later_rounds(chains.config)
    if not later:
        return None
    weights, disk_bytes = _weights_seconds(chains, folder, num_arms=1, num_tables=1), 4 * len(later)
    assert chains.config.solve is not None
    if chains.config.solve.scores == "first_moment":  # without chains
        return replace(
            plan_solve(chains, solved, folder),
            what=f"{len(later):,} readings between the rounds",
            seconds=(moment_seconds(chains, solved) + weights) * len(later),
            disk_bytes=disk_bytes * chains.subjects.num_training_losses,
        )
    subject = solved[0]
    by_round = [chains.plan_again("retrain", subject, number) for number in Counter(r.number for r in later).values()]
    each = _direction_seconds(chains, subject) + weights
    return replace(
        by_round[0],
        what=f"{sum(plan.details['num_chains'] for plan in by_round):,} chains between the rounds",
        seconds=sum((plan.seconds for plan in by_round), each * len(later)),
        disk_bytes=sum(plan.disk_bytes for plan in by_round) + disk_bytes * chains.subjects.num_training_losses,
    )


def _observables(chains: Chains) -> list[str]:
    assert chains.config.solve is not None
    held_out = chains.subjects.held_out
    return list(chains.config.solve.targets) or list(held_out.names if held_out else ())


def _direction_seconds(chains: Chains, subject: str) -> Seconds:
    """Time of the response directions and of the scores along them.

    Conjugate gradients are counted as they went at the probe's checkpoint, which may be a fresh one: at the trained
    one half as many may do, or twice as many, up to what is allowed, be needed.
    """
    config, subjects, probe = chains.config, chains.subjects, chains.probe
    times = probe.solve
    assert times is not None and config.response.direction is not None
    settings, num_samples = config.response.direction, len(subjects.task.train)
    num_observables = len(_observables(chains))
    directions = chains.counts[subject].num_chains * num_observables

    def scored(number: int, along: int) -> Seconds:
        return times.opening + times.prepare * number + times.direction * (number * along)

    most = max(settings.conjugate_gradient_iterations, 1)
    low, high = times.num_products / 2, min(2 * times.num_products, most)
    product = times.product
    products = Seconds(product.value * times.num_products, product.low * low, product.high * high)
    batch = times.prepare * settings.hessian_sequences
    tasks = [scored(len(subjects.probe.ids), directions)]
    tasks += [scored(math.ceil(share_by_chain(chains) * num_samples / SUBSET_TASKS), directions)] * SUBSET_TASKS
    tasks += [
        scored(min(SHARD_SAMPLES, num_samples - start), num_observables)
        for start in range(0, num_samples, SHARD_SAMPLES)
    ]
    solving = makespan([times.opening + batch + products] * directions, probe.num_workers)
    return probe.starting + solving + makespan(tasks, probe.num_workers)


def _regression_seconds(chains: Chains, subject: str) -> Seconds:
    """Time of the trees on made-up scores, carried from a part of the pool to all of it."""
    pool, probe, seed = chains.subjects.task.train, chains.subjects.probe, chains.config.seed
    assert isinstance(probe.source, TokenDataset) and isinstance(pool, TokenDataset)  # checked with the file
    probe_tokens = probe.source.tokens(probe.ids)
    tokens = pool.tokens(np.arange(min(len(pool), _MAX_SEQUENCES)))
    num_probe = probe_tokens[:, 1:].size
    started = time.perf_counter()
    features, _ = token_features(np.concatenate([probe_tokens, tokens]), np.bincount(tokens.ravel()))
    reading = time.perf_counter() - started
    scores, groups = np.random.default_rng(0).normal(size=num_probe), np.repeat(probe.ids, probe_tokens.shape[1] - 1)
    started = time.perf_counter()
    extrapolate(features[:num_probe], scores, groups, features[num_probe:], seed=seed)
    fitting = time.perf_counter() - started
    fits = len(_observables(chains)) * (1 + chains.counts[subject].num_chains)
    return Seconds.about(reading * len(pool) / len(tokens) + fitting * fits, 0.5)


def _weights_seconds(chains: Chains, folder: Path, num_arms: int, num_tables: int) -> Seconds:
    """Time of the solver on made-up scores of a part of the pool, carried to all of it and to the cross-fits."""
    settings, subjects = chains.config.solve, chains.subjects
    assert settings is not None
    names, total = _observables(chains), subjects.num_training_losses
    number = min(total, _MAX_ENTRIES)
    chi = np.random.default_rng(0).normal(size=(len(names), number)).astype(np.float32)
    started = time.perf_counter()
    solved = solve_for_effective_sample_share(
        chi - chi.mean(axis=1, keepdims=True),
        np.array([settings.targets.get(name, 1.0) for name in names]),
        settings.effective_sample_share or 0.5,
        inverse_temperature=subjects.sampling.inverse_temperature,
        weight_min=settings.weight_min,
        weight_max=settings.weight_max,
        observables=names,
    )
    solving = time.perf_counter() - started
    table = pa.table({"sample": np.arange(number), "weight": solved.weights})
    started = time.perf_counter()
    write_parquet(folder / "weights.parquet", table, {}, compression="zstd")
    writing = time.perf_counter() - started
    # Each half of the chains is solved for on the part of the pool that is scored chain by chain. Real scores have
    # heavier tails than these: the search for the strength may take more rounds, or fewer.
    solver = Seconds.about(solving * num_arms * (1 + 2 * share_by_chain(chains)) * total / number, 0.4)
    return solver + Seconds.about(writing * num_tables * total / number, 0.3)
