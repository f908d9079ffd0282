"""Samples of the user's own as ``Samples``: tensors, dicts of them, ``datasets``, or items one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from patterning_dist.errors import PatterningError
from patterning_dist.sampling.samples import Batch, Samples


class ByRows:
    """A ``datasets.Dataset``, which takes lists of numbers, as tensors."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset if dataset.format["type"] == "torch" else dataset.with_format("torch")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ids: Any) -> Batch:
        return self.dataset[torch.as_tensor(ids).tolist()]


class OneByOne:
    """A dataset that gives one item a number: batches are put together as a ``DataLoader`` does."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ids: Any) -> Batch:
        return default_collate([self.dataset[number] for number in torch.as_tensor(ids).tolist()])


def own_samples(data: Any) -> Samples:
    """What gives a batch for a tensor of numbers, whatever ``data`` takes.

    Raises:
        PatterningError: nothing that is addressed by numbers, or items of which no batch can be made.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise PatterningError(
            f"data.load: samples are a {type(data).__name__}; expected a dataset with a length, addressed by numbers"
        )
    if isinstance(data, Mapping):
        raise PatterningError("data.load: samples are a dict; expected a dataset, whose batches may be dicts")
    if type(data).__module__.startswith("datasets."):
        return ByRows(data)
    if not len(data) or _gives_batches(data):
        return data
    one_by_one = OneByOne(data)
    try:
        one_by_one[[0, 0]]
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise PatterningError(
            f"data.load: a {type(data).__name__} gives no batch for a tensor of numbers, nor item by item ({error})"
        ) from None
    return one_by_one


def _gives_batches(data: Any) -> bool:
    """Whether the sample 0, asked for twice at once, comes as tensors of two samples."""
    try:
        batch = data[torch.tensor([0, 0])]
    except Exception:  # whatever a dataset that takes one number does with two
        return False
    leaves = list(_leaves(batch))
    return bool(leaves) and all(getattr(leaf, "shape", ())[:1] == (2,) for leaf in leaves)


def _leaves(batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        for part in batch:
            yield from _leaves(part)
    else:
        yield batch
