"""Tokenizers: byte-level BPE that is trained here, which can encode any text, or that of a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.storage.files import write_text

SEPARATOR = "<|endoftext|>"
MIN_VOCABULARY = 257  # 256 bytes and the separator
MAX_VOCABULARY = 65_535
# Characters of a word, or of a blank, that training counts as one: its time grows with the square of them.
_LONGEST_WORD = 256
_LONG = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}|\s{{{_LONGEST_WORD + 1},}}")
_FILES = ("tokenizer.json", "tokenizer_config.json")
_BATCH = 256  # texts in memory at a time


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Byte-level BPE with the separator as token 0; the same texts in the same order give the same tokenizer.

    Words of more than 256 characters (DNA, minified code) count as several here; they are encoded whole. Short texts
    may give fewer than `vocabulary_size` tokens. Raises PatterningError when it is out of range.

    Examples:
        >>> tokenizer = train_tokenizer(["so it is so it is"], vocabulary_size=260)
        >>> tokenizer.get_vocab_size(), 0 in tokenizer.encode("<|endoftext|>").ids  # no text can end a document
        (260, False)
    """
    if not MIN_VOCABULARY <= vocabulary_size <= MAX_VOCABULARY:
        raise PatterningError(
            f"data.vocabulary_size is {vocabulary_size}; expected {MIN_VOCABULARY} to {MAX_VOCABULARY} "
            "(256 bytes and the separator)"
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
    tokenizer.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
    # A text that spells out "<|endoftext|>" must not be able to end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def num_long_words(text: str) -> int:
    """Words that ``train_tokenizer`` counts as several."""
    return sum(1 for _ in _LONG.finditer(text))


def _parts(text: str) -> Iterator[str]:
    """The text, cut within long words."""
    start = 0
    for word in _LONG.finditer(text):
        for stop in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
            yield text[start:stop]
            start = stop
    yield text[start:]


def load_tokenizer(path: str) -> Any:
    """A tokenizer of ``transformers``: of a folder, of a sub-folder (a checkpoint) of it, or of the hub.

    Raises:
        PatterningError: there is none, or it brings code of its own.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    looked = folder.is_dir() and not any((folder / name).is_file() for name in _FILES)
    inside = sorted(file.parent for name in _FILES for file in folder.glob(f"*/{name}")) if looked else []
    if looked and not inside:
        raise PatterningError(
            f"{path}: no tokenizer in this folder ({', '.join(_FILES)}); save it there, name one in data.tokenizer, or "
            "give token ids"
        )
    try:
        return AutoTokenizer.from_pretrained(str(inside[0] if inside else path), trust_remote_code=False)
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        raise PatterningError(
            f"{path}: its tokenizer cannot be read ({first_line(error)}); name another in data.tokenizer, or give "
            "token ids"
        ) from None


def text_tokenizer(path: str) -> tuple[Tokenizer, int]:
    """A model's tokenizer for plain text, in which nothing spells a special token, and its id between documents.

    Raises:
        PatterningError: see ``load_tokenizer``; or it is none of the library ``tokenizers``, or has no such token.
    """
    loaded = load_tokenizer(path)
    separator = loaded.bos_token_id if loaded.eos_token_id is None else loaded.eos_token_id
    if not loaded.is_fast or separator is None:
        lacks = "an eos_token or bos_token" if loaded.is_fast else "a tokenizer.json"
        raise PatterningError(f"{path}: its tokenizer lacks {lacks}; name another in data.tokenizer")
    tokenizer: Tokenizer = loaded.backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer, int(separator)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer as JSON, atomically."""
    write_text(path, tokenizer.to_str(pretty=False))


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of the tokenizer's JSON, whatever the layout of the file it came from."""
    return hashlib.sha256(tokenizer.to_str(pretty=False).encode()).hexdigest()


def token_texts(path: Path) -> np.ndarray:
    """Text of every token of a tokenizer's JSON, objects [token]; bytes that are no text alone come as U+FFFD."""
    tokenizer = Tokenizer.from_file(str(path))
    ids = range(tokenizer.get_vocab_size())
    return np.array([tokenizer.decode([token], skip_special_tokens=False) for token in ids], dtype=object)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids of each text, and where their characters begin and end in it, int64 each; no separators are put in.

    One batch of texts is in memory at a time.
    """
    for start in range(0, len(texts), _BATCH):
        for encoding in tokenizer.encode_batch(list(texts[start : start + _BATCH]), add_special_tokens=False):
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            yield np.asarray(encoding.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1]
