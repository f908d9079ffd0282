"""Split losses are means over the tokens that their names promise; mistakes name the observable and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patterning_dist.data.induction import repeated_sequences
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.observables import load_function, split_losses

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


def values(splits, seed=0, num_repeated=4):
    got = split_losses(splits, TOKENS, DOMAINS, 10, num_repeated)
    losses = np.random.default_rng(seed).normal(3, 1, size=got.coefficients.shape[1:])
    totals = (got.coefficients.double() * torch.from_numpy(losses)).sum(dim=(1, 2))
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
    np.testing.assert_array_equal(got.tokens[:3], TOKENS)
    np.testing.assert_array_equal(got.tokens[3:], repeated_sequences(1, 4, 8, 10))
    assert values({"all": "overall"})[0].tokens.shape == (3, 8)


def test_no_splits_at_all():
    got = split_losses({}, TOKENS, DOMAINS, 10)
    assert got.names == ()
    assert got.coefficients.shape == (0, 3, 7)


def test_a_split_without_tokens_names_the_observable_and_the_remedy():
    for split in ("induction", "induction_minus_rest"):
        with pytest.raises(PatterningError) as caught:
            split_losses({"mine": split}, TOKENS[1:2], DOMAINS[1:2], 10)
        assert str(caught.value) == (
            f"observable mine: the split {split!r} has no tokens in the 1 held-out sequences; "
            "raise sampling.evaluation_sequences or choose another split"
        )


def test_an_unknown_domain_lists_those_that_are_there():
    with pytest.raises(PatterningError, match=r"observable p: there is no domain 'poems' .*there are: books, manuals$"):
        split_losses({"p": "domain:poems"}, TOKENS, DOMAINS, 10)


def test_an_unknown_split_lists_the_splits():
    with pytest.raises(PatterningError, match=r"observable x: unknown split 'odd'; there are: overall, .*domain:NAME$"):
        split_losses({"x": "odd"}, TOKENS, DOMAINS, 10)


def test_functions_are_imported_by_path():
    assert load_function("torch.linalg:norm") is torch.linalg.norm


@pytest.mark.parametrize("path", ["no_such_module_at_all:f", "torch:no_such_function", "torch", ":f"])
def test_a_function_that_is_not_there_is_named(path):
    with pytest.raises(PatterningError) as caught:
        load_function(path)
    text = str(caught.value)
    assert text.startswith(f"observable function {path!r} cannot be loaded (")
    assert text.endswith("; expected package.module:function")
