"""Split losses are means over the tokens that their names promise; mistakes name the observable and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_targets import language_task, whole_sets

from patterning_dist.data.induction import repeated_sequences
from patterning_dist.errors import PatterningError
from patterning_dist.functions import load_function
from patterning_dist.tasks.held_out import held_out_splits

# Induction tokens by hand: the second "1 2" of the first row, the second "7 8" and the "8 7" before it of the last.
TOKENS = np.array([[1, 2, 3, 1, 2, 5, 6, 9], [1, 2, 3, 4, 5, 6, 7, 8], [7, 8, 7, 8, 7, 1, 3, 5]])
INDUCTION = np.array([[0, 0, 0, 1, 0, 0, 0], [0] * 7, [0, 0, 1, 1, 0, 0, 0]], dtype=bool)
DOMAINS = np.array(["manuals", "books", "manuals"], dtype=object)
SPLITS = {
    "all": "overall",
    "i": "induction",
    "r": "rest",
    "gap": "induction_minus_rest",
    "m": "domain:manuals",
    "b": "domain:books",
    "rep": "repeated_sequence",
}


def held_out(splits, tokens=TOKENS, domains=DOMAINS):
    task = language_task(TOKENS, tokens, domains=domains, vocabulary_size=10)
    return held_out_splits(task, whole_sets(task), splits)


def values(splits, seed=0):
    got = held_out(splits)
    losses = np.random.default_rng(seed).normal(3, 1, size=got.coefficients.shape[1:])
    totals = (got.coefficients * torch.from_numpy(losses)).sum(dim=(1, 2))
    return got, losses, dict(zip(got.names, totals.tolist(), strict=True))


def test_every_split_is_the_mean_over_its_tokens():
    got, losses, value = values(SPLITS)
    held, repeated = losses[:3], losses[3:]
    wanted = {
        "all": held.mean(),
        "i": held[INDUCTION].mean(),
        "r": held[~INDUCTION].mean(),
        "gap": held[INDUCTION].mean() - held[~INDUCTION].mean(),
        "m": held[[0, 2]].mean(),
        "b": held[1].mean(),
        "rep": repeated[:, 4:].mean(),  # the second copy from its second token on
    }
    assert got.names == tuple(SPLITS)
    assert value == pytest.approx(wanted, rel=1e-6)


def test_repeated_sequences_are_added_only_where_they_are_asked_for():
    got, *_ = values(SPLITS)
    tokens = got.samples[torch.arange(len(got.samples))]
    np.testing.assert_array_equal(tokens[:3], TOKENS)
    np.testing.assert_array_equal(tokens[3:], repeated_sequences(1, 16, 8, 10))
    assert len(values({"all": "overall"})[0].samples) == 3


def test_no_splits_at_all():
    assert held_out({}) is None


@pytest.mark.parametrize("split", ["induction", "induction_minus_rest", "domain:poems"])
def test_a_split_without_entries_names_the_observable_and_the_remedy(split):
    with pytest.raises(PatterningError) as caught:
        held_out({"mine": split}, TOKENS[1:2], DOMAINS[1:2])
    assert str(caught.value) == (
        f"observable mine: the split {split!r} has no entries in the held-out samples, "
        "whose domains are books, held_out; "
        "raise sampling.evaluation_sequences or choose another split"
    )


def test_an_unknown_split_is_named():
    with pytest.raises(PatterningError, match=r"observable x: there is no split 'odd' in this task"):
        held_out({"x": "odd"})


def test_coefficients_leave_out_what_does_not_count():
    counted = np.ones((3, 7), bool)
    counted[:, 4:] = False
    task = language_task(TOKENS, TOKENS, domains=DOMAINS, vocabulary_size=10)
    task.held_out["held_out"].mask = counted
    got = held_out_splits(task, whole_sets(task), {"all": "overall", "r": "rest"})
    np.testing.assert_allclose(got.coefficients[0], counted / counted.sum())
    np.testing.assert_allclose(got.coefficients[1], (counted & ~INDUCTION) / (counted & ~INDUCTION).sum())


def test_functions_are_imported_by_path():
    assert load_function("torch.linalg:norm") is torch.linalg.norm


@pytest.mark.parametrize("path", ["no_such_module_at_all:f", "torch:no_such_function", "torch", ":f"])
def test_a_function_that_is_not_there_is_named(path):
    with pytest.raises(PatterningError) as caught:
        load_function(path)
    text = str(caught.value)
    assert text.startswith(f"observable function {path!r} cannot be loaded (")
    assert text.endswith("; expected package.module:function")
