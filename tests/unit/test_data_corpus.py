"""Reading the user's own files: what is read, in which order, and what each refusal says."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterning_dist.data.corpus import Document, Source, domains_of, read_documents
from patterning_dist.errors import PatterningError


def read(*sources: Source, **options: int) -> list[Document]:
    return list(read_documents(sources, **options))


def test_folder_is_read_in_sorted_order_with_domains_from_subfolders(tmp_path: Path) -> None:
    for name, text in {
        "b/two.txt": "2",
        "b/one.md": "1",
        "a.rst": "0",
        ".git/x.txt": "no",
        "b/x.png": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    documents = read(Source(tmp_path))
    assert domains_of([Source(tmp_path)]) == {document.domain for document in documents}
    assert domains_of([Source(tmp_path, "c"), Source(tmp_path / "a.rst")]) == {"a", "c"}
    (tmp_path / "b/three.jsonl").touch()
    assert domains_of([Source(tmp_path)]) is None, "rows may say others"
    assert domains_of([Source(tmp_path, "c")]) == {"c"}
    (tmp_path / "b/three.jsonl").unlink()
    assert [(document.domain, document.text) for document in documents] == [
        ("a", "0"),
        ("b", "1"),
        ("b", "2"),
    ]
    assert (documents[1].file, documents[1].row) == (str(tmp_path / "b/one.md"), None)
    assert {document.domain for document in read(Source(tmp_path, domain="mine"))} == {"mine"}


def test_json_lines_use_the_named_key_and_the_row_domain(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"body": "héllo"}) + "\n\n" + json.dumps({"body": "b", "domain": "other"}) + "\n")
    documents = read(Source(path, text_column="body"))
    assert documents == [Document("notes", "héllo", str(path), 1), Document("other", "b", str(path), 3)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_uses_its_domain_column_unless_a_domain_is_given(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "table.parquet"
    texts = pa.array(["one", None, "three"], kind)
    pq.write_table(pa.table({"text": texts, "domain": ["x", "x", None]}), path)
    assert read(Source(path)) == [
        Document("x", "one", str(path), 0),
        Document("table", "three", str(path), 2),
    ]
    assert {document.domain for document in read(Source(path, domain="mine"))} == {"mine"}


def test_characters_are_capped_domain_by_domain(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("abcdef")
    documents = read(Source(tmp_path), max_characters_per_domain=8)
    assert [(document.domain, document.text) for document in documents] == [
        ("a", "abcdef"),
        ("a", "ab"),
        ("b", "abcdef"),
    ]


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "language": ["en"]}), path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff\xfe", r"a\.txt: byte 3 is not UTF-8; convert the file"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2: not JSON .*; expected one object a line"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', r"a\.jsonl: byte 25 is not UTF-8"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"a\.jsonl:1: no text under key 'text'; the keys there are body, id",
        ),
        ("a.pdf", b"%PDF", r"a\.pdf: unknown kind of file; expected one of \.jsonl, \.md, \.parquet"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.txt", b" \n", r"corpus .*a\.txt: no text in it; expected at least one document"),
    ],
)
def test_unreadable_content_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PatterningError, match=message):
        read(Source(tmp_path / name))


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match=r"nowhere: no such file or folder; check the path"):
        read(Source(tmp_path / "nowhere"))
    with pytest.raises(PatterningError, match=r"no readable files in this folder; expected one of"):
        read(Source(tmp_path))
    with pytest.raises(PatterningError, match=r"\(no sources\): no text in it"):
        read()
    write_parquet(tmp_path / "t.parquet")
    with pytest.raises(PatterningError, match=r"t\.parquet: no column 'text'; the columns there are body, language"):
        read(Source(tmp_path / "t.parquet"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(PatterningError, match=r"n\.parquet: column 'text' holds int64; expected strings"):
        read(Source(tmp_path / "n.parquet"))
