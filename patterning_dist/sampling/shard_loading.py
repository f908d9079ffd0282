"""A language model of ``transformers`` whose weights go from the files to the ranks that hold them.

No rank ever holds the whole: the module is built with parameters that have a shape and no memory, cut over the ranks,
and every rank reads its own rows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from patterning_dist.models.huggingface import load_language_model
from patterning_dist.models.pretrained_config import Head
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard import shard_model

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel


def load_sharded_language_model(
    path: str,
    revision: str | None,
    ranks: Ranks,
    device: torch.device | str,
    *,
    compute_dtype: torch.dtype | None = None,
    head: Head = "tokens",
) -> PreTrainedModel:
    """The numbers of ``load_language_model``, cut over the ranks of a chain group by ``shard_model``.

    Args:
        path, revision, head: see ``load_language_model``.
        ranks: the chain group; all of its ranks call this together and see the same files.
        device: where this rank computes.
        compute_dtype: see ``shard_model``.

    Raises:
        PatterningError: see ``load_language_model``.
    """
    cut = partial(shard_model, ranks=ranks, device=device, compute_dtype=compute_dtype) if ranks.size > 1 else None
    return load_language_model(path, revision, device, head, cut)
