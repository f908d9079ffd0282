"""Observables phi(w): the numbers whose response to the data is wanted.

Three kinds. A *component loss* is the mean probe loss, phi_C = L(w) - L(w*), on a posterior restricted to C. A *split
loss* is a linear functional of held-out per-token losses, phi(w) = sum_{s,p} c_{s,p} l_{s,p}(w), so any number of them
costs one evaluation of the held-out tokens. A *function* is the user's own phi(model).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterning_dist.data.induction import induction_tokens, repeated_sequences
from patterning_dist.errors import PatterningError

SPLITS = ("overall", "induction", "rest", "induction_minus_rest", "repeated_sequence")


@dataclass(frozen=True)
class SplitLosses:
    """phi_k(w) = sum_{s,p} coefficients[k, s, p] l_{s,p}(w), in nats.

    Attributes:
        names: of the observables, one a row of ``coefficients``.
        tokens: held-out token ids [sequence, position].
        coefficients: [observable, sequence, predicted position].
    """

    names: tuple[str, ...]
    tokens: Tensor
    coefficients: Tensor


def split_losses(
    splits: dict[str, str], tokens: np.ndarray, domains: np.ndarray, vocabulary_size: int, num_repeated: int = 16
) -> SplitLosses:
    """Lay named splits out as coefficients over one set of held-out tokens.

    Args:
        splits: observable name -> one of ``SPLITS`` or ``domain:NAME``.
        tokens: held-out blocks [sequence, position].
        domains: domain of every block [sequence].
        vocabulary_size: for the repeated random sequences, which are added if a split asks for them.

    Raises:
        PatterningError: unknown split, or one with no tokens in the held-out blocks.
    """
    induction = induction_tokens(tokens)
    masks = {"overall": np.ones_like(induction), "induction": induction, "rest": ~induction}
    repeated = np.zeros((0, tokens.shape[1]), dtype=tokens.dtype)
    if "repeated_sequence" in splits.values():
        repeated = repeated_sequences(1, num_repeated, tokens.shape[1], vocabulary_size).astype(tokens.dtype)

    def mean(mask: np.ndarray, name: str, split: str) -> np.ndarray:
        if not mask.any():
            raise PatterningError(
                f"observable {name}: the split {split!r} has no tokens in the {len(tokens)} held-out sequences; "
                "raise sampling.evaluation_sequences or choose another split"
            )
        return mask / mask.sum()

    rows = []
    for name, split in splits.items():
        held_out = np.zeros(induction.shape)
        second_copy = np.zeros((len(repeated), tokens.shape[1] - 1))
        if split in masks:
            held_out = mean(masks[split], name, split)
        elif split == "induction_minus_rest":
            held_out = mean(induction, name, split) - mean(~induction, name, split)
        elif split == "repeated_sequence":
            half = tokens.shape[1] // 2
            second_copy[:, half:] = 1 / second_copy[:, half:].size
        elif split.startswith("domain:"):
            if split.removeprefix("domain:") not in domains:
                raise PatterningError(
                    f"observable {name}: there is no domain {split.removeprefix('domain:')!r} in the held-out "
                    f"sequences; there are: {', '.join(sorted(set(domains)))}"
                )
            held_out = mean((domains == split.removeprefix("domain:"))[:, None] & masks["overall"], name, split)
        else:
            raise PatterningError(
                f"observable {name}: unknown split {split!r}; there are: {', '.join(SPLITS)}, domain:NAME"
            )
        rows.append(np.concatenate([held_out, second_copy]))
    all_tokens = torch.from_numpy(np.concatenate([tokens, repeated]))
    coefficients = np.stack(rows) if rows else np.zeros((0, len(all_tokens), tokens.shape[1] - 1))
    return SplitLosses(tuple(splits), all_tokens, torch.from_numpy(coefficients.astype(np.float32)))


def load_function(path: str, what: str = "observable function") -> Callable[..., Any]:
    """Import a user's function ``package.module:function``, such as an observable, model -> Tensor [k].

    Args:
        path: of the function.
        what: it is, for the message.

    Raises:
        PatterningError: the path is malformed, the module cannot be imported or has no such function.
    """
    module_name, _, function_name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PatterningError(f"{what} {path!r} cannot be loaded ({error}); expected package.module:function") from None
    return function
