"""Susceptibilities of every loss of the training pool, and their spread over chains on a part of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from patterning_dist.aggregation.files import read_chains, read_controlled
from patterning_dist.config import Config, LlcConfig
from patterning_dist.config.sampling import ControlledConfig, PosteriorQuantityConfig
from patterning_dist.data.induction import token_features
from patterning_dist.data.sampler import permutation
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.measure.opening import OpenSubjects
from patterning_dist.measure.results import samples_table_name, table_name
from patterning_dist.measure.sets import inputs_of
from patterning_dist.measure.subjects import Subjects
from patterning_dist.progress import Progress
from patterning_dist.response.columns import Shard
from patterning_dist.response.extrapolate import Extrapolation, extrapolate
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.reliability import bootstrap_correlation, bootstrap_slope
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.directions import Solved, score_along_directions
from patterning_dist.runtime.pool import RunCalls, pool_shards, pool_tasks
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.storage.files import read_parquet, write_npy
from patterning_dist.storage.run import RunDirectory
from patterning_dist.storage.store import LocalStorage

# Pool samples that are scored chain by chain: errors of sums over the pool come from the spread between chains, and a
# part of the pool shows that as well as all of it.
SAMPLES_BY_CHAIN = 1024
_SUBSET_STREAM = 0x737562


@dataclass(frozen=True)
class Scores:
    """chi of the pool, and how it was come by.

    Attributes:
        chi: [observable, entry] in column shards, mean over replicates; every row has mean zero.
        in_subset: which entries are of samples that were also scored replicate by replicate, bool [entry].
        per_chain: chi of those from each replicate alone [chain, observable, entry of the subset], rows with mean 0.
        observables: names of the rows.
        report: how well it went, for solution.json.
        units: of chi.
        replicates: what is independent of each other: chains, or pairs of draws.
    """

    chi: Sequence[Shard]
    in_subset: np.ndarray
    per_chain: np.ndarray
    observables: list[str]
    report: dict[str, Any]
    units: str = "nats squared"
    replicates: str = "chains"

    def row(self, k: int) -> np.ndarray:
        """chi of one observable, whole [entry]."""
        return np.concatenate([shard[k : k + 1, :][0] for shard in self.chi])


class Pool:
    """The training pool of an experiment, as the posterior of a subject sees it.

    Args:
        config: of the run.
        run: its directory.
        opener: opens the subjects in a worker.
        subject: that has been sampled, or that ``inputs`` knows.
        device: of the workers.
        inputs: of subjects of which no chains are run: a hash of all that these would follow from.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        opener: OpenSubjects,
        subject: str,
        device: str,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.config, self.run, self.device = config, run, device
        self.opener, self.subject, self._inputs = opener, subject, inputs

    @cached_property
    def subjects(self) -> Subjects:
        """Opened in this process."""
        return self.opener("cpu", Ranks())

    @property
    def num_samples(self) -> int:
        """Samples of the pool."""
        return len(self.subjects.task.train)

    @cached_property
    def index(self) -> dict[str, np.ndarray]:
        """Sample and, where samples have several losses, position of every entry that counts [entry]."""
        task, ids = self.subjects.task, np.arange(self.num_samples)
        if task.num_positions is None:
            return {task.key: ids}
        counted = task.counted(task.train, ids)
        kept = np.ones((len(ids), task.num_positions), bool) if counted is None else counted
        sample, position = np.nonzero(kept)
        return {task.key: sample, "position": (position + 1).astype(np.int16)}

    @cached_property
    def subset(self) -> np.ndarray:
        """Samples that are scored chain by chain, ascending."""
        return np.sort(permutation(self.config.seed, _SUBSET_STREAM, self.num_samples)[:SAMPLES_BY_CHAIN])

    @cached_property
    def in_subset(self) -> np.ndarray:
        """Which entries are of those samples."""
        return np.isin(self.index[self.subjects.task.key], self.subset)

    def tasks(self, progress: Progress) -> AbstractContextManager[RunCalls]:
        """Runs passes over the pool on chain workers; see ``runtime.pool``."""

        num_shards, sampling = len(pool_shards(self.num_samples)), self.subjects.sampling
        return pool_tasks(self.opener, sampling, self.device, self.run, self.inputs, num_shards, progress)

    def inputs(self, subject: str) -> str:
        """Hash of all that the chains of a subject follow from."""
        return self._inputs.get(subject) or inputs_of(self.run, subject)

    @property
    def scratch(self) -> Path:
        """For what is as long as the pool, while its weights are solved for."""
        return self.run.path / "scores" / self.subject / "scratch"

    def keep(self, name: str, parts: Iterable[np.ndarray]) -> np.ndarray:
        """Numbers of all entries in a file of the scratch, mapped: they take no memory of their own [entry]."""
        file = self.scratch / f"{name}.npy"
        write_npy(file, self.in_subset.shape, parts)
        return np.load(file, mmap_mode="r")

    @property
    def inverse_temperature(self) -> float:
        """n_beta of the chains whose susceptibilities are inverted."""
        return self.subjects.posterior(self.subject).inverse_temperature


def direction_scores(pool: Pool, observables: list[str], progress: Progress) -> Scores:
    """The response-direction estimator (see ``sampling.direction``) over the whole pool.

    Every healthy chain gives a direction of its own. The pool is scored along their mean, two forward passes an
    observable; the probe (to compare with the plain covariance) and a part of the pool (for the errors) chain by chain.
    """
    config, subjects = pool.config, pool.subjects
    assert config.response.direction is not None and subjects.held_out is not None
    healthy, _ = read_chains(pool.run.path / "sampling" / pool.subject)
    solved = Solved(
        storage=pool.run.storage,
        subject=pool.subject,
        chains=tuple(moments.chain for moments in healthy),
        rows=tuple(subjects.held_out.names.index(name) for name in observables),
        settings=config.response.direction,
    )
    with pool.tasks(progress) as run_calls:
        sizes = (pool.num_samples, len(subjects.probe.ids))
        found = score_along_directions(run_calls, solved, sizes, pool.subset, pool.scratch / "scores")
    report = {
        "estimator": "response_direction",
        "conjugate_gradients": found.solves,
        "estimator_agreement": _agreement(pool, found.probe.mean(axis=0), observables),
    }
    return Scores(found.pool, pool.in_subset, centred(found.subset), observables, report)


def regression_scores(pool: Pool, observables: list[str], progress: Progress) -> Scores:
    """Plain covariances of the probe, carried to the pool by regression on token features.

    Raises:
        PatterningError: too few chains or probe sequences.
    """
    config, subjects, task = pool.config, pool.subjects, pool.subjects.task
    progress.start("extrapolating from the probe", len(observables))
    healthy, excluded = read_chains(pool.run.path / "sampling" / pool.subject)
    rows = [subjects.observable_names.index(name) for name in observables]
    source, train = subjects.probe.source, task.train
    assert isinstance(source, TokenDataset) and isinstance(train, TokenDataset)  # checked with the file
    probe_tokens, tokens = source.tokens(subjects.probe.ids), train.tokens(np.arange(pool.num_samples))
    counts = np.bincount(tokens.ravel())
    # Pool and probe together: bigram counts are then the same for both.
    features, _ = token_features(np.concatenate([probe_tokens, tokens]), counts)
    features = features.reshape(len(probe_tokens) + len(tokens), -1, features.shape[-1])
    of_probe, of_pool = (
        part.reshape(-1, part.shape[-1]) if counted is None else part[counted]
        for part, counted in (
            (features[: len(probe_tokens)], subjects.counted),
            (features[len(probe_tokens) :], task.counted(task.train, np.arange(len(tokens)))),
        )
    )
    groups = np.repeat(subjects.probe.ids, tokens.shape[1] - 1)
    groups = groups if subjects.counted is None else groups[subjects.counted.ravel()]
    num_entries, num_columns = len(of_probe), healthy[0].mean_loss.shape[-1]
    loss_weights = np.concatenate([np.ones(num_entries), np.zeros(num_columns - num_entries)])
    measured = susceptibility(
        healthy, loss_weights=loss_weights, min_chains=config.sampling.min_chains, excluded=excluded
    )
    in_subset = of_pool[pool.in_subset]
    chi, correlations = [], {}
    per_chain = np.empty((len(healthy), len(observables), len(in_subset)), np.float32)
    for k, (name, row) in enumerate(zip(observables, rows, strict=True)):

        def reach(scores: np.ndarray, pool_features: np.ndarray) -> Extrapolation:
            return extrapolate(of_probe, scores, groups, pool_features, seed=config.seed)

        found = reach(measured.chi[row, :num_entries], of_pool)
        chi.append(found.predictions)
        correlations[name] = found.correlation._asdict()
        for c in range(len(healthy)):
            per_chain[c, k] = reach(measured.chi_per_chain[c, row, :num_entries], in_subset).predictions
        progress.update(k + 1)
    report = {"estimator": "regression", "held_out_correlation": correlations}
    return Scores([centred(np.array(chi, np.float32))], pool.in_subset, centred(per_chain), observables, report)


def plain_scores(pool: Pool, observables: list[str], progress: Progress) -> Scores:
    """Plain covariances themselves, and the responses of LLC and free energy, where the probe is the whole pool.

    Raises:
        PatterningError: it is not, or there are too few chains.
    """
    sampling, subjects = pool.subjects.sampling, pool.subjects
    if sampling.probe is not None or len(subjects.probe.ids) != pool.num_samples:
        raise PatterningError(
            f"solve.scores: plain needs the losses of all {pool.num_samples} training samples, and the probe has "
            f"{len(subjects.probe.ids)}; raise sampling.probe_sequences to {pool.num_samples}, or choose another"
        )
    progress.start("reading co-moments", None)
    rows = plain_rows(pool.run.path, subjects, pool.subject, sampling.posterior_quantities)
    per_chain = np.stack([rows[name] for name in observables], axis=1)
    chi, report = centred(per_chain.mean(axis=0)), dict[str, Any](estimator="plain")
    if linear := {c.name: c.of for c in sampling.controlled if c.control == "linear" and c.name in observables}:
        kept = [observables.index(name) for name in linear]
        report["control_agreement"] = _agreement(pool, chi[kept], list(linear), list(linear.values()))
    return Scores([chi], pool.in_subset, centred(per_chain[:, :, pool.in_subset]), observables, report)


def plain_rows(
    directory: Path, subjects: Subjects, subject: str, quantities: Sequence[PosteriorQuantityConfig]
) -> dict[str, np.ndarray]:
    """chi of every observable, and of what follows from all draws, on the probe of a finished subject [chain, entry].

    Args:
        directory: of the run.
        subjects: opened in this process.
        subject: of them, whose chains are on the plain loss.
        quantities: of those that follow from all draws, the ones that are wanted.

    Raises:
        PatterningError: too few chains, or a file is missing or damaged.
    """
    healthy, excluded = read_chains(directory / "sampling" / subject)
    center = read_parquet(directory / table_name(subject), ["center_loss"])[0]["center_loss"].to_numpy()
    num_entries, num_means = len(center), healthy[0].mean_loss.shape[-1] - len(center)
    loss_weights = np.concatenate([np.ones(num_entries), np.zeros(num_means)])
    common: dict[str, Any] = {"loss_weights": loss_weights, "excluded": excluded}
    common["min_chains"] = subjects.sampling.min_chains
    measured = susceptibility(healthy, **common).chi_per_chain[:, :, :num_entries]
    rows = {name: measured[:, k] for k, name in enumerate(subjects.observable_names)}
    for quantity in quantities:
        if isinstance(quantity, ControlledConfig):
            continue
        if isinstance(quantity, LlcConfig):
            found = llc_response(healthy, 0, subjects.posterior(subject).inverse_temperature, **common)
        else:
            found = free_energy_response(healthy, np.concatenate([center, np.zeros(num_means)]), **common)
        rows[quantity.name] = found.chi_per_chain[:, 0, :num_entries]
    if subjects.sampling.controlled:
        numbers = [moments.chain for moments in healthy]
        controlled = read_controlled(LocalStorage(directory), subject, numbers, slice(-1))
        measured = susceptibility(controlled, **common).chi_per_chain[:, :, :num_entries]
        names = [c.name for c in subjects.sampling.controlled]
        rows |= {name: measured[:, k] for k, name in enumerate(names) if name in {q.name for q in quantities}}
    return rows


def centred(chi: np.ndarray) -> np.ndarray:
    """l_i - L instead of l_i: L is the mean over the pool, so every row has mean zero."""
    return (chi - chi.mean(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _agreement(pool: Pool, probe: np.ndarray, observables: list[str], plain: list[str] | None = None) -> dict[str, Any]:
    """The plain covariance against scores that take the posterior for a Gaussian, on the probe, intervals by sample.

    Correlation over entries and over sample means, and the slope of the plain one, which is noisy and knows no
    Gaussian: 1 where the scores leave nothing out.

    Args:
        probe: scores of the probe's entries [observable, entry].
        observables: names of the rows.
        plain: rows of the plain covariance, where they have other names.
    """
    key, folder = pool.subjects.task.key, pool.run.path
    entries = pq.read_table(folder / table_name(pool.subject))
    groups = entries[key].to_numpy()
    _, inverse = np.unique(groups, return_inverse=True)
    samples = pq.read_table(folder / samples_table_name(pool.subject)) if "position" in entries.column_names else None
    result: dict[str, dict[str, Any]] = {}
    for k, (name, row) in enumerate(zip(observables, plain or observables, strict=True)):
        pairs = {"entries": (entries[f"chi_{row}"].to_numpy(), probe[k], groups)}
        if samples is not None:
            means = np.bincount(inverse, probe[k]) / np.bincount(inverse)
            pairs["samples"] = (samples[f"chi_{row}"].to_numpy(), means, samples[key].to_numpy())
        result[name] = {}
        for level, pair in pairs.items():
            for what, found in (("", bootstrap_correlation(*pair, 0)), ("slope_", bootstrap_slope(*pair, 0))):
                value = f"{what or 'correlation_'}{level}"
                result[name] |= {value: found.value, f"{what}interval_{level}": [found.low, found.high]}
    return result
