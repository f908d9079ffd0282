"""Attribution scores of all training samples for all queries, method by method; signed as losses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from patterning_dist.aggregation.files import read_chains
from patterning_dist.config import Config, DirectionConfig, SplitLossConfig
from patterning_dist.config.validation import RANDOM
from patterning_dist.data.bergson import read_scores, sample_sums
from patterning_dist.data.bm25 import bm25_entries
from patterning_dist.data.sampler import permutation
from patterning_dist.errors import PatterningError
from patterning_dist.measure.measure import measure
from patterning_dist.measure.sets import inputs_of
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.progress import Progress
from patterning_dist.response.contrast import OVERALL
from patterning_dist.runtime.attribution import Passes, covariance_scores, direction_scores
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.runtime.pool import RunCalls, pool_shards, pool_tasks
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.sample import open_subjects
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.held_out import HeldOut, held_out_ids

STAGE = "validate"
_RANDOM_STREAM = 0x72616E64  # of the counter-based sampler, apart from those of chains (small numbers)


class Attribution:
    """Queries, and the checkpoint and component that scores for them are taken at.

    Args:
        config: of the run.
        run: its directory.

    Attributes:
        start: the checkpoint.
        tokens: whether every loss of a sample has a score.
    """

    def __init__(self, config: Config, run: RunDirectory) -> None:
        assert config.validation is not None
        self.config, self.run, self.settings = config, run, config.validation
        self.start = self.settings.start or config.checkpoints[0]
        self.tokens = self.settings.removed_token_share is not None
        self.subject, self.device = f"{STAGE}/{self.settings.component}", resolve_device(config.device)
        subject = Subject(self.start, self.settings.component, stream=self.subject)
        sampled = self.settings.num_draws if "susceptibility" in self.settings.methods else 0
        opener = open_subjects(config, run.location, self.device).weighted(
            {self.subject: subject},
            gradients_of=frozenset(),
            positions_of={self.subject: sampled} if sampled else {},
            part="realised",
        )
        # Queries are the held-out samples; their mean is the one observable, whatever the experiment asks for.
        queries = {
            "observables": [SplitLossConfig(kind="split_loss", name=OVERALL, split=OVERALL)],
            "evaluation_sequences": self.settings.num_queries,
        }
        self.opener = replace(opener, sampling=opener.sampling.model_copy(update=queries))

    @cached_property
    def subjects(self) -> Subjects:
        """Opened in this process."""
        return self.opener("cpu", Ranks())

    @property
    def queries(self) -> HeldOut:
        """The held-out samples."""
        assert self.subjects.held_out is not None
        return self.subjects.held_out

    @property
    def num_samples(self) -> int:
        """Training samples."""
        return len(self.subjects.task.train)

    @cached_property
    def counted(self) -> np.ndarray | None:
        """Losses of the training samples that count, bool [sample, position]; None where a sample has one."""
        task, ids = self.subjects.task, np.arange(self.num_samples)
        if task.num_positions is None:
            return None
        found = task.counted(task.train, ids)
        return np.ones((len(ids), task.num_positions), bool) if found is None else found

    def sample(self, progress: Progress) -> list[Path]:
        """Run the chains that susceptibilities are from, where they are asked for; returns the files written."""
        if "susceptibility" not in self.settings.methods:
            return []
        return measure(self.run, self.config.name, STAGE, self.opener, self.device, progress).files

    def tasks(self, progress: Progress) -> AbstractContextManager[RunCalls]:
        """Runs passes on workers, see ``runtime.pool``."""
        task, settings, sampling = self.subjects.task, self.settings, self.opener.sampling
        inputs: list[Any] = [self.config.seed, task.fingerprint(self.start), settings.component, settings.num_queries]
        posterior = self.subjects.posterior(self.subject)
        inputs += [posterior.inverse_temperature, posterior.localization, sampling.compute_dtype]
        if "susceptibility" in settings.methods:
            inputs.append(inputs_of(self.run, self.subject))
        number = max(len(pool_shards(self.num_samples)), len(self.queries.samples))
        return pool_tasks(self.opener, sampling, self.device, self.run, lambda _: inputs, number, progress)

    @cached_property
    def passes(self) -> Passes:
        """What workers are asked for."""
        chains: tuple[int, ...] = ()
        if "susceptibility" in self.settings.methods:
            healthy, _ = read_chains(self.run.path / "sampling" / self.subject)
            chains = tuple(moments.chain for moments in healthy)
        settings = self.config.response.direction or DirectionConfig(component=self.settings.component)
        return Passes(self.run.location, self.subject, chains, settings, self.tokens)

    def scores(self, run_calls: RunCalls, name: str) -> np.ndarray:
        """Scores of a method, or of a folder, [query, sample], or of single losses [query, sample, position].

        Raises:
            PatterningError: a folder is of other samples or queries.
        """
        if name in self.settings.scores:
            return self._given(self.settings.scores[name])
        if name == "susceptibility":
            return covariance_scores(run_calls, self.passes, self.num_samples)
        if name == "bm25":
            return self._bm25()
        if name == RANDOM:
            shape = (self.num_samples,) if self.counted is None or not self.tokens else self.counted.shape
            orders = [permutation(self.config.seed, _RANDOM_STREAM + q, int(np.prod(shape))) for q in self._numbers]
            return np.stack([order.reshape(shape) / order.size - 0.5 for order in orders]).astype(np.float32)
        return direction_scores(run_calls, self.passes, name, len(self._numbers))

    @property
    def _numbers(self) -> range:
        return range(len(self.queries.samples))

    def _bm25(self) -> np.ndarray:
        task: Any = self.subjects.task  # of tokens: checked with the file
        assert self.counted is not None
        tokens = task.train.tokens(np.arange(self.num_samples))[:, 1:].astype(np.int64)
        ids = held_out_ids(task, self.config.seed, self.settings.num_queries, "realised")
        queries = [row for name, chosen in ids.items() for row in task.held_out[name].tokens(chosen)]
        entries = bm25_entries(tokens, self.counted, queries)
        return np.stack([found if self.tokens else found.sum(axis=1) for found in entries])

    def _given(self, folder: Path) -> np.ndarray:
        """Scores of a folder; of single losses where it has them and they are asked for."""
        scores, offsets = read_scores(folder)
        num_samples = scores.shape[1] if offsets is None else len(offsets) - 1
        if (len(scores), num_samples) != (len(self._numbers), self.num_samples):
            raise PatterningError(
                f"{folder}: scores of {num_samples} samples for {len(scores)} queries; here are {self.num_samples} "
                f"training samples and {len(self._numbers)} queries (validation.num_queries)"
            )
        if offsets is None or not self.tokens or self.counted is None:
            return sample_sums(scores, offsets)
        if (np.diff(offsets) != self.counted.shape[1]).any():
            raise PatterningError(
                f"{folder}: expected {self.counted.shape[1]} rows a sample, one for every predicted token; score "
                "samples of that length, or remove validation.removed_token_share"
            )
        return scores.reshape(len(scores), *self.counted.shape)


def of_samples(scores: np.ndarray) -> np.ndarray:
    """[query, sample], from scores of samples or of their single losses."""
    return scores if scores.ndim == 2 else scores.sum(axis=2)
