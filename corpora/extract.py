"""Plain text out of the formats that documentation packages come in.

Every extractor takes a file and yields (title, text) pairs, in an order fixed by the file alone.
"""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

Extracted = Iterator[tuple[str, str]]
Extractor = Callable[[Path], Extracted]


def read_text(path: Path) -> str:
    """Text of a file, gunzipped when its first bytes say so; bytes that are not UTF-8 become U+FFFD."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    return content.decode("utf-8", errors="replace")


def clean(text: str) -> str:
    """No trailing blanks, no runs of empty lines, no control characters."""
    text = re.sub(r"[^\S\n]+\n", "\n", text.replace("\r\n", "\n").expandtabs(8))
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def title_of(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removesuffix(".txt").removesuffix(".html").removesuffix(".pod").removesuffix(".md")


def plain(path: Path) -> Extracted:
    yield title_of(path), read_text(path)


def markdown_without_links(path: Path) -> Extracted:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", read_text(path))
    yield title_of(path), re.sub(r"<[^>\n]{1,80}>", "", text)


class _HtmlText(HTMLParser):
    """Text of the body: navigation and scripts left out, blanks collapsed outside <pre>."""

    SKIPPED_TAGS = frozenset({"head", "script", "style", "svg", "title"})
    SKIPPED_CLASSES = frozenset({"nosearch", "navheader", "navfooter", "toc", "headerlink"})
    BLOCKS = frozenset(["p", "div", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote"])
    LINES = frozenset(["li", "br", "tr", "dt", "dd"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.skipped_tag: str | None = None
        self.skipped_depth = 0
        self.verbatim_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped_tag is not None:
            self.skipped_depth += tag == self.skipped_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES:
            self.skipped_tag, self.skipped_depth = tag, 1
            return
        self.verbatim_depth += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.skipped_tag is not None:
            self.skipped_depth -= tag == self.skipped_tag
            if self.skipped_depth == 0:
                self.skipped_tag = None
            return
        self.verbatim_depth = max(0, self.verbatim_depth - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self.skipped_tag is None:
            self.pieces.append(data if self.verbatim_depth else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.pieces.append("\n\n")
        elif tag in self.LINES:
            self.pieces.append("\n")


def html(path: Path) -> Extracted:
    parser = _HtmlText()
    parser.feed(read_text(path))
    parser.close()
    text = "".join(parser.pieces)
    yield title_of(path), re.sub(r"\n (?=\S)", "\n", text)


_POD_SIMPLE = re.compile(r"([A-Z])<(?!<)([^<>]*)>")
_POD_DOUBLED = re.compile(r"([A-Z])<<+ (.*?) >>+", re.DOTALL)
_POD_ENTITIES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/", "amp": "&", "quot": '"'}


def _pod_code(match: re.Match[str]) -> str:
    code, body = match.groups()
    if code in "XZ":
        return ""
    if code == "E":
        return {"lt": "\x01", "gt": "\x02"}.get(body, _POD_ENTITIES.get(body, body))
    if code == "L" and "|" in body:
        body = body.split("|", 1)[0]
    # Protected until the enclosing code has been read.
    return body.replace("<", "\x01").replace(">", "\x02")


def pod(path: Path) -> Extracted:
    """Perl's plain old documentation: commands and formatting codes taken off."""
    text = read_text(path)
    text = re.sub(r"^=begin (\w+).*?^=end \1[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^=(for|encoding|over|back|cut|pod)\b[^\n]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^=(head\d|item) *", "", text, flags=re.MULTILINE)
    text = _POD_DOUBLED.sub(_pod_code, text)
    while True:
        text, num_replaced = _POD_SIMPLE.subn(_pod_code, text)
        if not num_replaced:
            break
    yield title_of(path), text.replace("\x01", "<").replace("\x02", ">")


def dictionary(path: Path) -> Extracted:
    """A dictd dictionary: a head word at the margin, its definition indented; 40 entries a document."""
    entries = re.split(r"\n(?=\S)", read_text(path))
    entries = [entry for entry in entries if not entry.startswith("00-database") and "\n" in entry]
    for start in range(0, len(entries), 40):
        chunk = entries[start : start + 40]
        yield f"entries {start:05d}", re.sub(r"[{}]", "", "\n".join(chunk))


def bible(path: Path) -> Extracted:
    """The text file of bible-kjv: LZW-compressed windows; one document a chapter."""
    content = path.read_bytes()
    num_windows = struct.unpack(">I", content[0x58:0x5C])[0]
    table = struct.unpack(f">{num_windows}I", content[0x5C : 0x5C + 4 * num_windows])
    windows = (content[a:b] for a, b in zip(table, (*table[1:], len(content)), strict=True))
    text = b"".join(map(_uncompress, windows)).decode("latin-1")
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"(\d?[A-Za-z]+) ?(\d+):(\d+) (.*)", line)
        if match:
            chapters.setdefault(f"{match[1]} {match[2]}", []).append(f"{match[3]} {match[4]}")
    for name, verses in chapters.items():
        yield name, name + "\n\n" + "\n".join(verses)


def _uncompress(window: bytes) -> bytes:
    """One LZW stream of `compress`, stored without its three magic bytes."""
    stream = b"\x1f\x9d\x90" + window
    return subprocess.run(["gzip", "-dc"], input=stream, capture_output=True, check=True).stdout


def austen(path: Path) -> Extracted:
    """The lazy-load database of the R package janeaustenr: vectors of lines; one document a chapter."""
    rest = path.read_bytes()
    while rest:
        # A record: the length once inflated, four bytes, then a zlib stream that knows its own end.
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(rest[4:]))
        rest = stream.unused_data
        book = next((line for line in lines if line.strip()), "untitled").strip().title()
        chapters = re.split(r"\n(?=chapter [ivxlc\d]+)", "\n".join(lines), flags=re.IGNORECASE)
        for number, chapter in enumerate(chapters):
            yield f"{book} {number:02d}", chapter


def _r_strings(serialized: bytes) -> list[str]:
    """A character vector in R's XDR serialization, version 3; any other object gives no lines."""
    if serialized[:2] != b"X\n" or struct.unpack(">I", serialized[2:6])[0] != 3:
        return []
    position = 18 + struct.unpack(">I", serialized[14:18])[0]
    kind, length = struct.unpack(">II", serialized[position : position + 8])
    if kind & 0xFF != 16:
        return []
    position, lines = position + 8, []
    for _ in range(length):
        (size,) = struct.unpack(">i", serialized[position + 4 : position + 8])
        position += 8
        lines.append(serialized[position : position + max(size, 0)].decode("utf-8", errors="replace"))
        position += max(size, 0)
    return lines
