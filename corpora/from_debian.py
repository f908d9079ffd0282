"""Rebuild the text corpora from Debian packages: `python corpora/from_debian.py --set quickstart|large OUT`.

Writes one Parquet file a domain (columns domain, title, text). Packages are fetched with `apt-get download`
into a temporary folder and unpacked there with `dpkg -x`: nothing is installed and no privilege is needed.
The table below names packages of Debian 12 (bookworm). The same packages give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from extract import Extractor, austen, bible, clean, dictionary, html, markdown_without_links, plain, pod
from roff import manual

SHORTEST, LONGEST = 600, 60_000  # characters of a document: shorter ones are left out, longer ones cut
SECONDS_A_PACKAGE = 300


@dataclass(frozen=True)
class Source:
    """Where a domain comes from: files of `packages` that match `pattern`, no `excluded` part in the path."""

    domain: str
    packages: tuple[str, ...]
    pattern: str
    extract: Extractor
    licence: str
    excluded: tuple[str, ...] = ()


QUICKSTART = (
    Source("austen", ("r-cran-janeaustenr",), "**/data/Rdata.rdb", austen, "public domain"),
    Source("bible", ("bible-kjv-text",), "**/bible.data", bible, "public domain"),
    Source("bsd_manuals", ("freebsd-manpages",), "usr/share/man/man*/*.gz", manual, "BSD"),
    Source("jargon_file", ("dict-jargon",), "**/*.dict.dz", dictionary, "public domain"),
    Source(
        "perl_documentation",
        ("perl-doc",),
        "**/pod/*.pod",
        pod,
        "Artistic-1.0-Perl or GPL-1+",
        ("delta.pod",),
    ),
    Source(
        "postgresql_documentation",
        ("postgresql-doc-15",),
        "**/html/*.html",
        html,
        "PostgreSQL",
        ("/release", "/biblio", "/bookindex", "/legalnotice", "/acronyms", "/contrib-prog"),
    ),
    Source(
        "python_documentation",
        ("python3.11-doc",),
        "**/_sources/**/*.txt",
        plain,
        "PSF-2.0",
        ("/changelog", "/license", "/contents"),
    ),
    Source(
        "python_library",
        ("libpython3.11-stdlib", "libpython3.11-minimal"),
        "usr/lib/python3.11/**/*.py",
        plain,
        "PSF-2.0",
        ("/lib2to3/", "/encodings/", "/pydoc_data/", "_sysconfigdata", "/test/"),
    ),
    Source(
        "sqlite_documentation",
        ("sqlite3-doc",),
        "usr/share/doc/sqlite3/**/*.html",
        html,
        "public domain",
        ("/session/", "/releaselog/", "/syntax/", "/keyword_index", "/search", "/toc", "/copyright"),
    ),
)
LARGE = (
    *QUICKSTART,
    Source("anarchist_faq", ("anarchism",), "**/markdown/*.gz", markdown_without_links, "GPL-2"),
    Source(
        "computing_dictionary",
        ("dict-foldoc",),
        "**/*.dict.dz",
        dictionary,
        "GFDL-1.1+, no invariant sections",
    ),
    Source(
        "debian_documents",
        ("debian-policy", "debian-reference-en", "doc-debian"),
        "**/*.txt*",
        plain,
        "GPL-2+",
    ),
    Source("git_documentation", ("git-doc",), "**/*.txt*", plain, "GPL-2", ("/RelNotes",)),
    Source("linux_manuals", ("manpages", "manpages-dev"), "usr/share/man/man*/*.gz", manual, "GPL-2+ and BSD"),
    Source("vim_documentation", ("vim-runtime",), "**/doc/*.txt*", plain, "OPL-1.0+, no options"),
)
SETS = {"quickstart": (QUICKSTART, 1_450_000), "large": (LARGE, 3_000_000)}


class CorpusError(Exception):
    """A package or its text cannot be had; the message says which one and what to do."""


def run(command: list[str], folder: Path, purpose: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_A_PACKAGE)
    except FileNotFoundError:
        raise CorpusError(f"{purpose}: `{command[0]}` is not on this system; run this on Debian 12") from None
    except subprocess.TimeoutExpired:
        raise CorpusError(f"{purpose}: no answer in {SECONDS_A_PACKAGE} s; check the network") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        advice = "expected Debian 12 package sources and a recent `apt-get update`"
        raise CorpusError(f"{purpose}: {reason}; {advice}")
    return done.stdout


def fetch(package: str, folder: Path) -> tuple[Path, str]:
    """Download and unpack one package; returns the unpacked tree and the package's version."""
    tree = folder / package
    tree.mkdir()
    run(["apt-get", "download", package], tree, f"package {package}")
    archive = next(tree.glob("*.deb"))
    version = run(["dpkg-deb", "-f", archive.name, "Version"], tree, f"package {package}").strip()
    run(["dpkg", "-x", archive.name, "tree"], tree, f"package {package}")
    return tree / "tree", version


def documents(source: Source, trees: list[Path]) -> list[tuple[str, str]]:
    """Every usable document of a domain as (title, text), sorted by title; repeated files are kept once."""
    seen: set[bytes] = set()  # manual pages of several functions come once under every name
    found: dict[str, tuple[str, str]] = {}
    for tree in trees:
        for path in sorted(tree.glob(source.pattern)):
            inside = "/" + path.relative_to(tree).as_posix()
            if path.is_symlink() or not path.is_file() or any(part in inside for part in source.excluded):
                continue
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            for title, text in source.extract(path):
                text = clean(text)
                if len(text) > LONGEST:
                    text = text[: text.rfind("\n", 0, LONGEST) + 1]
                if len(text) >= SHORTEST:
                    found.setdefault(hashlib.sha256(text.encode()).hexdigest(), (title, text))
    return sorted(found.values())


def select(pairs: list[tuple[str, str]], num_characters: int) -> list[tuple[str, str]]:
    """Documents up to a total length, drawn across the whole domain in the order of their hashes."""
    chosen, total = [], 0
    for title, text in sorted(pairs, key=lambda pair: hashlib.sha256("\0".join(pair).encode()).digest()):
        if total + len(text) <= num_characters:
            chosen.append((title, text))
            total += len(text)
    return sorted(chosen)


def write(path: Path, source: Source, versions: list[str], pairs: list[tuple[str, str]]) -> None:
    titles, texts = zip(*pairs, strict=True)
    schema = pa.schema(
        [("domain", pa.string()), ("title", pa.string()), ("text", pa.large_string())],
        metadata={"packages": ", ".join(versions), "licence": source.licence},
    )
    table = pa.table([[source.domain] * len(pairs), list(titles), list(texts)], schema=schema)
    temporary = path.with_suffix(".partial")
    pq.write_table(
        table,
        temporary,
        compression="zstd",
        compression_level=19,
        use_dictionary=["domain"],
        write_statistics=False,
        row_group_size=len(pairs),
    )
    temporary.replace(path)


def build(name: str, out: Path) -> None:
    sources, num_characters = SETS[name]
    out.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources, 1):
        with tempfile.TemporaryDirectory(prefix="corpora-") as folder:
            fetched = [fetch(package, Path(folder)) for package in source.packages]
            pairs = select(documents(source, [tree for tree, _ in fetched]), num_characters)
        versions = [f"{package} {version}" for package, (_, version) in zip(source.packages, fetched, strict=True)]
        if not pairs:
            raise CorpusError(
                f"domain {source.domain}: no text matched {source.pattern} in {', '.join(versions)}; "
                "the package's layout has changed: adjust the table in from_debian.py"
            )
        path = out / f"{source.domain}.parquet"
        write(path, source, versions, pairs)
        raw = sum(len(text.encode()) for _, text in pairs)
        print(
            f"[{number}/{len(sources)}] {source.domain}: {len(pairs)} documents, {raw / 1e6:.2f} MB of text, "
            f"{path.stat().st_size / 1e6:.2f} MB on disk ({', '.join(versions)})",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SETS), default="quickstart")
    parser.add_argument("out", type=Path, help="folder for the Parquet files")
    arguments = parser.parse_args()
    try:
        build(arguments.set, arguments.out)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
