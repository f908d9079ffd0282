"""Token tables: what is written is read back by id; the split leaks nothing; refusals say what is short."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tokenizer import save_tokenizer
from tokenizers import Tokenizer

from patterning_dist.data.corpus import Document
from patterning_dist.data.prepare import Piece, prepare_tokens, split_documents
from patterning_dist.data.sources import read_spans
from patterning_dist.data.tokenizer import tokenizer_sha256
from patterning_dist.data.tokens import TokenDataset, write_token_table
from patterning_dist.errors import PatterningError

HEADER = {"vocabulary_size": 50_000, "tokenizer_sha256": "abc", "split": "train"}


def corpus(num_documents: int = 60, domains: tuple[str, ...] = ("x", "y"), length: int = 40) -> list[Document]:
    words = np.random.default_rng(0).integers(0, 200, (num_documents, length))
    return [
        Document(domains[n % len(domains)], f"document-{n}\n" + "\n".join(f"w{w} doc{n}" for w in row), str(n))
        for n, row in enumerate(words)
    ]


def prepare(documents: list[Document], folder: Path, **changes: object) -> dict:
    options = {"context_length": 16, "vocabulary_size": 300, "validation_fraction": 0.4, "seed": 3} | changes
    return prepare_tokens(documents, folder, **options)


def test_table_round_trip_by_id(tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 50_000, (50, 8))
    path = tmp_path / "train.parquet"
    write_token_table(path, tokens, ["b", "a"] * 25, np.arange(50) // 7, **HEADER)
    dataset = TokenDataset(path)
    ids = np.array([49, 0, 7, 7])
    assert dataset.tokens(ids).dtype == np.int64
    np.testing.assert_array_equal(dataset.tokens(ids), tokens[ids])
    assert (len(dataset), dataset.context_length, dataset.vocabulary_size) == (50, 8, 50_000)
    assert dataset.domains[:3].tolist() == ["b", "a", "b"]
    np.testing.assert_array_equal(dataset.documents, np.arange(50) // 7)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.sha256 == dataset.sha256
    np.testing.assert_array_equal(copy.tokens(ids), tokens[ids])
    assert len(pickle.dumps(dataset)) < 1000
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]
    for bad in (-1, 50):
        with pytest.raises(PatterningError, match=rf"train\.parquet: no sequence {bad}; expected ids from 0 to 49"):
            dataset.tokens(np.array([0, bad]))


@pytest.mark.parametrize(("vocabulary_size", "bytes_a_token"), [(2**16, 2), (2**16 + 1, 4), (151_936, 4)])
def test_ids_of_large_vocabularies_take_four_bytes(tmp_path: Path, vocabulary_size: int, bytes_a_token: int) -> None:
    tokens = np.array([[0, 9, vocabulary_size - 1], [3, 4, 5]])
    header = HEADER | {"vocabulary_size": vocabulary_size}
    write_token_table(tmp_path / "t.parquet", tokens, ["a"] * 2, np.zeros(2), **header)
    assert pq.read_schema(tmp_path / "t.parquet").field("tokens").type == pa.binary(3 * bytes_a_token)
    assert TokenDataset(tmp_path / "t.parquet").tokens([0, 1]).tolist() == tokens.tolist()


def test_tables_that_cannot_be_stored_or_read_are_refused(tmp_path: Path) -> None:
    path, tokens = tmp_path / "t.parquet", np.full((2, 4), 9)
    with pytest.raises(PatterningError, match=r"t\.parquet: token ids 9 to 9; expected 0 to 8"):
        write_token_table(path, tokens, ["a"] * 2, np.zeros(2), **HEADER | {"vocabulary_size": 9})
    with pytest.raises(PatterningError, match=r"t\.parquet: no such file"):
        TokenDataset(path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(PatterningError, match=r"t\.parquet: not a readable Parquet file"):
        TokenDataset(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(PatterningError, match=r"t\.parquet: cannot be written"):
        write_token_table(path, tokens, ["a"] * 2, np.zeros(2), **HEADER)
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


def test_preparing_twice_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare(corpus(), tmp_path / name, seed=seed)
    files = ("train.parquet", "validation.parquet", "tokenizer.json", "corpus.json")
    contents = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in "abc"}
    assert contents["a"] == contents["b"]
    assert contents["a"][0] != contents["c"][0]
    tokenizer = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    dataset = TokenDataset(tmp_path / "a/train.parquet")
    assert dataset.metadata["tokenizer_sha256"] == tokenizer_sha256(tokenizer)
    assert json.loads(contents["a"][3])["train"]["num_sequences"] == len(dataset)


def test_no_document_has_text_on_both_sides(tmp_path: Path) -> None:
    report = prepare(corpus(), tmp_path)
    assert report["documents_cut"] == []
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    seen = []
    for split in ("train", "validation"):
        dataset = TokenDataset(tmp_path / f"{split}.parquet")
        tokens = dataset.tokens(np.arange(len(dataset)))
        text = " ".join(tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in tokens)
        seen.append({n for n in range(60) if f"doc{n}\n" in text})
        assert set(dataset.documents) <= seen[-1]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(60))


def test_every_stretch_of_a_sequence_knows_its_characters(tmp_path: Path) -> None:
    big = "".join(f"line {n} of many\n" for n in range(3000))
    # A domain with one document, whose end goes to validation: characters count from the document's beginning.
    documents = [*corpus(60, ("x", "y"), length=5), Document("z", "é" + big, "big.txt", 4)]
    prepare(documents, tmp_path, max_train_sequences=200)
    tokenizer, tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), TokenDataset(tmp_path / "train.parquet")
    blocks, spans = tokens.tokens(np.arange(len(tokens))), read_spans(tmp_path / "sources.parquet").to_pylist()
    assert {span["sequence_id"] for span in spans} == set(range(200))
    ends = [(span["sequence_id"], span["position"]) for span in spans[1:]] + [(200, 0)]
    several = 0
    for span, (sequence, end) in zip(spans, ends, strict=True):
        document = documents[span["document"]]
        assert (span["file"], span["row"]) == (document.file, document.row)
        assert span["position"] or span["document"] == tokens.documents[span["sequence_id"]]
        stop = end if sequence == span["sequence_id"] else 16
        several += stop < 16
        found = tokenizer.decode(blocks[span["sequence_id"], span["position"] : stop].tolist())
        assert found == document.text[span["start"] : span["end"]]
    assert several > 20
    assert any(span["file"] == "big.txt" and span["start"] > len(big) / 3 for span in spans)


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_split_comes_near_the_fraction_in_every_domain(fraction: float) -> None:
    pieces = [Piece(n, document.domain, document.text) for n, document in enumerate(corpus(200))]
    train, validation, cut = split_documents(pieces, fraction, seed=0)
    for domain in ("x", "y"):
        sizes = [sum(len(piece.text) for piece in side if piece.domain == domain) for side in (train, validation)]
        assert sizes[1] / sum(sizes) == pytest.approx(fraction, abs=0.01)
    assert not cut
    assert sorted(train + validation) == pieces


def test_a_single_document_is_cut_once_at_a_line() -> None:
    text = "".join(f"line {n}\n" for n in range(1000))
    train, validation, cut = split_documents([Piece(0, "x", text)], 0.25, seed=0)
    assert cut == [0]
    assert train[0][2] + validation[0][2] == text
    assert train[0][2].endswith("\n")
    assert len(validation[0][2]) / len(text) == pytest.approx(0.25, abs=0.01)
    assert validation[0].start == len(train[0].text)


def test_the_cap_is_shared_evenly_and_small_domains_leave_their_share(tmp_path: Path) -> None:
    documents = corpus(90, ("x", "y", "z"))
    small = [document for n, document in enumerate(documents) if document.domain != "z" or n < 9]
    whole = prepare(small, tmp_path / "whole")["train"]["sequences_per_domain"]
    cap = 2 * whole["z"] + 101
    capped = prepare(small, tmp_path / "capped", max_train_sequences=cap)["train"]["sequences_per_domain"]
    assert capped["z"] == min(whole["z"], cap // 3)
    assert sum(capped.values()) == cap
    assert abs(capped["x"] - capped["y"]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"context_length": 400},
            r"corpus: \d+ train blocks of 400 tokens in \d+ documents, expected at least 64; add text",
        ),
        (
            {"validation_fraction": 0.005},
            r"corpus: \d+ validation blocks of 16 tokens in \d+ documents, expected at least 32",
        ),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction is 1\.0; expected between 0 and 1"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(PatterningError, match=message):
        prepare(corpus(), tmp_path, **changes)


def test_text_can_be_cut_with_the_tokenizer_of_a_model(tmp_path: Path) -> None:
    theirs = save_tokenizer(tmp_path / "model")
    documents = [Document("x", f"what is it </s> {n} no\n" * 9, str(n)) for n in range(60)]
    report = prepare(documents, tmp_path / "data", tokenizer_path=str(tmp_path / "model"))
    data = TokenDataset(tmp_path / "data/train.parquet")
    assert report["vocabulary_size"] == data.vocabulary_size == len(theirs)
    # A document ends with their end of text, and nothing within spells it.
    text = theirs.decode(data.tokens(np.arange(len(data))).ravel())
    ends = int((data.tokens(np.arange(len(data))) == theirs.eos_token_id).sum())
    assert 0 < ends < len(documents)
    assert text.count(" </s> ") > 5 * ends  # some of them are cut by the ends of blocks
    save_tokenizer(tmp_path / "endless", eos_token=None, bos_token=None)
    with pytest.raises(PatterningError, match=r"endless: its tokenizer lacks an eos_token or bos_token; name another"):
        prepare(documents, tmp_path / "data", tokenizer_path=str(tmp_path / "endless"))


def test_many_domains_take_time_in_proportion(tmp_path: Path) -> None:
    """20,000 domains took minutes; counted is what is compared, not the clock."""

    class Counted(str):
        comparisons = 0
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            Counted.comparisons += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    pieces = [Piece(n, Counted(f"d{n}"), "some text") for n in range(2000)]
    train, validation, _ = split_documents(pieces, 0.1, 0)
    assert len(train) + len(validation) == 4000  # each domain has a document, which is cut in two
    assert Counted.comparisons < 20 * len(pieces)
