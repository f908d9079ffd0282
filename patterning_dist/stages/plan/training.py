"""What the stages around the chains will take: prepare, train, solve, retrain and report of a run."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from patterning_dist.config import Config
from patterning_dist.data.induction import token_features
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.response.cost import Seconds, UnitCounts, makespan
from patterning_dist.response.extrapolate import extrapolate
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.runtime.pool import SHARD_SEQUENCES, SUBSET_TASKS
from patterning_dist.runtime.probe.chains import ChainProbe, SolveTimes
from patterning_dist.runtime.probe.training import JobTimes, StepTimes
from patterning_dist.sampling.study import Study
from patterning_dist.stages.scores import SEQUENCES_BY_CHAIN

# Samples that the solver is timed on; its time grows in proportion to their number.
_MAX_SAMPLES = 250_000
_MAX_SEQUENCES = 512
_ARMS = 2  # of which weights are solved for: plus and minus
_TABLES = 4  # of a row a token that stage solve writes: three arms and chi of the pool, about as long each
# Seconds of the page itself and of reading the tables, without the models.
_PAGE = Seconds(1.5, 1.0, 3.0)


def train_seconds(config: Config, job: JobTimes, evaluation: Seconds) -> Seconds:
    """Stage train: Ray Train and its workers, all steps, all rows of metrics."""
    training = config.training
    total = training.num_steps + training.anneal_steps
    rows = len({*range(training.evaluate_every, total + 1, training.evaluate_every), training.num_steps, total})
    steps = job.step * training.num_steps + job.anneal_step * training.anneal_steps
    return job.starting + job.opening + steps + evaluation * rows + job.closing + job.stopping


def retrain_seconds(config: Config, job: JobTimes, steps: StepTimes) -> Seconds:
    """Stage retrain: jobs one after another in every lane."""
    settings = config.retrain
    rows = math.ceil(settings.num_steps / settings.evaluate_every)
    one = job.opening + steps.step * settings.num_steps + steps.evaluation * rows + job.closing
    per_lane = math.ceil(num_retrainings(config) / steps.num_lanes)
    return job.starting + one * per_lane + job.stopping


def num_retrainings(config: Config) -> int:
    """Arms times seeds."""
    return len(config.retrain.arms) * len(config.retrain.seeds)


def solve_seconds(config: Config, study: Study, unit: UnitCounts, probe: ChainProbe, folder: Path) -> Seconds:
    """Stage solve: directions, scores of the pool, and the weights themselves; ``folder`` is written to.

    Conjugate gradients are counted as they went at the probe's checkpoint, which may be a fresh one: at the trained
    one half as many may do, or twice as many, up to what is allowed, be needed.
    """
    weights = _weights_seconds(config, study, folder)
    if config.solve.scores == "regression":
        return weights + _regression_seconds(config, study, unit)
    times: SolveTimes = probe.solve
    num_observables = len(config.solve.targets or study.splits.names)
    directions = unit.num_chains * num_observables
    iterations = config.response.direction.conjugate_gradient_iterations

    def scored(num_sequences: int, num_directions: int) -> Seconds:
        return times.freeze * num_sequences + times.direction * (num_sequences * num_directions)

    low, high = times.num_products / 2, min(2 * times.num_products, max(iterations, 1))
    product = times.product
    products = Seconds(product.value * times.num_products, product.low * low, product.high * high)
    solving = makespan([times.opening + products] * directions, probe.num_workers)
    num_sequences = study.pool.num_sequences
    subset = min(SEQUENCES_BY_CHAIN, num_sequences)
    tasks = [scored(len(study.probe_ids), directions)]
    tasks += [scored(math.ceil(subset / SUBSET_TASKS), directions)] * SUBSET_TASKS
    tasks += [
        scored(min(SHARD_SEQUENCES, num_sequences - start), num_observables)
        for start in range(0, num_sequences, SHARD_SEQUENCES)
    ]
    return probe.starting + solving + makespan(tasks, probe.num_workers) + weights


def _weights_seconds(config: Config, study: Study, folder: Path) -> Seconds:
    """Time of the solver on made-up scores of a part of the pool, carried to all of it and to the cross-fits."""
    total, per_sequence = study.num_pool_tokens, study.pool.context_length - 1
    num_sequences = max(1, min(study.pool.num_sequences, _MAX_SAMPLES // per_sequence))
    number = num_sequences * per_sequence
    names = list(config.solve.targets or study.splits.names)
    chi = np.random.default_rng(0).normal(size=(len(names), number)).astype(np.float32)
    started = time.perf_counter()
    solved = solve_for_effective_sample_share(
        chi - chi.mean(axis=1, keepdims=True),
        np.array([config.solve.targets.get(name, 1.0) for name in names]),
        config.solve.effective_sample_share or 0.5,
        inverse_temperature=study.posterior(config.solve.component).inverse_temperature,
        weight_min=config.solve.weight_min,
        weight_max=config.solve.weight_max,
        observables=names,
    )
    solving = time.perf_counter() - started
    started = time.perf_counter()
    write_sample_weights(
        folder / "weights.parquet",
        np.repeat(np.arange(num_sequences), per_sequence),
        np.tile(np.arange(1, per_sequence + 1, dtype=np.int16), num_sequences),
        solved.weights,
        {},
    )
    writing = time.perf_counter() - started
    # Each half of the chains is solved for on the part of the pool that is scored chain by chain.
    crossed = 2 * min(SEQUENCES_BY_CHAIN, study.pool.num_sequences) * per_sequence
    # Real scores have heavier tails than these: the search for the strength may take more rounds, or fewer.
    solver = Seconds.about(solving * _ARMS * (total + crossed) / number, 0.4)
    return solver + Seconds.about(writing * _TABLES * total / number, 0.3)


def _regression_seconds(config: Config, study: Study, unit: UnitCounts) -> Seconds:
    """Time of the trees on made-up scores, carried from a part of the pool to all of it."""
    tokens = study.pool.tokens(np.arange(min(study.pool.num_sequences, _MAX_SEQUENCES)))
    counts = np.bincount(tokens.ravel(), minlength=study.pool.vocabulary_size)
    num_probe = study.probe_tokens[:, 1:].size
    started = time.perf_counter()
    features, _ = token_features(np.concatenate([study.probe_tokens, tokens]), counts)
    reading = time.perf_counter() - started
    scores = np.random.default_rng(0).normal(size=num_probe)
    groups = np.repeat(study.probe_ids, study.probe_tokens.shape[1] - 1)
    started = time.perf_counter()
    extrapolate(features[:num_probe], scores, groups, features[num_probe:], seed=config.seed)
    fitting = time.perf_counter() - started
    fits = len(config.solve.targets or study.splits.names) * (1 + unit.num_chains)
    return Seconds.about(reading * study.pool.num_sequences / len(tokens) + fitting * fits, 0.5)


def report_seconds(config: Config, evaluation: Seconds) -> Seconds:
    """Stage report: the split losses of every retrained model, and the page."""
    return _PAGE + evaluation * num_retrainings(config)


def train_disk(weight_bytes: int) -> int:
    """Three sets of weights: initial, before the annealing, and annealed."""
    return 3 * weight_bytes


def solve_disk(config: Config, study: Study, unit: UnitCounts, num_coordinates: int) -> int:
    """chi of the pool with errors of a part of it, and three tables of weights, compressed; results of the tasks."""
    num_observables = len(config.solve.targets or study.splits.names)
    share = min(1.0, SEQUENCES_BY_CHAIN / study.pool.num_sequences)
    tables = study.num_pool_tokens * (4 * num_observables * (1 + share) + 1 + 3 * 4)
    if config.solve.scores == "regression":
        return round(tables)
    scores = 4 * num_observables * (study.num_pool_tokens * (1 + share * unit.num_chains))
    directions = 8 * num_observables * unit.num_chains * num_coordinates
    return round(tables + scores + directions)


def retrain_disk(config: Config, weight_bytes: int) -> int:
    """Initial and final weights of every retraining."""
    return num_retrainings(config) * 2 * weight_bytes
