"""Files of others: whatever holds the rows, they are the same rows; what is damaged is one line with file and row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterning_dist.data.corpus import Source, read_documents
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError

ROWS = [[5, 6, 7, 8], [1, 2, 3, 4], [9, 8, 7, 6], [2, 2, 2, 2], [3, 1, 4, 1]]
STREAM = [token for row in ROWS for token in row] + [5, 9]  # of the last two there is no block


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patterning_dist.data.row_files.ROWS_AT_ONCE", 2)


def lines(path: Path, rows: list) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")


def arrow(path: Path, make: Callable) -> None:
    table = pa.table({"input_ids": ROWS})
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


def headed(path: Path, magic: int, kind: str, num: int | None = None) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(STREAM) if num is None else num
    path.write_bytes(header.tobytes() + np.array(STREAM, kind).tobytes())


def compressed(path: Path, codec: str) -> None:
    with pa.output_stream(str(path), compression=codec) as sink:
        sink.write(b"".join(json.dumps({"input_ids": row}).encode() + b"\n" for row in ROWS))


WRITERS: dict[str, Callable[[Path], object]] = {
    "t.jsonl": lambda path: lines(path, [{"input_ids": row} for row in ROWS]),
    "t.json": lambda path: path.write_text(json.dumps([{"input_ids": row} for row in ROWS], indent=1)),
    "marked.jsonl": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + b"".join(json.dumps({"input_ids": row}).encode() + b"\n" for row in ROWS)
    ),
    "t.jsonl.gz": lambda path: compressed(path, "gzip"),
    "t.jsonl.zst": lambda path: compressed(path, "zstd"),
    "file.arrow": lambda path: arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: arrow(path, pa.ipc.new_stream),
    "t.feather": lambda path: arrow(path, pa.ipc.new_file),
    "rows.npy": lambda path: np.save(path, np.array(ROWS, np.int64)),
    "stream.npy": lambda path: np.save(path, np.array(STREAM, ">i4")),
    "nanogpt.bin": lambda path: np.array(STREAM, "<u2").tofile(path),
    "gpt2.bin": lambda path: headed(path, 20240520, "<u2"),
    "llama3.bin": lambda path: headed(path, 20240801, "<u4"),
}


def all_of(path: Path, length: int = 4) -> list:
    data = TokenDataset(path, length)
    assert data.counted(np.arange(len(data))) is None
    return data.tokens(np.arange(len(data))).tolist()


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_blocks(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert all_of(tmp_path / name) == ROWS
    folder = tmp_path / "folder" / "deeper"
    folder.mkdir(parents=True)
    if name != "t.json":  # in folders these are descriptions
        for copy in ("a", "b"):
            (folder / (copy + name[name.index(".") :])).write_bytes((tmp_path / name).read_bytes())
        assert all_of(tmp_path / "folder") == ROWS + ROWS


def test_what_is_over_of_a_corpus_end_to_end_is_counted(tmp_path: Path) -> None:
    WRITERS["nanogpt.bin"](tmp_path / "t.bin")
    (remark,) = TokenDataset(tmp_path / "t.bin", 4).remarks
    assert "t.bin: 2 tokens are left out" in remark


def test_a_corpus_end_to_end_is_cut_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(1003, dtype="<u2")
    tokens.tofile(tmp_path / "t.bin")
    at_once = TokenDataset(tmp_path / "t.bin", 7)
    monkeypatch.setattr("patterning_dist.data.tokens._PIECE", 100)
    piecewise = TokenDataset(tmp_path / "t.bin", 7)
    assert piecewise.tokens(np.arange(143)).ravel().tolist() == list(range(1001))
    assert piecewise.tokens(np.arange(143)).tolist() == at_once.tokens(np.arange(143)).tolist()
    assert piecewise.num_dropped_tokens == at_once.num_dropped_tokens == 2
    assert len(np.unique(piecewise.documents)) > 3  # so that held-out parts can be apart


LISTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
WORDS = ["law", "code", "law"]


@pytest.mark.parametrize(
    ("ids", "domains"),
    [
        (pa.array(LISTS, pa.list_view(pa.int32())), pa.array(WORDS, pa.string_view())),
        (pa.array(LISTS, pa.large_list_view(pa.uint16())), pa.array(WORDS).dictionary_encode()),
        (pa.array(LISTS, pa.list_(pa.int64(), 3)), pa.compute.run_end_encode(pa.array(WORDS))),
    ],
    ids=["views", "large views and a dictionary", "fixed size and runs"],
)
def test_views_and_dictionaries_are_lists_and_strings(tmp_path: Path, ids: pa.Array, domains: pa.Array) -> None:
    table = pa.table({"input_ids": ids, "domain": domains})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = TokenDataset(tmp_path / "t.arrow", 3)
    assert data.tokens([0, 1, 2]).tolist() == LISTS
    assert data.domains.tolist() == WORDS


@pytest.mark.parametrize("kind", [pa.list_view(pa.int32()), pa.list_(pa.int32(), 3)], ids=str)
def test_a_null_among_views_is_named(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"input_ids": pa.array([LISTS[0], LISTS[1], None], kind)}), tmp_path / "t.parquet")
    with pytest.raises(PatterningError, match=r"t\.parquet row 2: input_ids is null"):
        TokenDataset(tmp_path / "t.parquet", 3)


def test_columns_without_effect_are_said(tmp_path: Path) -> None:
    lines(tmp_path / "t.jsonl", [{"input_ids": [1, 2], "id": 7, "url": None, "labels": 1, "domain": "a"}])
    (remark,) = TokenDataset(tmp_path / "t.jsonl", 2).remarks
    assert remark == f"{tmp_path / 't.jsonl'}: columns that have no effect: id, url, labels"


SURROGATE = '{"text": "a\\ud83d b", "input_ids": [1, 2]}'
LINES = {
    "deep": ('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", ":2: JSON nested too deep to be read"),
    "digits": ('{"text": "a", "n": ' + "9" * 5000 + "}", ":1: a number of too many digits to be read; mend that row"),
    "surrogate": (SURROGATE, r":1: text with half of a surrogate pair \(\\ud83d\), which is no character; mend"),
}


@pytest.mark.parametrize("kind", LINES)
def test_json_that_cannot_be_read_is_one_line_for_text_and_for_tables(tmp_path: Path, kind: str) -> None:
    content, message = LINES[kind]
    (tmp_path / "t.jsonl").write_text(content)
    for read in (lambda: list(read_documents([Source(tmp_path / "t.jsonl")])), lambda: all_of(tmp_path / "t.jsonl")):
        with pytest.raises(PatterningError, match=rf"^{tmp_path}/t\.jsonl{message}") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud83d\\ude00 \\u00e9"}')
    assert [document.text for document in read_documents([Source(tmp_path / "t.jsonl")])] == ["😀 é"]


def test_compressed_lines_are_text_too_and_a_torn_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "law-00000-of-00002.jsonl.gz"
    with pa.output_stream(str(path), compression="gzip") as sink:
        sink.write(b'{"text": "hello", "input_ids": [1, 2]}\n' * 2000)
    assert [(d.text, d.domain) for d in read_documents([Source(path)])][1] == ("hello", "law-00000-of-00002")
    assert TokenDataset(path, 2).domains[0] == "law"
    path.write_bytes(path.read_bytes()[:-20])
    for read in (lambda: list(read_documents([Source(path)])), lambda: all_of(path, 2)):
        with pytest.raises(PatterningError, match=r"law.*: cannot be read to its end \(Truncated .*\); copy it again"):
            read()


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = "hello" if name == "t.txt" else '{"text": "hello"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [document.text for document in read_documents([Source(tmp_path / name)])] == ["hello"]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + b"a\xff")
    with pytest.raises(PatterningError, match="byte 4 is not UTF-8"):
        list(read_documents([Source(tmp_path / name)]))


def not_utf8(num: int) -> pa.Array:
    """The last of ``num`` strings is not UTF-8."""
    offsets = np.array([*range(num), num + 1], np.int32)
    return pa.Array.from_buffers(
        pa.string(), num, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"a" * (num - 1) + b"\xff\xfe")]
    )


def test_parquet_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"input_ids": ROWS, "domain": not_utf8(5), "text": not_utf8(5)}), path)
    message = r"t\.parquet row 4: column '{}' is damaged \(text that is not UTF-8\); mend it or write it again"
    with pytest.raises(PatterningError, match=message.format("domain")):
        TokenDataset(path, 4)
    pq.write_table(pa.table({"text": not_utf8(5)}), path)
    with pytest.raises(PatterningError, match=message.format("text")):
        list(read_documents([Source(path)]))
    twice = pa.table([pa.array(ROWS), pa.array(ROWS)], names=["input_ids", "input_ids"])
    pq.write_table(twice, path)
    with pytest.raises(PatterningError, match=r"t\.parquet: column 'input_ids' is there 2 times; leave one of them"):
        TokenDataset(path, 4)


def test_no_flipped_bit_of_a_parquet_file_is_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = np.random.default_rng(0).integers(0, 500, (60, 8)).tolist()
    pq.write_table(pa.table({"input_ids": rows, "text": ["some words"] * 60}), path, write_page_checksum=True)
    whole, expected = path.read_bytes(), TokenDataset(path, 8).sha256
    named = 0
    for place in range(4, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        for read in (lambda: TokenDataset(path, 8), lambda: list(read_documents([Source(path)]))):
            try:
                found = read()
            except PatterningError as error:
                named += 1
                assert str(path) in str(error)
                assert "\n" not in str(error)
            else:  # a name or a statistic: what was read is what was written
                assert not isinstance(found, TokenDataset) or found.sha256 == expected
    assert named > 20


def test_file_names_are_utf8(tmp_path: Path) -> None:
    for name in (b"\xff.txt", b"\xff.jsonl"):
        file = os.fsencode(tmp_path) + b"/" + name
        with open(file, "w") as opened:
            opened.write('{"input_ids": [1, 2]}')
    with pytest.raises(PatterningError, match=r"\\xff.*': a file name that is not UTF-8; rename it"):
        list(read_documents([Source(tmp_path)]))
    with pytest.raises(PatterningError, match=r"\\xff.*': a file name that is not UTF-8; rename it"):
        TokenDataset(tmp_path, 2)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("t.bin", lambda p: p.write_bytes(b"abc"), "3 bytes of tokens; expected a multiple of 2"),
        ("t.bin", lambda p: p.write_bytes(b""), "0 bytes of tokens; expected a multiple of 2"),
        ("t.bin", lambda p: np.array(STREAM, "<u4").tofile(p), "every second 16-bit number is 0, as in a file of 32"),
        ("t.bin", lambda p: headed(p, 20240520, "<u2", 100), "its header says 100 tokens, and there are 22; copy it"),
        ("t.npy", lambda p: p.write_bytes(b"x"), "not a readable array .*; write it with numpy.save"),
        ("t.npy", lambda p: np.save(p, np.ones((2, 3))), r"holds float64 \[2, 3\]; expected token ids, end to end"),
        ("t.npy", lambda p: np.save(p, np.array([{}])), "not a readable array .*"),
        ("t.arrow", lambda p: p.write_bytes(b"ARROW1"), "not a readable Arrow file"),
        ("t.jsonl", lambda p: lines(p, [{"input_ids": [1]}, {"input_ids": "a"}]), "'input_ids' of the rows from 0 on"),
        ("t.jsonl", lambda p: lines(p, [{"input_ids": [1, 2]}] * 2 + [{"x": 1}]), "no column 'input_ids'; .* are x"),
        (
            "t.jsonl",
            lambda p: lines(p, [{"input_ids": [1, 2]}] * 2 + [{"input_ids": [1, 2], "labels": [1, 2]}]),
            "'labels' is in some rows and not in others; give it in all, or in none",
        ),
        ("t.json", lambda p: p.write_text("[1]"), "row 0: not a JSON object"),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path: Path, name: str, write: Callable, message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(PatterningError, match=rf"{name}:? {message}"):
        TokenDataset(tmp_path / name, 2)


def test_a_corpus_end_to_end_has_no_other_columns(tmp_path: Path) -> None:
    WRITERS["nanogpt.bin"](tmp_path / "t.bin")
    with pytest.raises(PatterningError, match=r"t\.bin: no column 'ids'; the columns there are input_ids"):
        TokenDataset(tmp_path / "t.bin", 4, "ids")


def test_a_folder_holds_files_of_one_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": ROWS}), tmp_path / "a.parquet")
    WRITERS["t.jsonl"](tmp_path / "a.jsonl")
    (tmp_path / ".hidden").mkdir()
    WRITERS["rows.npy"](tmp_path / ".hidden" / "a.npy")
    with pytest.raises(PatterningError, match=r"holds files of several kinds, \.jsonl, \.parquet; give one kind a fol"):
        TokenDataset(tmp_path, 4)
