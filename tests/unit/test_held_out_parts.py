"""Phi, its prediction and its result are taken on disjoint held-out samples; a document is on one side only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_targets import Sequences, language_task

from patterning_dist.tasks.held_out import HELD_OUT_PARTS, held_out_ids, held_out_splits, signed_sums

NUM = 90
RNG = np.random.default_rng(0)
DOMAINS = np.array(["books", "code", "few"], object)[np.sort(RNG.choice(3, NUM, p=[0.5, 0.4, 0.1]))]
# Documents of very different sizes; the third domain has two of them.
DOCUMENTS = np.where(DOMAINS == "few", 1000 + np.arange(NUM) % 2, RNG.integers(0, 14, NUM) + 100 * (DOMAINS == "code"))


def task(num_tokens=31):
    found = language_task(RNG.integers(0, 31, (4, 8)), RNG.integers(0, num_tokens, (NUM, 8)), domains=DOMAINS)
    found.held_out["held_out"].documents = DOCUMENTS
    return found


def parts(seed=0, num=NUM):
    return [held_out_ids(task(), seed, num, part)["held_out"] for part in HELD_OUT_PARTS]


@pytest.mark.parametrize("seed", range(4))
def test_parts_are_disjoint_whole_and_cut_between_documents(seed):
    found = parts(seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(NUM))
    for domain in ("books", "code"):
        seen = [set(DOCUMENTS[ids[DOMAINS[ids] == domain]]) for ids in found]
        assert all(seen) and sum(map(len, seen)) == len(set.union(*seen))
        sizes = [int((DOMAINS[ids] == domain).sum()) for ids in found]
        largest = np.unique(DOCUMENTS[domain == DOMAINS], return_counts=True)[1].max()
        assert max(sizes) - min(sizes) <= largest
    # Two documents cannot be on three sides: their sequences are shared out.
    assert len({int((DOMAINS[ids] == "few").sum()) for ids in found}) <= 2


def test_another_seed_is_another_division_and_fewer_samples_are_a_part_of_more():
    assert any(not np.array_equal(a, b) for a, b in zip(parts(0), parts(1), strict=True))
    for few, many in zip(parts(0, 10), parts(0, 20), strict=True):
        assert len(few) == 10 and set(few) < set(many)


def test_groups_are_the_documents_of_the_chosen_samples():
    chosen = held_out_ids(task(), 0, NUM, "realised")
    found = held_out_splits(task(), chosen, {"all": "overall", "rep": "repeated_sequence"}, "realised")
    ids = chosen["held_out"]
    first = found.groups[: len(ids)]
    assert len(set(zip(first, DOCUMENTS[ids], strict=True))) == len(set(DOCUMENTS[ids])) == len(set(first))
    assert len(set(found.groups[len(ids) :])) == len(found.groups) - len(ids)
    assert not set(first) & set(found.groups[len(ids) :])


@pytest.mark.parametrize("part", HELD_OUT_PARTS)
def test_differences_are_laid_out_in_their_terms_and_the_cost_beside_them(part):
    """On all parts but that of the chains; a difference is that of its terms, which are means of losses."""
    few_tokens = task(4)  # bigrams come back
    ids = held_out_ids(few_tokens, 0, NUM, part)
    splits = {"gap": "induction_minus_rest", "books": "domain:books"}
    found = held_out_splits(few_tokens, ids, splits, part)
    assert found.shares.sum(axis=(1, 2))[:2] == pytest.approx([0, 1])
    if part == "observed":
        assert found.names == ("gap", "books")
        return
    assert found.names == ("gap", "gap:induction", "gap:rest", "books", "overall")
    gap, induction, rest, _, overall = found.coefficients
    assert (gap == induction - rest).all() and (found.coefficients[1:] >= 0).all()
    own = held_out_splits(few_tokens, ids, {"a": "induction", "b": "rest", "c": "overall"}, part)
    assert own.names == ("a", "b", "c")  # the last is the cost
    assert (own.coefficients == found.coefficients[[1, 2, 4]]).all()
    sums = signed_sums(found.coefficients, torch.arange(overall.numel()).reshape(overall.shape))
    assert sums[0, :, 0] == pytest.approx(sums[1, :, 0]) and sums[0, :, 1] == pytest.approx(-sums[2, :, 0])


def test_samples_of_the_tasks_own_differ_between_the_parts():
    own = [task().own_split("repeated_sequence", 1 + number)[0] for number in range(3)]
    assert not (own[0] == own[1]).all() and not (own[1] == own[2]).all()


def test_without_documents_samples_are_shared_out():
    bare = language_task(RNG.integers(0, 31, (4, 8)), RNG.integers(0, 31, (9, 8)))
    assert isinstance(bare.held_out["held_out"], Sequences)
    assert [len(held_out_ids(bare, 0, 9, part)["held_out"]) for part in HELD_OUT_PARTS] == [3, 3, 3]
