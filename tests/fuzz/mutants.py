"""Random faults: of an experiment's tree and text, of bytes, of tables, of JSON."""

from __future__ import annotations

import copy
import json
import random
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

VALUES: tuple[Any, ...] = (
    *(None, "", " ", "x", "../x", "/", "s3://", "x" * 300, "é\u202e\x00", True, False, [], {}, [None], [[]], [0, 0]),
    *(-1, 0, 1, 2, 7, 10**9, 10**25, -(10**400), 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")),
    *({"": None}, {"x": 1}, ["a"] * 1000, "2020-13-45", "1e5", "null", "${x}", "*", "layer.*", "[", "layer.0.head.99"),
    *("everything+everything", "baseline", ".", "%s{}\\", "http://127.0.0.1:1/x", "x.parquet", "a:b", "os:system"),
)
TEXTS = (
    *("\t", "\x00", "&a [*a]", "!!int x", "!!bool x", "!!python/object:os.system x", "2020-13-45", "- - - -", "{", "]"),
    *(
        "key: [",
        ": :",
        "? x",
        "<<: *a",
        "\ufeff",
        "\ud7ff",
        "#",
        "'",
        '"',
        "|",
        ">",
        "%YAML 9.9",
        "---",
        "...",
        "@",
        "`",
    ),
    *("9" * 5000, "[" * 3000, "? [a]\n: b", "{{}: x}"),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a tree of dicts and lists, its root not among them."""
    found = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """One to three faults: something gone, of another kind, renamed, in another place, or twice."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        where = places(tree)
        if not where:
            return tree
        path = rng.choice(where)
        parent = _at(tree, path[:-1])
        kind = rng.choice((0, 1, 2, 3, 4, 5, 5, 5, 6))
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[_misspelt(rng, path[-1])] = parent.pop(path[-1])
        elif kind == 2:
            other = rng.choice(where)
            parent[path[-1]] = copy.deepcopy(_at(tree, other))
        elif kind == 3 and isinstance(parent, dict):
            parent[rng.choice(("x", "", "name", 3, None, "kind"))] = rng.choice(VALUES)
        elif kind == 4:
            parent[path[-1]] = [copy.deepcopy(parent[path[-1]])] * rng.choice((1, 2))
        elif kind == 5:
            numbers = [where for where in places(tree) if type(_at(tree, where)) in (int, float)]
            if numbers:
                *above, last = rng.choice(numbers)
                parent = _at(tree, tuple(above))
                parent[last] *= rng.choice((-1, 0, 1e-9, 0.5, 2, 3, 7, 1000, 10**12))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return tree


def mutated_text(rng: random.Random, text: str) -> str:
    """A line gone, twice or cut; words that YAML or JSON take for something else; letters changed."""
    lines = text.splitlines() or [""]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines[at : at + 1] = [lines[at]] * rng.choice((0, 2))
        elif kind == 1:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        elif kind == 2:
            lines[at] = " " * rng.randrange(5) + lines[at].lstrip()
        elif kind == 3:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(TEXTS) + lines[at][cut:]
        elif kind == 4 and lines[at]:
            cut = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:cut] + rng.choice(string.printable) + lines[at][cut + 1 :]
        else:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(TEXTS)
        lines = lines or [""]
    return "\n".join(lines) + "\n"


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, cut short, stretches gone, doubled or of other bytes."""
    kind, data = rng.randrange(6), bytearray(content)
    at = rng.randrange(len(data)) if data else 0
    if kind == 0 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + rng.randrange(1, 64)]
    elif kind == 3:
        data[at:at] = data[at : at + rng.randrange(1, 64)]
    elif kind == 4:
        data[at : at + 8] = rng.randbytes(8)
    else:
        data = bytearray(
            rng.choice((b"", b"\x00" * 100, b"PAR1", b"\xff\xfe", b"[]", b"null", b"{}", b"\xef\xbb\xbf{}"))
        )
    return bytes(data)


def mutated_table(rng: random.Random, table: pa.Table) -> pa.Table:
    """A column gone, renamed, twice, of another type, with nulls, or with odd cells."""
    name = rng.choice(table.column_names)
    at, column = table.column_names.index(name), table[name]
    kind = rng.randrange(8)
    if kind == 0:
        return table.drop_columns([name])
    if kind == 1:
        return table.rename_columns([_misspelt(rng, n) if n == name else n for n in table.column_names])
    if kind == 2:
        return table.append_column(name, column)
    if kind == 3:
        return table.slice(0, rng.choice((0, 1, 2)))
    cells = column.to_pylist()
    for _ in range(rng.choice((1, 3))):
        row = rng.randrange(len(cells)) if cells else 0
        cell = cells[row]
        inside = isinstance(cell, list) and cell and rng.random() < 0.6
        odd = rng.choice((None, -1, 0, 2**31, 2**62, 0.5, float("nan"), "x", [], [1], "é" * 50, True))
        if inside:
            cell = list(cell)
            cell[rng.randrange(len(cell))] = odd
            cells[row] = cell
        else:
            cells[row] = odd
    try:
        changed = pa.array(cells)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):  # Parquet has no column of such cells
        changed = pa.array([str(cell) for cell in cells])
    return table.set_column(at, name, changed)


def write_yaml(file: Path, tree: Any) -> None:
    """A tree as text, whatever is in it."""
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8", errors="surrogateescape")


def mutate_file(rng: random.Random, file: Path) -> str:
    """Put a fault into a file of a kind that is known; returns what kind of fault."""
    suffix = file.suffix
    if suffix == ".parquet" and rng.random() < 0.7:
        pq.write_table(mutated_table(rng, pq.read_table(file)), file)
        return "table"
    if suffix == ".json" and rng.random() < 0.7:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if places(tree):
            file.write_text(json.dumps(mutated_tree(rng, tree), default=str), encoding="utf-8", errors="replace")
            return "tree"
    if suffix in (".json", ".jsonl", ".txt", ".yaml") and rng.random() < 0.5:
        text = mutated_text(rng, file.read_text(encoding="utf-8"))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return "text"
    file.write_bytes(mutated_bytes(rng, file.read_bytes()))
    return "bytes"


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _misspelt(rng: random.Random, name: Any) -> Any:
    if not isinstance(name, str) or not name:
        return rng.choice(("x", 3))
    at = rng.randrange(len(name))
    return rng.choice((name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name.upper(), name + "s", ""))
