"""Mean chi of groups of probe entries (domains, labels, patterns of tokens), with errors of the means themselves.

Errors of single entries do not tell the error of their mean: all entries share the draws. Co-moments are linear in the
losses, so those of a group's mean loss follow from the stored ones, and its errors like those of any loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.aggregation.files import read_chains
from patterning_dist.measure.analysis import SIGN, STANDARD_ERROR, UNITS
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import Baseline, Susceptibility, susceptibility
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
    shares = np.stack([member / member.sum() for _, _, member in groups], axis=1)

    def chains_of(name: str) -> list[CoMoments]:
        left_out = {entry["chain"] for entry in diagnostics[name]["excluded"]}
        healthy = (m for m in read_chains(run.path / "sampling" / name)[0] if m.chain not in left_out)
        return [moments.columns(slice(0, len(shares))) for moments in healthy]

    columns: dict[str, list[Any]] = {}
    for name, subject in subjects.by_name.items():
        if subject.half_step:
            continue
        folder, slash, _ = name.rpartition("/")
        chains, whole = chains_of(name), f"{folder}{slash}everything"
        full = None if baseline == "restricted" else chains if whole == name else chains_of(whole)
        found = group_susceptibility(chains, shares, baseline, full)
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


def group_susceptibility(
    chains: Sequence[CoMoments], shares: np.ndarray, baseline: Baseline, full: Sequence[CoMoments] | None = None
) -> Susceptibility:
    """chi of weighted means of probe losses, chi_g = -Cov(phi, sum_i s_ig l_i - L), L the mean of all.

    Args:
        chains: healthy ones, of single losses alone.
        shares: [entry, group], summing to 1 over entries.
        baseline, full: of ``susceptibility``.
    """
    num_entries, num_groups = shares.shape
    with_mean = np.concatenate([shares, np.full((num_entries, 1), 1 / num_entries)], axis=1)
    weights = np.append(np.zeros(num_groups), 1.0)
    means = [moments.averaged(with_mean) for moments in chains]
    # Chains that are their own baseline are known by being the same objects.
    whole = means if full is chains else full and [moments.averaged(with_mean) for moments in full]
    return susceptibility(means, loss_weights=weights, baseline=baseline, full=whole)
