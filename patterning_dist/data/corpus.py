"""Documents from the user's own files: plain text, JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from patterning_dist.data.json_lines import decode, json_rows, kind_of, stem_of
from patterning_dist.data.row_files import check_name, parquet_rows
from patterning_dist.errors import PatterningError

PLAIN_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py"})
SUFFIXES = PLAIN_SUFFIXES | {".jsonl", ".parquet"}


@dataclass(frozen=True)
class Source:
    """A file, or a folder searched to any depth; `text_column` is the column or key that holds the text.

    `domain` names all its documents. Without it: the row's own `domain` column or key, else, inside a folder,
    the first sub-folder, else the file's stem.
    """

    path: Path
    domain: str | None = None
    text_column: str = "text"


@dataclass(frozen=True)
class Document:
    """One text; its file, and its row there: of JSON lines from 1, else from 0, none where it is the whole file."""

    domain: str
    text: str
    file: str
    row: int | None = None


def read_documents(sources: Iterable[Source], max_characters_per_domain: int | None = None) -> Iterator[Document]:
    """Every document that is not blank, in the order of the sources; inside a folder, by sorted path.

    `max_characters_per_domain` keeps the first so many characters of each domain (the last document is cut).
    Raises PatterningError for a missing path, a folder without readable files, a missing column or key, a
    JSON line that does not parse, bytes that are not UTF-8, and a corpus without any text.
    """
    num_characters: dict[str, int] = {}
    paths = []
    for source in sources:
        paths.append(str(source.path))
        for document in _read_source(source):
            text, taken = document.text, num_characters.get(document.domain, 0)
            if max_characters_per_domain is not None:
                text = text[: max(0, max_characters_per_domain - taken)]
            if text.strip():
                num_characters[document.domain] = taken + len(text)
                yield replace(document, text=text)
    if not num_characters:
        raise PatterningError(
            f"corpus {', '.join(paths) or '(no sources)'}: no text in it; expected at least one document"
        )


def domains_of(sources: Iterable[Source]) -> set[str] | None:
    """Domains of the documents; None where rows say theirs, which are known once all is read."""
    found: set[str] = set()
    for source in sources:
        files = [source.path] if source.path.is_file() else corpus_files(source.path)
        if source.domain is None and any(kind_of(file) not in PLAIN_SUFFIXES for file in files):
            return None
        found |= {source.domain or _default_domain(file, source.path) for file in files}
    return found


def _default_domain(file: Path, path: Path) -> str:
    inside = file.relative_to(path)
    return inside.parts[0] if len(inside.parts) > 1 else stem_of(file)


def _read_source(source: Source) -> Iterator[Document]:
    path = Path(source.path)
    if not path.exists():
        raise PatterningError(f"corpus {path}: no such file or folder; check the path in data.sources")
    expected = ", ".join(sorted(SUFFIXES))
    if path.is_file():
        if kind_of(path) not in SUFFIXES:
            raise PatterningError(f"corpus {path}: unknown kind of file; expected one of {expected}")
        yield from _read_file(path, source, stem_of(path))
        return
    files = corpus_files(path)
    if not files:
        raise PatterningError(f"corpus {path}: no readable files in this folder; expected one of {expected}")
    for file in files:
        yield from _read_file(file, source, _default_domain(file, path))


def corpus_files(folder: Path) -> list[Path]:
    """Files of text in a folder, at any depth, by name; hidden ones are none."""
    files = (file for file in sorted(folder.rglob("*")) if kind_of(file) in SUFFIXES and file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _read_file(path: Path, source: Source, default_domain: str) -> Iterator[Document]:
    check_name(path)
    if kind_of(path) == ".parquet":
        yield from _read_parquet(path, source, default_domain)
    elif kind_of(path) == ".jsonl":
        yield from _read_json(path, source, default_domain)
    else:
        yield Document(source.domain or default_domain, decode(path.read_bytes(), path), str(path))


def _read_json(path: Path, source: Source, default_domain: str) -> Iterator[Document]:
    for number, row in json_rows(path):
        if not isinstance(row.get(source.text_column), str):
            keys = ", ".join(row)
            raise PatterningError(
                f"{path}:{number}: no text under key {source.text_column!r}; the keys there are {keys}"
            )
        domain = source.domain or str(row.get("domain") or default_domain)
        yield Document(domain, row[source.text_column], str(path), number)


def _read_parquet(path: Path, source: Source, default_domain: str) -> Iterator[Document]:
    def choose(_: object, names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys([source.text_column, *(["domain"] if "domain" in names else [])]))

    for first, columns in parquet_rows(path, choose):
        texts = columns[source.text_column]
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise PatterningError(f"{path}: column {source.text_column!r} holds {texts.type}; expected strings")
        domains = columns["domain"].to_pylist() if "domain" in columns else [None] * len(texts)
        for row, (text, domain) in enumerate(zip(texts.to_pylist(), domains, strict=True), first):
            yield Document(source.domain or str(domain or default_domain), text or "", str(path), row)
