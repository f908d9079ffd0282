"""BM25 against its formula, summed term by term."""

from __future__ import annotations

import math

import numpy as np

from patterning_dist.data.bm25 import bm25_entries


def test_sums_of_entries_are_minus_bm25() -> None:
    rng = np.random.default_rng(0)
    tokens, counted = rng.integers(0, 12, (7, 9)), rng.random((7, 9)) < 0.8
    queries = [np.array([1, 1, 5, 40]), np.array([11])]  # a term twice counts once; one that is nowhere is nothing
    found = list(bm25_entries(tokens, counted, queries))
    documents = [tokens[d][counted[d]].tolist() for d in range(7)]
    mean_length = np.mean([len(document) for document in documents])
    for query, entries in zip(queries, found, strict=True):
        assert (entries[~counted] == 0).all() and (entries <= 0).all()
        for document, row in zip(documents, entries, strict=True):
            score = 0.0
            for term in set(query.tolist()):
                frequency = sum(term in other for other in documents)
                idf = math.log(1 + (7 - frequency + 0.5) / (frequency + 0.5))
                tf = document.count(term)
                score += idf * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * len(document) / mean_length))
            np.testing.assert_allclose(row.sum(), -score, rtol=1e-5)
