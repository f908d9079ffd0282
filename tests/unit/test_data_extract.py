"""Extractors of the shipped corpus, and the corpus itself: readable text, small, under stated licences."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

CORPORA = Path(__file__).resolve().parents[2] / "corpora"


@pytest.fixture(autouse=True)
def _corpora_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CORPORA))


def test_html_keeps_text_and_verbatim_blocks_only(tmp_path: Path) -> None:
    from extract import html

    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>T</title></head><body><div class='navheader x'>Prev<div>Up</div></div>"
        "<h1>Locks &amp; keys</h1><p>One\n  <b>two</b></p><script>var x;</script>"
        "<pre>  a\n   b</pre></body></html>"
    )
    ((title, text),) = html(page)
    assert title == "page"
    assert [part for part in text.split("\n\n") if part] == ["Locks & keys", "One two", "  a\n   b"]


def test_pod_codes_are_taken_off(tmp_path: Path) -> None:
    from extract import pod

    page = tmp_path / "perlx.pod"
    page.write_text(
        "=head1 NAME\nX<index>\n\nUse C<$x-E<gt>{B<y>}> or C<< $a <=> $b >>, see L<the docs|perlop>.\n\n"
        "=begin html\n\n<p>no</p>\n\n=end html\n\n=over 4\n\n=item One\n\n=back\n"
    )
    ((_, text),) = pod(page)
    assert text.split() == ["NAME", "Use", "$x->{y}", "or", "$a", "<=>", "$b,", "see", "the", "docs.", "One"]


def test_manual_pages_read_as_paragraphs(tmp_path: Path) -> None:
    from extract import clean
    from roff import manual

    page = tmp_path / "open_thing.9.gz"
    page.write_bytes(
        gzip.compress(
            b'.\\" Copyright\n.Dd May 1, 2020\n.Sh NAME\n.Nm open_thing\n.Nd open a thing\n'
            b'.Sh SYNOPSIS\n.In sys/thing.h\n.Ft int\n.Fo open_thing\n.Fa "int flags" "char *name"\n.Fc\n'
            b".Sh DESCRIPTION\nThe\n.Fn open_thing flags name\nfunction opens, see\n.Xr close 2 .\n"
            b".Bd -literal\nint x;\n  y();\n.Ed\n.Op Fl a Ar file\n"
        )
    )
    ((title, text),) = manual(page)
    assert title == "open_thing.9"
    assert clean(text) == (
        "NAME\nopen_thing - open a thing\n\nSYNOPSIS\n#include <sys/thing.h>\n"
        "int open_thing(int flags, char *name)\n\nDESCRIPTION\n"
        "The open_thing(flags, name) function opens, see close(2).\nint x;\n  y();\n\n[-a file]\n"
    )


def test_a_package_that_cannot_be_had_is_named_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, str(CORPORA / "from_debian.py"), "--set", "quickstart", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: package r-cran-janeaustenr: `apt-get` is not on this system")
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_the_shipped_corpus_is_small_and_says_where_it_comes_from() -> None:
    files = sorted((CORPORA / "quickstart").glob("*.parquet"))
    assert len(files) >= 8
    assert sum(file.stat().st_size for file in files) < 5e6
    readme, notices = ((CORPORA / name).read_text() for name in ("README.md", "LICENSES.md"))
    for file in files:
        table = pq.read_table(file)
        assert table.column_names == ["domain", "title", "text"]
        assert set(table["domain"].to_pylist()) == {file.stem}
        texts = table["text"].to_pylist()
        assert 1e6 < sum(map(len, texts)) <= 1.6e6
        assert len(set(texts)) == len(texts)
        assert table.schema.metadata[b"licence"]
        assert f"`{file.stem}`" in readme
        assert f"`{file.stem}`" in notices
