"""Causal language models: a sample is a sequence, an entry a predicted token, a loss -log p(token | those before)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patterning_dist.config import TrainingConfig
from patterning_dist.data.induction import induction_tokens, repeated_sequences
from patterning_dist.data.tokenizer import token_texts
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import Component
from patterning_dist.models.losses import counted_losses, pass_arguments, token_ids
from patterning_dist.sampling.layered import Layered
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Batch, Samples
from patterning_dist.tasks.base import CheckpointTask
from patterning_dist.tasks.language_metrics import LANGUAGE_METRICS, Evaluation
from patterning_dist.tasks.task import Metric, Terms, TokenLosses

_NUM_REPEATED = 16


class LanguageModel(Protocol):
    """An architecture: how it is built, loaded and run.

    One that may have checkpoints from before the run also has ``load_given``, (checkpoint, ranks) -> module, and
    ``files_fingerprint``, (checkpoint, sha256) -> JSON of hashes of its files.
    """

    config: Any  # the section of the experiment file

    def build(self, seed: int) -> nn.Module: ...
    def load(self, folder: Path, ranks: Ranks) -> nn.Module: ...
    def skeleton(self) -> nn.Module: ...
    def token_losses(self, model: nn.Module, tokens: Tensor, **arguments: Tensor) -> Tensor: ...
    def embeddings(self, model: nn.Module) -> Tensor: ...
    def states(self, model: nn.Module, tokens: Tensor, **arguments: Tensor) -> Tensor: ...
    def patterns(self, model: nn.Module, inputs: Tensor) -> list[Tensor]: ...
    def without_head(self, layer: int, head: int) -> TokenLosses | None: ...
    def layered(self, model: Any, component: Component) -> Layered | None: ...
    def optimizer(self, model: nn.Module, settings: TrainingConfig) -> Optimizer: ...
    def describe(self, folder: Path) -> None: ...


class TokenSamples(Samples, Protocol):
    """Sequences of token ids, see ``data.tokens.TokenDataset``.

    A batch is a tensor [sample, position], or a mapping with ``tokens``, ``counted`` and, of packed rows,
    ``position_ids``.
    """

    context_length: int
    domains: np.ndarray
    documents: np.ndarray
    metadata: Mapping[str, Any]

    @property
    def mean_counted(self) -> float | None: ...
    @property
    def sha256(self) -> str: ...
    def tokens(self, ids: np.ndarray) -> np.ndarray: ...
    def document_tokens(self, ids: np.ndarray) -> np.ndarray: ...
    def counted(self, ids: np.ndarray) -> np.ndarray | None: ...


class LanguageTask(CheckpointTask):
    """A ``Task``; see there. Its samples are sequences of equal length, ``TokenSamples``."""

    key = "sequence_id"
    model: LanguageModel
    train: TokenSamples

    @cached_property
    def num_positions(self) -> int:
        """Predicted tokens of a sequence."""
        return self.train.context_length - 1

    @property
    def mean_counted(self) -> float | None:
        """See ``TokenSamples``."""
        return self.train.mean_counted

    @cached_property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        skeleton: Any = self.skeleton()
        return getattr(skeleton, "vocabulary_size", None) or skeleton.config.vocab_size

    @cached_property
    def evaluation(self) -> Evaluation:
        """What metrics are taken on."""
        return Evaluation.build(self, *self._evaluation)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``tasks.language_metrics``."""
        return LANGUAGE_METRICS

    def open_samples(self, path: Path) -> TokenSamples:
        """A table of tokens, all of whose sequences are as long as those of the training data.

        Raises:
            PatterningError: it cannot be read, or its tokens are of another vocabulary.
        """
        return probe_table(path, self.train)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """[sample, position - 1]; column p is the loss of token p + 1, 0 where it does not count."""
        return counted_losses(self.model.token_losses(model, token_ids(batch), **pass_arguments(batch)), batch)

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """[sample, position - 1, 2 d_model]: the state that a token is predicted from, and the token's embedding."""
        tokens = token_ids(batch)
        states = self.model.states(model, tokens, **pass_arguments(batch))
        return torch.cat([states, self.model.embeddings(model)[tokens[:, 1:]]], dim=-1)

    def counted(self, samples: TokenSamples, ids: np.ndarray) -> np.ndarray | None:
        """Predicted tokens that count."""
        return samples.counted(ids)

    def index(self, samples: TokenSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """sequence_id, domain and document."""
        return {self.key: np.asarray(ids), "domain": samples.domains[ids], "document": samples.documents[ids]}

    def entries(self, samples: TokenSamples, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The predicted token."""
        return {"token": samples.tokens(ids)[:, 1:].astype(np.int32)}

    def token_texts(self) -> np.ndarray | None:
        """Of the tokenizer that the run's text was cut with."""
        file = self.folder / "data" / "tokenizer.json"
        return token_texts(file) if file.is_file() else None

    def split(self, name: str, samples: TokenSamples, ids: np.ndarray) -> Terms | None:
        """induction, rest, induction_minus_rest: predicted tokens that complete an earlier bigram, and the others."""
        if name not in ("induction", "rest", "induction_minus_rest"):
            return None
        counted, induction = samples.counted(ids), induction_tokens(samples.document_tokens(ids))
        counts = np.ones_like(induction) if counted is None else counted
        signs = {"induction": (1.0,), "rest": (1.0,), "induction_minus_rest": (1.0, -1.0)}[name]
        masks = [~induction] if name == "rest" else [induction, ~induction]
        return [(sign, mask & counts) for sign, mask in zip(signs, masks, strict=False)]

    def own_split(self, name: str, seed: int) -> tuple[Samples, np.ndarray] | None:
        """repeated_sequence: the second copy of random tokens that come twice."""
        if name != "repeated_sequence":
            return None
        length = self.num_positions + 1
        tokens = repeated_sequences(seed, _NUM_REPEATED, length, self.vocabulary_size)
        coefficients = np.zeros((len(tokens), length - 1))
        coefficients[:, length // 2 :] = 1
        return torch.from_numpy(tokens), coefficients / coefficients.sum()

    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """See ``tasks.language_metrics``."""
        return self.evaluation.measure(self, model, ranks)


def probe_table(path: Path, train: TokenSamples) -> TokenSamples:
    """A table of tokens whose sequences are no longer than those of the training data.

    Raises:
        PatterningError: they are longer, or were made with another tokenizer.
    """
    own, length = bool(train.metadata), train.context_length
    probe = TokenDataset(path, None if own else length)
    if probe.context_length > length:
        raise PatterningError(
            f"sampling.probe: {path} has sequences of {probe.context_length} tokens, but the model's context is "
            f"{length} (data.context_length); cut the probe or train with a longer context"
        )
    if own and probe.metadata["tokenizer_sha256"] != train.metadata["tokenizer_sha256"]:
        raise PatterningError(
            f"sampling.probe: {path} was made with another tokenizer than data/train.parquet of this run"
        )
    return probe
