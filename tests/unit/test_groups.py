"""Mean chi of a group, and its error, are those of chains that record the group's mean loss."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import subjects_of, tiny_config

from patterning_dist.data.induction import induction_tokens
from patterning_dist.data.patterns import INDUCTION, PATTERNS, token_patterns
from patterning_dist.data.tokenizer import token_texts
from patterning_dist.measure.groups import entry_groups, mean_shares
from patterning_dist.measure.plans import entry_index
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility

sys.path.append(str(Path(__file__).parent))  # whatever the import mode of the tests
measured_run = importlib.import_module("measured_run")


def chains_of(seed: int, losses_of) -> list[CoMoments]:
    """Chains that record losses, or what a function makes of them."""
    rng, chains = np.random.default_rng(seed), []
    for chain in range(3):
        phi, losses = rng.normal(size=(40, 2)).cumsum(axis=0), rng.normal(size=(40, 12))
        losses += phi[:, :1] * np.linspace(-1, 1, 12)
        recorded = losses_of(losses)
        chains.append(CoMoments.empty(chain, 40, 2, recorded.shape[1], num_batches=8))
        chains[-1].update(phi, recorded)
    return chains


@pytest.mark.parametrize("baseline", ["restricted", "full", "itself"])
def test_a_mean_over_a_group_has_the_error_of_chains_that_record_it(baseline: str) -> None:
    labels = np.array([0, 1, 1, 2, 2, 2, 0, 1, 2, 0, 0, 0])
    shares = mean_shares([labels == group for group in range(3)])

    def group_means(losses: np.ndarray) -> np.ndarray:
        found = [losses[:, labels == group].mean(axis=1) for group in range(3)]
        return np.stack([*found, losses.mean(axis=1)], axis=1)

    chains, recorded = chains_of(0, lambda losses: losses), chains_of(0, group_means)
    full, full_recorded = chains_of(1, lambda losses: losses), chains_of(1, group_means)
    means, full_means = ([m.averaged(shares) for m in part] for part in (chains, full))
    if baseline == "itself":  # chains that are their own baseline
        full, full_means, full_recorded = chains, means, recorded
    kind, weights = "restricted" if baseline == "restricted" else "full", np.array([0, 0, 0, 1.0])
    found = susceptibility(means, loss_weights=weights, baseline=kind, full=full_means)
    expected = susceptibility(recorded, loss_weights=weights, baseline=kind, full=full_recorded)
    for name in ("chi", "standard_error", "degrees_of_freedom", "skewness"):
        np.testing.assert_allclose(getattr(found, name)[:, :3], getattr(expected, name)[:, :3], rtol=1e-9, atol=1e-12)
    # The mean of chi is no news; its error is, which that of single losses does not tell.
    single = susceptibility(chains, baseline=kind, full=full)
    np.testing.assert_allclose(found.chi[:, :3], single.chi @ shares[:, :3], atol=1e-12)
    assert not np.allclose(found.standard_error[:, :3], single.standard_error @ shares[:, :3], rtol=0.05)


def test_the_table_has_the_means_of_the_tables_of_chi(tmp_path: Path) -> None:
    run = measured_run.write_measured(tmp_path / "run", {"baseline": 1.0})
    groups = pq.read_table(run / "response/groups.parquet").to_pandas()
    assert set(groups["kind"]) == {"domain", "pattern"}
    for _, row in groups.iterrows():
        table = pq.read_table(run / f"response/susceptibility-{row['component']}.parquet").to_pandas()
        members = table[table[row["kind"]] == row["group"]]
        assert row["num_entries"] == len(members) and row["low"] < row["chi"] < row["high"]
        assert row["chi"] == pytest.approx(members[f"chi_{row['observable']}"].mean(), rel=1e-4, abs=1e-7)


def test_groups_are_kinds_with_several_names_and_not_too_many() -> None:
    index = {"domain": np.array(["a", "b", "a"]), "label": np.zeros(3, int), "sequence_id": np.arange(3)}
    found = entry_groups(index)
    assert [(kind, name, member.tolist()) for kind, name, member in found] == [
        ("domain", "a", [True, False, True]),
        ("domain", "b", [False, True, False]),
    ]
    assert entry_groups({"domain": np.arange(41)}) == [] and len(entry_groups({"domain": np.arange(40)})) == 40


def test_the_probe_has_the_pattern_of_every_token(tiny_run: Path) -> None:
    subjects = subjects_of(tiny_config(tiny_run), tiny_run)
    index, tokens = entry_index(subjects), subjects.task.train.tokens(subjects.probe.ids)
    repeats = induction_tokens(tokens).ravel()
    assert 0.05 < repeats.mean() < 0.95
    np.testing.assert_array_equal(index["pattern"] == INDUCTION, repeats)
    by_text = token_patterns(token_texts(tiny_run / "data/tokenizer.json"))[index["token"]]
    np.testing.assert_array_equal(index["pattern"][~repeats], by_text[~repeats])
    assert set(index["pattern"]) <= set(PATTERNS)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (" word", "word start"),
        ("word", "word part"),
        ("é", "word part"),
        (" don't", "word start"),
        (" 1,000", "number"),
        ("\n\n", "new line"),
        ("  ", "space"),
        (" (", "opening bracket"),
        ("),", "closing bracket"),
        (" —", "punctuation"),
        ("x=1", "other"),
        ("\ufffd", "other"),
        ("", "other"),
    ],
)
def test_patterns_of_tokens_go_by_their_text(text: str, pattern: str) -> None:
    assert token_patterns(np.array([text], dtype=object)).tolist() == [pattern]
