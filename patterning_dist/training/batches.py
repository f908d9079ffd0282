"""The global batches of a training: which samples, and what their losses weigh."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from patterning_dist.config import TrainingConfig
from patterning_dist.data.sampler import epoch_batch, weighted_minibatch
from patterning_dist.data.weights import SampleWeights
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.samples import Samples
from patterning_dist.tasks.task import Task
from patterning_dist.training.job import TrainingJob

_DRAW_STREAM = 0x64726177  # of the counter-based sampler, apart from those of chains (small numbers)


class WeightedBatches:
    """A pure function of the step: sample ids, the weights of their losses, and what the weighted sum is divided by.

    Batches are passes without replacement in an order that depends on the seed alone, so all arms see the same data in
    the same order. With ``weighting: draw`` they are drawn with replacement, sample i in proportion to rho_i, or alike
    where nothing is weighted, and losses weigh 1. During annealing the batches are ``anneal_batch_size`` large.

    Args:
        job: names seed, weights and phases.
        training: batch sizes.
        task: whose training samples they are; losses that do not count weigh 0.

    Raises:
        PatterningError: the table of weights is not for this task, cannot be drawn by, or has nothing above 0.
    """

    def __init__(self, job: TrainingJob, training: TrainingConfig, task: Task) -> None:
        self.job, self.training, self.task = job, training, task
        self.num_samples = len(task.train)
        self.weights: np.ndarray | None = None
        self.mean_weight = 1.0  # of all losses that count
        self.num_missing = self.num_joined = 0
        self.swapped: Samples | None = None  # the training samples where the table swaps labels
        if job.weights is not None:
            self._join(SampleWeights.load(job.weights, task.key).scaled(job.strength))
        if job.weighting == "draw":
            self._uniform = np.arange(1, self.num_samples + 1, dtype=np.float64)
            self._cumulative = self._uniform if self.weights is None else np.cumsum(self.weights, dtype=np.float64)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Ids [sample], weights [sample] or [sample, position] and their expected sum, of the global batch of a step.

        The expected sum is the mean weight of the whole table times the number of losses in the batch that count.
        """
        job, ids = self.job, self._ids(step)
        num_positions = self.task.num_positions
        shape = (len(ids),) if num_positions is None else (len(ids), num_positions)
        if self.weights is not None and job.weighting == "loss" and step < job.weighted_steps:
            weights, mean_weight = self.weights[ids], self.mean_weight
        else:
            weights, mean_weight = np.ones(shape, np.float32), 1.0
        counted = self.task.counted(self.task.train, ids)
        if counted is None:
            return ids, weights, mean_weight * weights.size
        # A batch in which nothing counts has loss 0.
        return ids, np.where(counted, weights, np.float32(0)), mean_weight * max(int(counted.sum()), 1)

    def samples(self, step: int) -> Samples:
        """Those that the ids of a step are of: with swapped labels in steps that are weighted, if the table has any."""
        return self.task.train if self.swapped is None or step >= self.job.weighted_steps else self.swapped

    def _ids(self, step: int) -> np.ndarray:
        job, training = self.job, self.training
        annealing = step - job.num_steps
        if annealing >= 0:
            # Another key than the main order: seeds are below 2^63, so no other seed has it.
            return epoch_batch(job.seed + 2**63, annealing, training.anneal_batch_size, self.num_samples)
        if job.weighting == "loss":
            return epoch_batch(job.seed, step, training.batch_size, self.num_samples)
        cumulative = self._cumulative if step < job.weighted_steps else self._uniform
        return weighted_minibatch(job.seed, _DRAW_STREAM, step, training.batch_size, cumulative)

    def _join(self, table: SampleWeights) -> None:
        task = self.task
        if self.job.weighting == "loss":
            counted = task.counted(task.train, np.arange(self.num_samples))
            joined = table.join(self.num_samples, task.num_positions, counted)
            self.mean_weight = float(joined.weights.mean(dtype=np.float64, where=True if counted is None else counted))
        else:
            if table.position is not None:
                raise PatterningError(
                    f"{table.path}: has a weight for every position, and whole samples are drawn; give one weight a "
                    f"sample, or set weighting: loss for {self.job.name}"
                )
            joined = table.join(self.num_samples, None)
        if not joined.weights.any():
            raise PatterningError(f"{table.path}: all weights are 0, so there is nothing to train on; raise some")
        self.weights, self.num_missing, self.num_joined = joined.weights, joined.num_missing, joined.num_joined
        if joined.swapped is not None:
            self.swapped = task.swap(str(table.path), joined.swapped)


def weighted_loss(losses: Tensor, weights: Tensor, expected_weight: float, num_ranks: int) -> Tensor:
    """This rank's share of  sum_i rho_i l_i / (rho_mean m) , over the m losses of the *global* batch that count.

    rho_mean is the mean of the whole table, so that over batches the expectation is L_rho = sum_i rho_i l_i / sum_i
    rho_i, which chains are on and predictions are of. Divided by the sum of rho over the batch instead, a weight that a
    whole batch shares would cancel, the more the smaller the batch.

    Data-parallel engines average gradients over ranks, so the share is scaled by the number of ranks: the average over
    ranks is then the gradient of the global loss. A mean of rank means would give every rank the same say, however few
    losses count among its samples.

    Args:
        losses: l_i of this rank's tokens [sequence, position], nats.
        weights: rho_i of the same tokens.
        expected_weight: rho_mean m.
        num_ranks: data-parallel ranks.

    Examples:
        >>> losses, weights = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.5]])
        >>> weighted_loss(losses, weights, expected_weight=2.0, num_ranks=1)  # (0.5 * 1 + 1.5 * 2) / 2
        tensor(1.7500)
    """
    return (weights * losses).sum() * (num_ranks / expected_weight)
