"""Mean chi of groups of probe entries (domains, labels, patterns of tokens), with errors of the means themselves.

Errors of single entries do not tell the error of their mean: all entries share the draws. Co-moments are linear in the
losses, so those of a group's mean loss follow from the stored ones, and its errors like those of any loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.aggregation.files import read_chain, read_records
from patterning_dist.measure.analysis import SIGN, STANDARD_ERROR, UNITS
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import Baseline, susceptibility
from patterning_dist.storage.files import write_parquet
from patterning_dist.storage.run import RunDirectory

GROUPS = "response/groups.parquet"
_KINDS = ("domain", "label", "pattern")
_MAX_GROUPS = 40  # more of a kind are no columns of a figure


def write_groups(
    run: RunDirectory,
    subjects: Subjects,
    diagnostics: Mapping[str, Mapping[str, Any]],
    index: Mapping[str, np.ndarray],
    baseline: Baseline,
) -> list[str]:
    """Write ``response/groups.parquet``; returns its name, or nothing where entries are of one group alone.

    Args:
        run: holds the co-moments of the chains.
        subjects: whose they are; of steps of half the size none is taken.
        diagnostics: of every subject, with the chains that are left out.
        index: what every probe entry is of [entry].
        baseline: of ``susceptibility``.
    """
    groups = entry_groups(index)
    if not groups:
        return []
    shares = mean_shares([member for *_, member in groups])
    weights = np.append(np.zeros(len(groups)), 1.0)

    def means_of(name: str) -> list[CoMoments]:  # of one chain after another: those of all are large
        folder, left_out = run.path / "sampling" / name, {entry["chain"] for entry in diagnostics[name]["excluded"]}
        kept = (record.chain for record in read_records(folder) if record.chain not in left_out)
        return [read_chain(folder, chain).columns(slice(0, len(shares))).averaged(shares) for chain in kept]

    columns: dict[str, list[Any]] = {}
    for name, subject in subjects.by_name.items():
        if subject.half_step:
            continue
        folder, slash, _ = name.rpartition("/")
        means, whole = means_of(name), f"{folder}{slash}everything"
        # Chains that are their own baseline are known by being the same objects.
        full = None if baseline == "restricted" else means if whole == name else means_of(whole)
        found = susceptibility(means, loss_weights=weights, baseline=baseline, full=full)
        low, high = found.interval()
        for row, observable in enumerate(subjects.observable_names):
            for column, (kind, group, member) in enumerate(groups):
                at = (row, column)
                entry = {
                    "checkpoint": subject.checkpoint,
                    "component": subject.component,
                    "observable": observable,
                    "kind": kind,
                    "group": group,
                    "num_entries": int(member.sum()),
                    "chi": found.chi[at],
                    "standard_error": found.standard_error[at],
                    "low": low[at],
                    "high": high[at],
                }
                for key, value in entry.items():
                    columns.setdefault(key, []).append(value)
    metadata = {"sign": SIGN, "units": UNITS, "standard_error": STANDARD_ERROR, "chi": "mean over the group's entries"}
    write_parquet(run.path / GROUPS, pa.table(columns), metadata)
    return [GROUPS]


def entry_groups(index: Mapping[str, np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    """(kind, name, members [entry]) of every group of a kind that has two groups or more."""
    found = []
    for kind in (kind for kind in _KINDS if kind in index):
        labels = index[kind].astype(str)
        names = np.unique(labels)
        if 1 < len(names) <= _MAX_GROUPS:
            found += [(kind, str(name), labels == name) for name in names]
    return found


def mean_shares(members: Sequence[np.ndarray]) -> np.ndarray:
    """What a loss is in the means over groups and, last, over all, which is L [entry, group + 1].

    members: of every group, booleans [entry].
    """
    columns = [*members, np.ones_like(members[0])]
    return np.stack([column / column.sum() for column in columns], axis=1)
