"""Induction tokens and token features equal their definitions, written out as loops."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from patterning_dist.data.induction import induction_tokens, repeated_sequences, token_features


@pytest.mark.parametrize("vocabulary", [1, 3, 40, 60_000])
def test_induction_tokens_match_the_definition(vocabulary: int) -> None:
    tokens = np.random.default_rng(vocabulary).integers(0, vocabulary, (30, 24))
    expected = np.zeros((30, 23), dtype=bool)
    for row, block in enumerate(tokens):
        for p in range(1, 24):
            expected[row, p - 1] = any(block[q - 1] == block[p - 1] and block[q] == block[p] for q in range(1, p))
    np.testing.assert_array_equal(induction_tokens(tokens), expected)
    np.testing.assert_array_equal(induction_tokens(tokens.astype(np.uint16)), expected)


def test_induction_tokens_by_hand() -> None:
    found = induction_tokens(np.array([[1, 2, 3, 1, 2, 4], [5, 5, 5, 6, 5, 5]]))
    assert found.tolist() == [[False, False, False, True, False], [False, True, False, False, True]]


@pytest.mark.parametrize("length", [8, 9, 128])
def test_repeated_sequences_repeat_and_depend_on_the_seed_only(length: int) -> None:
    tokens = repeated_sequences(5, 20, length, 50)
    half = length // 2
    assert tokens.shape == (20, length)
    np.testing.assert_array_equal(tokens[:, half : 2 * half], tokens[:, :half])
    assert tokens.min() >= 1
    assert tokens.max() <= 49
    np.testing.assert_array_equal(tokens, repeated_sequences(5, 20, length, 50))
    np.testing.assert_array_equal(tokens[:7], repeated_sequences(5, 7, length, 50))
    assert not np.array_equal(tokens, repeated_sequences(6, 20, length, 50))
    assert induction_tokens(tokens)[:, half:].all()


def test_features_match_their_definitions() -> None:
    generator = np.random.default_rng(2)
    tokens = generator.integers(0, 6, (9, 12))
    counts = generator.integers(0, 100, 6)
    features, names = token_features(tokens, counts)
    assert features.dtype == np.float32
    assert features.shape == (9 * 11, len(names))
    bigrams = Counter((int(a), int(b)) for block in tokens for a, b in pairwise(block))
    induction = induction_tokens(tokens)

    def earlier(block: np.ndarray, at: int) -> tuple[int, int]:
        hits = [q for q in range(at) if block[q] == block[at]]
        return len(hits), at - hits[-1] if hits else len(block)

    expected = []
    for n, block in enumerate(tokens):
        for p in range(1, 12):
            (num_context, far_context), (num_predicted, far_predicted) = (
                earlier(block, p - 1),
                earlier(block, p),
            )
            values = {
                "bigram_occurred_before": induction[n, p - 1],
                "earlier_context_token": num_context,
                "earlier_predicted_token": num_predicted,
                "distance_context_token": far_context,
                "distance_predicted_token": far_predicted,
                "position": p,
                "log_frequency_predicted": math.log1p(counts[block[p]]),
                "log_frequency_context": math.log1p(counts[block[p - 1]]),
                "log_frequency_bigram": math.log1p(bigrams[int(block[p - 1]), int(block[p])]),
            }
            expected.append([values[name] for name in names])
    np.testing.assert_allclose(features, expected, rtol=1e-6)


def test_features_do_not_depend_on_how_blocks_are_chunked() -> None:
    tokens = np.random.default_rng(3).integers(0, 20, (1500, 16))
    features, _ = token_features(tokens, np.ones(20))
    alone = np.concatenate([token_features(tokens[rows], np.ones(20))[0] for rows in (slice(0, 700), slice(700, None))])
    np.testing.assert_array_equal(features[:, :8], alone[:, :8])
