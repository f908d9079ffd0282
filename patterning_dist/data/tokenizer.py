"""Byte-level BPE: any text can be encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import write_text

SEPARATOR = "<|endoftext|>"
MIN_VOCABULARY = 257  # 256 bytes and the separator
MAX_VOCABULARY = 65_535  # token ids are stored in 16 bits
_BATCH = 256  # texts in memory at a time


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE with the separator as token 0; the same texts in the same order give the same tokenizer.

    Short texts may give fewer than `vocabulary_size` tokens. Raises PatterningError when it is out of range.
    """
    if not MIN_VOCABULARY <= vocabulary_size <= MAX_VOCABULARY:
        raise PatterningError(
            f"data.vocabulary_size is {vocabulary_size}; expected {MIN_VOCABULARY} to {MAX_VOCABULARY} "
            "(256 bytes and the separator; ids are stored in 16 bits)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A text that spells out "<|endoftext|>" must not be able to end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as JSON, atomically."""
    write_text(path, tokenizer.to_str(pretty=False))


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of the tokenizer's JSON, whatever the layout of the file it came from."""
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Token ids (int64) of each text, one batch of texts in memory at a time; no separators are put in."""
    for start in range(0, len(texts), _BATCH):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + _BATCH]), add_special_tokens=False):
            yield np.asarray(encoding.ids, dtype=np.int64)
