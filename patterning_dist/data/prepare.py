"""From documents to token tables: split, tokenizer, blocks, shuffle.

The split is made on whole documents, before anything is tokenized: no document has text on both sides. A
domain whose documents are too few or too large for that gives the end of its largest document to validation,
cut at a line; `corpus.json` names it under `documents_cut`. Blocks never cross from one side to the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from patterning_dist.data.corpus import Document
from patterning_dist.data.sampler import permutation
from patterning_dist.data.sources import Spans, write_spans
from patterning_dist.data.tokenizer import (
    SEPARATOR,
    encode_texts,
    num_long_words,
    save_tokenizer,
    text_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from patterning_dist.data.tokens import write_token_table
from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import write_json

MIN_TRAIN_BLOCKS, MIN_VALIDATION_BLOCKS = 64, 32
# "split" and "block" in ASCII: apart from the epochs, which number their streams from 0.
_SPLIT_STREAM, _BLOCK_STREAM = 0x73706C6974, 0x626C6F636B


class Piece(NamedTuple):
    """Text of a document on one side; ``start``: characters of the document before it."""

    document: int
    domain: str
    text: str
    start: int = 0


def prepare_tokens(
    documents: Iterable[Document],
    folder: Path,
    *,
    context_length: int,
    vocabulary_size: int,
    validation_fraction: float,
    seed: int,
    max_train_sequences: int | None = None,
    tokenizer_path: str | None = None,
) -> dict[str, Any]:
    """Write tokenizer.json, {train,validation,sources}.parquet and corpus.json into `folder`; returns corpus.json.

    The tokenizer is trained on the training side, or read from `tokenizer_path`. Per domain and side, documents are
    joined with the separator and cut into blocks of `context_length` tokens (the rest is dropped and counted); blocks
    are shuffled by `seed`. `max_train_sequences` is shared evenly between domains; what a small domain leaves
    goes to the others.
    Raises PatterningError when there is too little text for 64 training and 32 validation blocks.
    """
    if not 0 < validation_fraction < 1:
        raise PatterningError(f"data.validation_fraction is {validation_fraction}; expected between 0 and 1, e.g. 0.1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces, origins = [], []
    for number, document in enumerate(documents):
        pieces.append(Piece(number, document.domain, document.text))
        origins.append((document.file, document.row))
    train, validation, documents_cut = split_documents(pieces, validation_fraction, seed)
    if tokenizer_path is None:
        tokenizer = train_tokenizer((piece.text for piece in train), vocabulary_size)
        separator = int(tokenizer.token_to_id(SEPARATOR) or 0)  # it is the first
    else:
        tokenizer, separator = text_tokenizer(tokenizer_path)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    corpus: dict[str, Any] = {
        "num_documents": len(pieces),
        "num_characters": sum(len(piece.text) for piece in pieces),
        "num_long_words": sum(num_long_words(piece.text) for piece in train) if tokenizer_path is None else 0,
        "documents_cut": documents_cut,
        "vocabulary_size": tokenizer.get_vocab_size(),
        "context_length": context_length,
        "seed": seed,
    }
    for split, side, minimum, cap in (
        ("train", train, MIN_TRAIN_BLOCKS, max_train_sequences),
        ("validation", validation, MIN_VALIDATION_BLOCKS, None),
    ):
        blocks, domains, spans, num_dropped = _blocks(side, tokenizer, separator, context_length)
        if len(blocks) < minimum:
            raise PatterningError(
                f"corpus: {len(blocks)} {split} blocks of {context_length} tokens in {len(side)} documents, "
                f"expected at least {minimum}; add text or lower data.context_length"
            )
        order = permutation(seed, _BLOCK_STREAM, len(blocks))
        if cap is not None:
            order = order[_balanced(domains[order], cap)]
        write_token_table(
            folder / f"{split}.parquet",
            blocks[order],
            domains[order].tolist(),
            spans.of_sequences(order).first_documents(),
            vocabulary_size=tokenizer.get_vocab_size(),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            split=split,
        )
        if split == "train":  # what weights are about
            write_spans(folder / "sources.parquet", spans.of_sequences(order), origins)
        corpus[split] = {
            "num_sequences": len(order),
            "num_tokens_dropped": num_dropped,
            "sequences_per_domain": dict(sorted(Counter(domains[order].tolist()).items())),
        }
    write_json(folder / "corpus.json", corpus)
    return corpus


def cut_text(
    documents: Iterable[Document], folder: Path, tokenizer: Tokenizer, separator: int, context_length: int
) -> None:
    """Write tokenizer.json, train.parquet and sources.parquet of text that is all of one side, in reading order.

    Args:
        documents: to cut as stage prepare does.
        folder: to write into.
        tokenizer: of the run that the text is for.
        separator: token between documents.
        context_length: of a sequence [tokens].

    Raises:
        PatterningError: there is not one whole sequence.
    """
    pieces, origins = [], []
    for number, document in enumerate(documents):
        pieces.append(Piece(number, document.domain, document.text))
        origins.append((document.file, document.row))
    blocks, domains, spans, _ = _blocks(pieces, tokenizer, separator, context_length)
    if not len(blocks):
        raise PatterningError(
            f"there is no whole sequence of {context_length} tokens in {len(pieces)} documents; add text"
        )
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    write_token_table(
        folder / "train.parquet",
        blocks,
        domains.tolist(),
        spans.first_documents(),
        vocabulary_size=tokenizer.get_vocab_size(),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        split="train",
    )
    write_spans(folder / "sources.parquet", spans, origins)


def split_documents(
    pieces: list[Piece], validation_fraction: float, seed: int
) -> tuple[list[Piece], list[Piece], list[int]]:
    """Training pieces, validation pieces, and the ids of documents cut in two (see the module).

    Per domain, documents in a random order go to validation as long as that brings its characters nearer
    to the fraction asked for.
    """
    train: list[Piece] = []
    validation: list[Piece] = []
    documents_cut: list[int] = []
    order = permutation(seed, _SPLIT_STREAM, len(pieces))
    by_domain: dict[str, list[Piece]] = {}
    for index in order:
        by_domain.setdefault(pieces[index][1], []).append(pieces[index])
    for domain, members in sorted(by_domain.items()):
        wanted = missing = validation_fraction * sum(len(piece.text) for piece in members)
        kept = []
        for piece in members:
            if len(piece.text) / 2 <= missing:
                validation.append(piece)
                missing -= len(piece.text)
            else:
                kept.append(piece)
        if missing > wanted / 2:
            largest = max(kept, key=lambda piece: len(piece.text))
            kept.remove(largest)
            text, end = largest.text, len(largest.text) - int(missing)
            at = text.rfind("\n", 0, end) + 1 or end
            kept.append(Piece(largest.document, domain, text[:at]))
            validation.append(Piece(largest.document, domain, text[at:], at))
            documents_cut.append(largest.document)
        train += kept
    # Reading order inside each domain: neighbours stay neighbours, whatever the seed.
    return sorted(train), sorted(validation), documents_cut


def _blocks(
    pieces: list[Piece], tokenizer: Tokenizer, separator: int, context_length: int
) -> tuple[np.ndarray, np.ndarray, Spans, int]:
    """Blocks [N, L], their domains [N], what they are cut from, and the number of tokens left over."""
    streams: dict[str, list[np.ndarray]] = {}
    spans: dict[str, list[Spans]] = {}
    lengths: Counter[str] = Counter()
    encoded = encode_texts(tokenizer, [piece.text for piece in pieces])
    for piece, (ids, starts, ends) in zip(pieces, encoded, strict=True):
        domain, end = piece.domain, len(piece.text)  # the separator stands for no character
        streams.setdefault(domain, []).append(np.append(ids, separator).astype(np.uint32))
        characters = piece.start + np.append(starts, end), piece.start + np.append(ends, end)
        found = Spans.of_piece(piece.document, *characters, lengths[domain], context_length)
        spans.setdefault(domain, []).append(found)
        lengths[domain] += len(ids) + 1
    blocks, num_dropped = [np.empty((0, context_length), np.uint32)], 0
    domains: list[str] = []
    numbered: list[Spans] = []
    for domain in sorted(streams):
        num_blocks = lengths[domain] // context_length
        blocks.append(
            np.concatenate(streams[domain])[: num_blocks * context_length].reshape(num_blocks, context_length)
        )
        numbered += [part.numbered(len(domains), num_blocks) for part in spans[domain]]
        domains += [domain] * num_blocks
        num_dropped += lengths[domain] - num_blocks * context_length
    return np.concatenate(blocks), np.array(domains, dtype=object), Spans.joined(numbered), num_dropped


def _balanced(domains: np.ndarray, cap: int) -> np.ndarray:
    """Indices of at most `cap` blocks, in order: equal numbers from each domain as far as it has them."""
    sizes = Counter(domains.tolist())
    quota: dict[str, int] = {}
    left = cap
    # Smallest first: what it cannot give is shared among those after it.
    for rank, (domain, size) in enumerate(sorted(sizes.items(), key=lambda item: (item[1], item[0]))):
        quota[domain] = min(size, left // (len(sizes) - rank))
        left -= quota[domain]
    taken: Counter[str] = Counter()
    chosen = []
    for index, domain in enumerate(domains):
        if taken[domain] < quota[domain]:
            taken[domain] += 1
            chosen.append(index)
    return np.array(chosen, dtype=np.int64)
