"""The task of two rules: is a bracket string balanced? (Li et al. 2507.06445)

Training strings are Dyck words (label 1) or have unequal counts (label 0), so that two rules fit: NESTED, the true one,
and EQUAL-COUNT. Out of distribution, strings of equal counts that do not nest tell them apart: NESTED rejects all of
them, EQUAL-COUNT none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules import dyck
from patterning_dist.experiments.two_rules.config import TaskConfig
from patterning_dist.storage.files import read_parquet, write_parquet

# Token ids. Strings shorter than the longest are padded behind END, which attention never looks at.
CLOSE, OPEN, END = 0, 1, 2
SPLITS = ("train", "test", "out_of_distribution")
_NEGATIVES = {"stratified": dyck.unequal_stratified, "uniform": dyck.unequal_uniform}


@dataclass(frozen=True)
class BracketStrings:
    """Strings of one split, a sample each.

    Attributes:
        tokens: int64 [sample, position]; position `lengths` holds END.
        lengths: brackets of every string [sample].
        labels: 1 balanced, 0 not [sample], float32.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, lengths, labels) of the samples `ids`."""
        chosen = np.asarray(ids)
        tokens, lengths, labels = (torch.from_numpy(a[chosen]) for a in (self.tokens, self.lengths, self.labels))
        return tokens, lengths, labels

    def subset(self, ids: np.ndarray) -> BracketStrings:
        """The samples `ids`, in that order."""
        return BracketStrings(self.tokens[ids], self.lengths[ids], self.labels[ids])

    @property
    def text(self) -> list[str]:
        """The strings as they are read."""
        return [
            "".join("()"[int(token == CLOSE)] for token in row[:n])
            for row, n in zip(self.tokens, self.lengths, strict=True)
        ]

    @property
    def class_weights(self) -> np.ndarray:
        """rho_0 with which both labels weigh the same, mean 1 [sample], float64."""
        share = np.where(self.labels > 0, (self.labels > 0).mean(), (self.labels == 0).mean())
        return 0.5 / share


def write_splits(folder: Path, task: TaskConfig, seed: int) -> list[Path]:
    """Draw the three splits and write <split>.parquet each; no string is in two of them.

    Columns: sample_id (row number), text, label.

    Raises:
        PatterningError: there are not as many different strings of such lengths.
    """
    rng = np.random.default_rng([seed, 0x627261636B657473])  # apart from other uses of the seed
    taken: set[bytes] = set()
    paths = []
    for split, balanced, unequal, unnested in (
        ("train", task.num_balanced, task.num_unequal, 0),
        ("test", task.num_test // 2, task.num_test - task.num_test // 2, 0),
        ("out_of_distribution", 0, 0, task.num_out_of_distribution),
    ):
        strings = [
            *_drawn(rng, dyck.dyck_words, balanced, task, taken, "balanced strings"),
            *_drawn(rng, _NEGATIVES[task.unequal], unequal, task, taken, "strings of unequal counts"),
            *_drawn(rng, _unnested, unnested, task, taken, "strings of equal counts that do not nest"),
        ]
        columns = {
            "sample_id": np.arange(len(strings), dtype=np.int32),
            "text": ["".join("()"[int(bracket < 0)] for bracket in string) for string in strings],
            "label": np.repeat(np.array([1, 0], np.int8), [balanced, unequal + unnested]),
        }
        paths.append(folder / f"{split}.parquet")
        write_parquet(paths[-1], pa.table(columns), {"seed": seed, "task": task.model_dump(mode="json")})
    return paths


def read_split(folder: Path, split: str, longest: int) -> BracketStrings:
    """The strings of a split, padded to `longest` brackets and END.

    Raises:
        PatterningError: the table is missing or damaged, or holds other characters or longer strings.
    """
    table, _ = read_parquet(folder / f"{split}.parquet", ("sample_id", "text", "label"))
    texts = table["text"].to_pylist()
    tokens = np.full((len(texts), longest + 1), END, np.int64)
    for row, text in enumerate(texts):
        if len(text) > longest or set(text) - {"(", ")"}:
            raise PatterningError(
                f"{folder / split}.parquet: sample {row} is {text[:60]!r}; expected at most {longest} brackets"
            )
        tokens[row, : len(text)] = np.frombuffer(text.encode(), np.uint8) == ord("(")
    lengths = np.array([len(text) for text in texts], np.int64)
    return BracketStrings(tokens, lengths, table["label"].to_numpy().astype(np.float32))


def _drawn(
    rng: np.random.Generator,
    sampler: Callable[[np.random.Generator, int, int], np.ndarray],
    number: int,
    task: TaskConfig,
    taken: set[bytes],
    what: str,
) -> list[np.ndarray]:
    """Different strings of lengths min_length + 2 Binomial(length_trials, 1/2), in random order of lengths."""

    def batch(size: int) -> list[np.ndarray]:
        lengths = task.min_length + 2 * rng.binomial(task.length_trials, 0.5, size=size)
        strings: list[np.ndarray] = [np.empty(0, np.int8)] * size
        for length in np.unique(lengths):
            places = np.flatnonzero(lengths == length)
            drawn = sampler(rng, len(places), int(length))
            for place, string in zip(places, drawn[rng.permutation(len(drawn))], strict=True):
                strings[place] = string
        return strings

    return dyck.distinct(batch, number, taken, what) if number else []


def _unnested(rng: np.random.Generator, number: int, length: int) -> np.ndarray:
    strings = dyck.equal_counts(rng, 2 * number + 16, length)
    kept = strings[~dyck.is_balanced(strings)][:number]
    return kept if len(kept) == number else np.concatenate([kept, _unnested(rng, number - len(kept), length)])
