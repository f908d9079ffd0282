"""Byte-level BPE: any text can be encoded, and every token can be shown."""

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
    return _separator_by_hand(tokenizer)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as JSON, atomically."""
    write_text(path, tokenizer.to_str(pretty=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer's JSON. Raises PatterningError when it is missing, unreadable or has no separator."""
    path = Path(path)
    if not path.is_file():
        raise PatterningError(f"{path}: no such file; expected a tokenizer's JSON")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise PatterningError(
            f"{path}: not a tokenizer ({error}); expected the JSON of the tokenizers library"
        ) from None
    if tokenizer.token_to_id(SEPARATOR) is None:
        raise PatterningError(f"{path}: no token {SEPARATOR!r}; it is needed to separate documents")
    return _separator_by_hand(tokenizer)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of the tokenizer's JSON, whatever the layout of the file it came from."""
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256) -> Iterator[np.ndarray]:
    """Token ids (int64) of each text, one batch of texts in memory at a time; no separators are put in."""
    for start in range(0, len(texts), batch_size):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + batch_size]), add_special_tokens=False):
            yield np.asarray(encoding.ids, dtype=np.int64)


def token_strings(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token for display; bytes that are no UTF-8 on their own appear as \\xNN.

    Raises PatterningError for an id outside the vocabulary.
    """
    return [_token_string(tokenizer, int(token)) for token in ids]


def _token_string(tokenizer: Tokenizer, token: int) -> str:
    symbols = tokenizer.id_to_token(token)
    if symbols is None:
        raise PatterningError(f"token {token} is not in the vocabulary of {tokenizer.get_vocab_size()}")
    if any(symbol not in _BYTES for symbol in symbols):
        return symbols
    return bytes(_BYTES[symbol] for symbol in symbols).decode("utf-8", errors="backslashreplace")


def _separator_by_hand(tokenizer: Tokenizer) -> Tokenizer:
    # A text that spells out "<|endoftext|>" must not be able to end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_symbols() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves, the 68 others as U+0100 and after."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTES = _byte_symbols()
