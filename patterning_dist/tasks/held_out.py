"""Split losses: linear functionals phi_k(w) = sum coefficients[k, s, p] l_{s,p}(w) of held-out losses, in nats.

Any number of them costs one evaluation of the held-out samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patterning_dist.data.sampler import permutation
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.samples import Joined, Part, Samples
from patterning_dist.tasks.task import Task

_HELD_OUT_STREAM = 0x68656C64  # of the counter-based sampler, apart from those of chains (small numbers)


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples and the split losses over them.

    Attributes:
        names: of the observables, one a row of ``coefficients``.
        samples: of all sets, end to end.
        coefficients: [observable, sample] or [observable, sample, position], float64.
    """

    names: tuple[str, ...]
    samples: Joined
    coefficients: Tensor


def held_out_splits(task: Task, seed: int, num_samples: int, splits: Mapping[str, str]) -> HeldOut | None:
    """Lay named splits out as coefficients over a part of the held-out samples; None where there are no splits.

    Args:
        task: has the held-out sets, and may have splits of its own.
        seed: of the run; it decides which samples are taken.
        num_samples: of every set, at most.
        splits: observable name -> ``overall``, ``domain:NAME`` or a split of the task.

    Raises:
        PatterningError: unknown split, or one without entries in these samples.
    """
    if not splits:
        return None
    if not task.held_out:
        raise PatterningError("sampling.observables: a split_loss needs held-out data, and there is none; add some")
    ids = {
        name: np.sort(permutation(seed, _HELD_OUT_STREAM, len(samples))[:num_samples])
        for name, samples in task.held_out.items()
    }
    parts: list[Samples] = [Part(task.held_out[name], ids[name]) for name in ids]
    own = {split: found for split in splits.values() if (found := task.own_split(split)) is not None}
    rows = []
    for name, split in splits.items():
        if split in own:
            shared = [np.zeros(_shape(task, len(part))) for part in parts]
        else:
            shared = _over_sets(task, ids, name, split)
        rows.append(
            np.concatenate([*shared, *(c if key == split else np.zeros_like(c) for key, (_, c) in own.items())])
        )
    joined = Joined([*parts, *(samples for samples, _ in own.values())])
    return HeldOut(tuple(splits), joined, torch.from_numpy(np.stack(rows)))


def _shape(task: Task, num: int) -> tuple[int, ...]:
    return (num,) if task.num_positions is None else (num, task.num_positions)


def _over_sets(task: Task, ids: Mapping[str, np.ndarray], name: str, split: str) -> list[np.ndarray]:
    """Coefficients of one split, set by set."""
    masks = []
    for key, chosen in ids.items():
        samples = task.held_out[key]
        domains = task.index(samples, chosen).get("domain", np.full(len(chosen), key, object))
        if split == "overall" or split.startswith("domain:"):
            wanted = split.removeprefix("domain:")
            here = np.full(len(chosen), split == "overall" or key == wanted) | (domains == wanted)
            counted = task.counted(samples, chosen)
            everywhere = np.ones(_shape(task, len(chosen)), bool) if counted is None else counted
            masks.append([(1.0, everywhere & here.reshape(-1, *[1] * (everywhere.ndim - 1)))])
        elif (found := task.split(split, samples, chosen)) is not None:
            masks.append(found)
        else:
            raise PatterningError(f"observable {name}: there is no split {split!r} in this task")
    rows = []
    for terms in zip(*masks, strict=True):
        sign, total = terms[0][0], sum(int(mask.sum()) for _, mask in terms)
        if not total:
            there = sorted(
                {str(d) for k, c in ids.items() for d in [k, *task.index(task.held_out[k], c).get("domain", [])]}
            )
            raise PatterningError(
                f"observable {name}: the split {split!r} has no entries in the held-out samples, whose domains are "
                f"{', '.join(there)}; raise sampling.evaluation_sequences or choose another split"
            )
        rows.append([sign * mask / total for _, mask in terms])
    return [np.sum(parts, axis=0) for parts in zip(*rows, strict=True)]
