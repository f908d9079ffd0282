"""Okapi BM25 between token sequences: attribution by overlap, which knows of no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

_K1, _B = 1.5, 0.75  # of bergson's baseline, likewise that terms of the query are a set


def bm25_entries(tokens: np.ndarray, counted: np.ndarray, queries: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Every token's part of -BM25 of its sequence, query by query, float32 [sample, position]; a sample is its sum.

    BM25(d) = sum_{t in q and d} idf_t tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|)), where
    idf_t = log( 1 + (n - df_t + 1/2) / (df_t + 1/2) )  (Robertson & Zaragoza, 2009). The sign is that of losses.

    Args:
        tokens: ids of the sequences that are scored [sample, position].
        counted: which of them are there, bool [sample, position].
        queries: ids of the tokens of each query [position].

    Examples:
        >>> tokens, counted = np.array([[1, 2], [3, 4]]), np.ones((2, 2), bool)
        >>> (scores,) = bm25_entries(tokens, counted, queries=[np.array([1])])
        >>> scores.sum(axis=1).round(2) + 0.0  # sequence 0 has the token, with idf log 2: it helps, so it is below 0
        array([-0.69,  0.  ], dtype=float32)
    """
    num_tokens = 1 + int(tokens.max())
    keys = np.arange(len(tokens))[:, None] * num_tokens + tokens
    terms, inverse, repeats = np.unique(keys[counted], return_inverse=True, return_counts=True)
    document_frequency = np.bincount(terms % num_tokens, minlength=num_tokens)
    idf = np.log1p((len(tokens) - document_frequency + 0.5) / (document_frequency + 0.5))
    lengths = counted.sum(axis=1)
    bias = _K1 * (1 - _B + _B * lengths / lengths.mean())
    of_token = (_K1 + 1) / (repeats[inverse] + bias[np.nonzero(counted)[0]])
    for query in queries:
        asked = np.isin(np.arange(num_tokens), query)
        found = np.zeros(tokens.shape, np.float32)
        found[counted] = -(idf * asked)[tokens[counted]] * of_token
        yield found
