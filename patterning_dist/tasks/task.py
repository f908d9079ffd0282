"""What is learnt, of what: the one seam behind which architectures, data and losses lie.

Chains, weights, trainings and the page know a task only. Adding one is writing this protocol once; `tasks.module` has
the shortest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import TrainingConfig
from patterning_dist.models.components import Component
from patterning_dist.sampling.layered import Layered
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Samples
from patterning_dist.storage.files import file_sha256

FileHash = Callable[[Path], str]  # of a file's content
OwnSamples = Any  # samples that the task itself gave out, of which it knows more than ``Samples`` says
TokenLosses = Callable[[nn.Module, Tensor], Tensor]  # (model or engine, ids [sample, position]) -> [sample, position]
Terms = list[tuple[float, np.ndarray]]  # a split loss as a sum of signed means over masks of entries


class Metric(NamedTuple):
    """What a number that a training reports is.

    Attributes:
        label: for figures and tables.
        unit: nats, probability, ...
        meaning: one sentence.
        scale: log for a positive number that grows by factors: trainings are compared by their ratio.
    """

    label: str
    unit: str
    meaning: str
    scale: Literal["linear", "log"] = "linear"


class Task(Protocol):
    """A model, its samples, and the losses that tie them.

    Attributes:
        train: training samples: minibatches are drawn from them, and their weights are what chi is about.
        held_out: name of a set -> its samples.
        num_positions: losses of one sample; None where it has a single one.
        mean_counted: entries of a training sample that count, on average; None: all of them.
        key: what a sample is called in tables, ``sequence_id`` or ``sample_id``.
        compute_dtype: of forward passes under autocast, where it is not float32.
        metrics: what ``evaluate`` returns, by name.
    """

    @property
    def train(self) -> Samples: ...
    @property
    def held_out(self) -> Mapping[str, Samples]: ...
    @property
    def num_positions(self) -> int | None: ...
    @property
    def mean_counted(self) -> float | None: ...
    @property
    def key(self) -> str: ...
    @property
    def compute_dtype(self) -> torch.dtype | None: ...
    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    def open_samples(self, path: Path) -> Samples:
        """A table of the user's own, for the probe.

        Raises:
            PatterningError: it is not there, or its samples are not such as the task's.
        """
        ...

    def build(self, seed: int) -> nn.Module:
        """The model with fresh weights, whole, on the task's device; inside ZeRO's init where that is entered."""
        ...

    def load(self, checkpoint: str, ranks: Ranks) -> nn.Module:
        """The model at a named checkpoint, in ``eval()`` mode, whole or this rank's shards of it (FSDP2)."""
        ...

    def skeleton(self) -> nn.Module:
        """Names and shapes of the model, without weights where that can be had."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """THE one function: losses [sample] or [sample, position] in nats, differentiable, finite everywhere.

        An entry that does not count (a pad, a label of -100, the first token of a packed document) is 0 here and
        False in ``counted``.
        """
        ...

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model makes of samples before its last map [sample(, position), feature], like ``losses``.

        Raises:
            PatterningError: the task does not say.
        """
        ...

    def layered(self, model: nn.Module, component: Component) -> Layered | None:
        """The model cut below a component; None where that is not known, and every pass is a whole one."""
        ...

    def counted(self, samples: OwnSamples, ids: np.ndarray) -> np.ndarray | None:
        """Which entries of ``losses`` count, bool [sample, position]; None: all."""
        ...

    def index(self, samples: OwnSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """What is known of samples, columns [sample]: ``key`` first; ``domain``, ``document``, ``label`` if known."""
        ...

    def entries(self, samples: OwnSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """What is known of single losses, columns [sample, position], such as ``token``; empty where nothing is."""
        ...

    def token_texts(self) -> np.ndarray | None:
        """Text of every token id, objects [token]; None where samples have no tokens, or a tokenizer of their own."""
        ...

    def split(self, name: str, samples: OwnSamples, ids: np.ndarray) -> Terms | None:
        """A split loss of the task's own as signed means, (sign, mask [sample(, position)]) each; None: no such split.

        ``overall`` and ``domain:NAME`` are known for every task and not asked for here.
        """
        ...

    def own_split(self, name: str, seed: int) -> tuple[Samples, np.ndarray] | None:
        """A split loss on samples of its own, with the coefficients of their losses; None: there is no such split.

        Args:
            name: of the split.
            seed: another one gives other samples.
        """
        ...

    def read_weights(self, path: Path, strength: float) -> np.ndarray:
        """rho of the training samples [sample] or [sample, position], 1 + s h where the table has 1 + h.

        Raises:
            PatterningError: the table is not for these samples, or a weight falls below 0.
        """
        ...

    def weighted_samples(self, path: Path, strength: float) -> Samples:
        """The training samples as a table of weights has them: with labels swapped where it says so.

        Raises:
            PatterningError: the table is not for these samples, or there are no labels to be swapped.
        """
        ...

    def swap(self, where: str, swapped: np.ndarray) -> Samples:
        """The training samples with the labels of some swapped, bool [sample].

        Raises:
            PatterningError: naming ``where`` it was asked for: they have no two labels.
        """
        ...

    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer:
        """The optimizer that ``settings`` ask for, over groups of the model's parameters.

        Raises:
            PatterningError: the optimizer of ``settings`` is not for this model.
        """
        ...

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Every metric of a model (or of the engine around it); all ranks call it, each does its share."""
        ...

    def outcomes(self, model: nn.Module, ids: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
        """Metrics that are means over held-out samples: name -> values [sample], NaN where one takes no part.

        Their intervals then cover the samples as well. All ranks call it, each does its share.

        Args:
            model: or the engine around it.
            ids: of held-out samples, set by set; the values are in their order.
            ranks: that share the work.
        """
        ...

    def describe(self, folder: Path) -> None:
        """Write what is needed beside weights to load them again (config.json, tokenizer) into ``folder``."""
        ...

    def fingerprint(self, checkpoint: str | None = None, sha256: FileHash = file_sha256) -> Any:
        """JSON of hashes of all that losses follow from: data, the user's code, and the weights of a checkpoint."""
        ...
