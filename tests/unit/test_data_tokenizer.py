"""Byte-level BPE: deterministic, lossless, and nothing in a text can pose as the separator."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from patterning_dist.data.tokenizer import (
    SEPARATOR,
    _parts,
    encode_texts,
    num_long_words,
    save_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from patterning_dist.errors import PatterningError

TEXTS = [f"def function_{n}(x): return x + {n}  # naïve “quotes”\n" * 3 for n in range(40)]


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = (train_tokenizer(iter(TEXTS), 320) for _ in range(2))
    assert tokenizer_sha256(first) == tokenizer_sha256(second)
    assert first.get_vocab_size() == 320
    assert first.token_to_id(SEPARATOR) == 0


def test_encoding_is_lossless_and_independent_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train_tokenizer(TEXTS, 300)
    save_tokenizer(trained, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(trained)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    texts = [*TEXTS[:3], "", "日本語 \x00\t never seen"]
    many = [ids for ids, _, _ in encode_texts(tokenizer, texts)]
    monkeypatch.setattr("patterning_dist.data.tokenizer._BATCH", 1)
    one = [ids for ids, _, _ in encode_texts(tokenizer, texts)]
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in many]
    assert [tokenizer.decode(ids.tolist()) for ids in many] == texts


def test_a_text_cannot_write_a_separator() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    ((ids, _, _),) = encode_texts(tokenizer, [f"a{SEPARATOR}b"])
    assert 0 not in ids


@pytest.mark.parametrize("size", [256, 65_536])
def test_vocabulary_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(PatterningError, match=rf"vocabulary_size is {size}; expected 257 to 65535"):
        train_tokenizer(TEXTS, size)


def test_long_words_are_trained_on_in_parts_and_encoded_whole() -> None:
    """The time of training grew with the square of the longest word: 100,000 letters took 17 s, 10 million days."""
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 300_000))
    text = f"some words {letters} more{' ' * 1000}words"
    parts = list(_parts(text))
    assert "".join(parts) == text
    assert max(len(word) for part in parts for word in re.findall(r"\S+|\s+", part)) == 256
    assert num_long_words(text) == 2
    started = time.process_time()
    tokenizer = train_tokenizer([text], 300)
    assert time.process_time() - started < 30  # 150 s at once
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert list(_parts("short words")) == ["short words"]
    assert num_long_words("x" * 256) == 0
