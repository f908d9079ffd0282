"""Split losses: linear functionals phi_k(w) = sum coefficients[k, s, p] l_{s,p}(w) of held-out losses, in nats.

Any number of them costs one evaluation of the held-out samples. Every held-out set is divided into three disjoint
parts, by document where documents are known: weights that are solved for on some samples fit those samples, so that
chains observe phi on one part, responses are predicted and checked on another, and trainings are measured on the third.
Where responses are predicted, checked and measured, a split that is a signed difference is observed in its two terms
as well, and so is the loss over all held-out samples, which is what a response costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from patterning_dist.data.sampler import permutation
from patterning_dist.errors import PatterningError
from patterning_dist.response.contrast import OVERALL, part_names
from patterning_dist.sampling.samples import Joined, Part, Samples
from patterning_dist.tasks.splits import split_terms
from patterning_dist.tasks.task import Task

# Streams of the counter-based sampler, apart from those of chains (small numbers).
_HELD_OUT_STREAM, _PART_STREAM = 0x68656C64, 0x70617274
# What a part of the held-out samples is for: phi of the chains, predictions and their check, results of trainings.
HeldOutPart = Literal["observed", "predicted", "realised"]
HELD_OUT_PARTS: tuple[HeldOutPart, ...] = get_args(HeldOutPart)


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples and the split losses over them.

    Attributes:
        names: of the observables, one a row of ``coefficients``.
        samples: of all sets, end to end.
        coefficients: [observable, sample] or [observable, sample, position], float64.
        groups: document of every sample, numbered from 0; samples of a group are not independent.
    """

    names: tuple[str, ...]
    samples: Joined
    coefficients: Tensor
    groups: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Sums of coefficients above and below 0 of every sample [observable, sample, sign]."""
        return signed_sums(self.coefficients, torch.ones_like(self.coefficients[0]))


def held_out_ids(task: Task, seed: int, num_samples: int, part: HeldOutPart) -> dict[str, np.ndarray]:
    """Set -> ids of the samples of a part, ascending, ``num_samples`` of every set at most.

    Domain by domain, documents in a random order go to the part that has the fewest samples so far. Where a domain has
    fewer than three documents, and where none are known, the samples themselves are shared out.
    """
    found = {}
    for name, samples in task.held_out.items():
        order = permutation(seed, _HELD_OUT_STREAM, len(samples))
        mine = order[_parts(task, seed, samples)[order] == HELD_OUT_PARTS.index(part)]
        found[name] = np.sort(mine[:num_samples])
    return found


def _parts(task: Task, seed: int, samples: Samples) -> np.ndarray:
    """Number of the part that each sample of a set belongs to [sample]."""
    columns = task.index(samples, np.arange(len(samples)))
    documents, domains = _documents(columns, len(samples)), columns.get("domain", np.zeros(len(samples), int))
    part = np.empty(len(samples), np.int64)
    _, domain, num = np.unique(domains, return_inverse=True, return_counts=True)
    for here in np.split(np.argsort(domain, kind="stable"), np.cumsum(num)[:-1]):
        whole = len(np.unique(documents[here])) >= len(HELD_OUT_PARTS)
        _, group = np.unique(documents[here] if whole else here, return_inverse=True)
        sizes, taken = np.bincount(group), np.zeros(len(HELD_OUT_PARTS), np.int64)
        chosen = np.empty(len(sizes), np.int64)
        for number in permutation(seed, _PART_STREAM, len(sizes)):
            chosen[number] = taken.argmin()
            taken[chosen[number]] += sizes[number]
        part[here] = chosen[group]
    return part


def _documents(columns: Mapping[str, np.ndarray], num_samples: int) -> np.ndarray:
    """Document of every sample; where none are known, every sample is one."""
    return columns.get("document", np.arange(num_samples))


def held_out_splits(
    task: Task, ids: Mapping[str, np.ndarray], splits: Mapping[str, str], part: HeldOutPart = "observed"
) -> HeldOut | None:
    """Lay named splits out as coefficients over held-out samples; None where there are no splits.

    On other parts than ``observed``, NAME:A and NAME:B are the terms of a split A_minus_B called NAME, and ``overall``
    is over all samples.

    Args:
        task: has the held-out sets, and may have splits of its own.
        ids: set -> samples of it, see ``held_out_ids``.
        splits: observable name -> ``overall``, ``domain:NAME`` or a split of the task.
        part: a task's own samples are others for each.

    Raises:
        PatterningError: unknown split, or one without entries in these samples.
    """
    if not splits:
        return None
    if not task.held_out:
        raise PatterningError("sampling.observables: a split_loss needs held-out data, and there is none; add some")
    if part != "observed" and OVERALL not in splits.values():
        splits = {**splits, OVERALL: OVERALL}
    parts: list[Samples] = [Part(task.held_out[name], ids[name]) for name in ids]
    number = 1 + HELD_OUT_PARTS.index(part)
    own = {split: found for split in splits.values() if (found := task.own_split(split, number)) is not None}
    rows: dict[str, np.ndarray] = {}
    for name, split in splits.items():
        if split in own:
            shared = [np.zeros(_shape(task, len(part))) for part in parts]
        else:
            shared = _over_sets(task, ids, name, split)
        row = np.concatenate([*shared, *(c if key == split else np.zeros_like(c) for key, (_, c) in own.items())])
        rows[name] = row
        if part != "observed" and row.min() < 0 < row.max():
            terms = zip(part_names(split), (row, -row), strict=True)
            rows |= {f"{name}:{term}": signed.clip(0) for term, signed in terms}
    joined = Joined([*parts, *(samples for samples, _ in own.values())])
    coefficients = torch.from_numpy(np.stack(list(rows.values())))
    return HeldOut(tuple(rows), joined, coefficients, _groups(task, ids, len(joined)))


def signed_sums(coefficients: Tensor, losses: Tensor) -> np.ndarray:
    """What every sample adds, with coefficients above and below 0 apart [observable, sample, sign].

    Args:
        coefficients: [observable, sample] or [observable, sample, position].
        losses: of the samples [sample] or [sample, position].
    """
    signed = [c * losses for c in (coefficients.clamp(min=0), coefficients.clamp(max=0))]
    return torch.stack([s.flatten(2).sum(dim=2) if s.dim() > 2 else s for s in signed], dim=-1).numpy()


def _groups(task: Task, ids: Mapping[str, np.ndarray], num_samples: int) -> np.ndarray:
    """Documents of all sets apart from each other; samples of a task's own split are each a group."""
    found: list[np.ndarray] = []
    for name, chosen in ids.items():
        _, group = np.unique(_documents(task.index(task.held_out[name], chosen), len(chosen)), return_inverse=True)
        found.append(group + sum(1 + before.max(initial=-1) for before in found))
    known = np.concatenate([np.zeros(0, np.int64), *found])
    return np.concatenate([known, 1 + known.max(initial=-1) + np.arange(num_samples - len(known))])


def _shape(task: Task, num: int) -> tuple[int, ...]:
    return (num,) if task.num_positions is None else (num, task.num_positions)


def _over_sets(task: Task, ids: Mapping[str, np.ndarray], name: str, split: str) -> list[np.ndarray]:
    """Coefficients of one split, set by set."""
    masks = []
    for key, chosen in ids.items():
        samples = task.held_out[key]
        domains = task.index(samples, chosen).get("domain", np.full(len(chosen), key, object))
        if split == OVERALL or split.startswith("domain:"):
            wanted = split.removeprefix("domain:")
            here = np.full(len(chosen), split == OVERALL or key == wanted) | (domains == wanted)
            counted = task.counted(samples, chosen)
            everywhere = np.ones(_shape(task, len(chosen)), bool) if counted is None else counted
            masks.append([(1.0, everywhere & here.reshape(-1, *[1] * (everywhere.ndim - 1)))])
        elif (found := split_terms(task, split, samples, chosen)) is not None:
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
