"""Tokens that complete an earlier bigram, repeated random sequences, and features of tokens in their context.

An induction circuit predicts B after A when "A B" came before (Olsson et al. 2209.11895). Arrays run over
sequence and position; entry [:, j] is about the predicted token at position p = j + 1.
"""

from __future__ import annotations

import numpy as np

from patterning_dist.data.sampler import minibatch

_BLOCKS_AT_ONCE = 1024  # keeps the comparison of all pairs of positions inside the cache
_REPEATED_STREAM = 0x7265706561746564  # "repeated" in ASCII: apart from every other use of a seed


def _bigrams(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens, dtype=np.int64)
    return (tokens[:, :-1] << 32) | tokens[:, 1:]


def induction_tokens(tokens: np.ndarray) -> np.ndarray:
    """bool [N, L-1]: True where tokens[q-1:q+1] == tokens[p-1:p+1] for some 1 <= q < p in the same block.

    `tokens`: [N, L] token ids. The earlier bigram may overlap the later one ("a a a").

    Examples:
        >>> induction_tokens(np.array([[5, 7, 9, 5, 7, 9]]))  # 7 and 9 came after the same token before
        array([[False, False, False,  True,  True]])
    """
    bigrams = _bigrams(tokens)
    order = np.argsort(bigrams, axis=1, kind="stable")
    ranked = np.take_along_axis(bigrams, order, axis=1)
    # In a stable sort the first of equals is the earliest, and all the others came after it.
    repeated = np.zeros(bigrams.shape, dtype=bool)
    repeated[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    found = np.empty_like(repeated)
    np.put_along_axis(found, order, repeated, axis=1)
    return found


def repeated_sequences(seed: int, num: int, context_length: int, vocabulary_size: int) -> np.ndarray:
    """int64 [num, context_length]: uniform random tokens, the second half repeating the first.

    Token 0, the document separator, is left out. An odd length ends with the half's first token once more.

    Examples:
        >>> first, second = repeated_sequences(seed=0, num=1, context_length=6, vocabulary_size=100).reshape(2, 3)
        >>> (first == second).all()
        np.True_
    """
    half = context_length // 2
    ids = 1 + minibatch(seed, _REPEATED_STREAM, 0, num * half, vocabulary_size - 1)
    return np.tile(ids.reshape(num, half), (1, 3))[:, :context_length]


FEATURES = (
    "bigram_occurred_before",
    "earlier_context_token",  # occurrences of the context token before it
    "earlier_predicted_token",  # occurrences of the predicted token before it
    "distance_context_token",  # positions back to the context token's last occurrence; context_length if none
    "distance_predicted_token",
    "position",
    "log_frequency_predicted",
    "log_frequency_context",
    "log_frequency_bigram",
)


def token_features(tokens: np.ndarray, unigram_counts: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """float32 [N * (L-1), F] and the F names: what a token's context and frequency say about it.

    `tokens`: [N, L] token ids; `unigram_counts`: [V] occurrences in the corpus. Frequencies are log(1 + count); bigrams
    are counted in `tokens` itself.
    """
    tokens = np.asarray(tokens)
    num_blocks, length = tokens.shape
    features = np.empty((num_blocks, length - 1, len(FEATURES)), dtype=np.float32)
    features[:, :, 0] = induction_tokens(tokens)
    for start in range(0, num_blocks, _BLOCKS_AT_ONCE):
        rows = slice(start, start + _BLOCKS_AT_ONCE)
        _earlier_occurrences(tokens[rows].astype(np.int32), features[rows])
    features[:, :, 5] = np.arange(1, length)
    log_counts = np.log1p(np.asarray(unigram_counts, dtype=np.float64))
    features[:, :, 6] = log_counts[tokens[:, 1:]]
    features[:, :, 7] = log_counts[tokens[:, :-1]]
    _, inverse, counts = np.unique(_bigrams(tokens), return_inverse=True, return_counts=True)
    features[:, :, 8] = np.log1p(counts)[inverse].reshape(num_blocks, length - 1)
    return features.reshape(num_blocks * (length - 1), len(FEATURES)), FEATURES


def _earlier_occurrences(tokens: np.ndarray, features: np.ndarray) -> None:
    """Fill features 1 to 4: how often a position's token came before, and how far back the last time."""
    num_blocks, length = tokens.shape
    columns = np.ascontiguousarray(tokens.T)  # position sample
    counts = np.zeros((length, num_blocks), dtype=np.int16)
    distances = np.full((length, num_blocks), length, dtype=np.int16)
    for lag in range(length - 1, 0, -1):
        same = columns[lag:] == columns[:-lag]
        counts[lag:] += same
        # The nearest occurrence comes last and overwrites the farther ones.
        np.putmask(distances[lag:], same, np.int16(lag))
    features[:, :, 1], features[:, :, 2] = counts[:-1].T, counts[1:].T
    features[:, :, 3], features[:, :, 4] = distances[:-1].T, distances[1:].T
