"""Tokens as readable text: in context, and whole blocks shaded by weight. The template escapes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from patterning_dist.report.blocks import Line, Lines, Passage, Piece, Side, Table
from patterning_dist.report.reading import Run, column
from patterning_dist.storage.files import token_dtype

TOKENS_BEFORE, TOKENS_AFTER = 12, 4
INDEX = ("sequence_id", "sample_id", "domain", "position", "token")  # columns that say what a row is of


@cache
def _byte_of_character() -> dict[str, int]:
    """Character of a byte-level vocabulary -> its byte: printable ones themselves, the rest from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenText:
    """The blocks of one split (`train` or `validation`) and how their tokens look."""

    def __init__(self, table: pa.Table, tokenizer: Tokenizer) -> None:
        self.table, self.tokenizer = table, tokenizer
        self._dtype = token_dtype(tokenizer.get_vocab_size())
        self._shown: dict[int, str] = {}

    def block(self, sequence_id: int) -> np.ndarray:
        """Token ids of one block (position)."""
        return np.frombuffer(self.table["tokens"][sequence_id].as_py(), dtype=self._dtype)

    def domain(self, sequence_id: int) -> str:
        """Where the block is from."""
        return str(self.table["domain"][sequence_id].as_py())

    def has(self, sequence_id: int, position: int, token: int) -> bool:
        """Whether this split holds `token` there: how the split of a table that does not name it is found."""
        if sequence_id >= self.table.num_rows:
            return False
        block = self.block(sequence_id)
        return position < block.size and int(block[position]) == token

    def shown(self, token: int) -> str:
        """The token's text; bytes that are not text as ⟨e2 80⟩, control characters as their pictures."""
        if token not in self._shown:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            if "\ufffd" in text or not text:
                name = self.tokenizer.id_to_token(token) or f"#{token}"
                raw = [_byte_of_character().get(character) for character in name]
                text = name if None in raw else f"⟨{' '.join(f'{byte:02x}' for byte in raw)}⟩"
            self._shown[token] = "".join(
                character if character in "\n\t" or ord(character) >= 32 else chr(0x2400 + ord(character))
                for character in text
            )
        return self._shown[token]

    def visible(self, token: int) -> str:
        """The token's text with every space, tab and new line marked."""
        return self.shown(token).replace(" ", "·").replace("\t", "⇥").replace("\n", "↵")

    def running(self, tokens: np.ndarray) -> str:
        """Tokens as one line of running text: spaces stay spaces, new lines are marked."""
        return "".join(self.shown(int(token)) for token in tokens).replace("\t", "⇥").replace("\n", "↵")

    def line(self, sequence_id: int, position: int, value: str, side: Side, shade: float) -> Line:
        """The token at `position` of a block between its neighbours."""
        block = self.block(sequence_id)
        tip = f"sequence {sequence_id}, position {position}"
        return Line(
            value=value,
            before=self.running(block[max(0, position - TOKENS_BEFORE) : position]),
            token=Piece(self.visible(int(block[position])), side, shade, tip),
            after=self.running(block[position + 1 : position + 1 + TOKENS_AFTER]),
            domain=self.domain(sequence_id),
        )


class Shading:
    """How strongly a weight is coloured: 1 is blank, the arm's extremes are full."""

    def __init__(self, weights: np.ndarray) -> None:
        self.low, self.high = float(weights.min()), float(weights.max())

    def __call__(self, weight: float) -> tuple[Side, float]:
        """Side and shade in 0..1 of one weight."""
        if weight > 1:
            return "up", min(1.0, (weight - 1) / max(self.high - 1, 1e-9))
        return ("down", min(1.0, (1 - weight) / max(1 - self.low, 1e-9))) if weight < 1 else ("", 0.0)


def open_text(run: Run) -> dict[str, TokenText]:
    """Split -> its text, for the splits whose blocks and tokenizer are there."""
    raw = run.text("data/tokenizer.json")
    if raw is None:
        return {}
    try:
        tokenizer = Tokenizer.from_str(raw)
    except Exception as error:  # the tokenizers library raises plain Exception
        run.problems.append(f"data/tokenizer.json cannot be read ({error}); run the data stage again.")
        return {}
    columns = ["sequence_id", "domain", "tokens"]
    tables = {split: run.table(f"data/{split}.parquet", columns) for split in ("train", "validation")}
    return {split: TokenText(table, tokenizer) for split, table in tables.items() if table is not None}


def split_of(probe: pa.Table, texts: Mapping[str, TokenText]) -> str | None:
    """The split whose blocks hold the probe's tokens at the places it names."""
    if not {"sequence_id", "position", "token"} <= set(probe.column_names):
        return None
    rows = np.unique(np.linspace(0, probe.num_rows - 1, 20).astype(int))
    columns = (column(probe, name)[rows].tolist() for name in ("sequence_id", "position", "token"))
    places = list(zip(*columns, strict=True))
    return next((split for split, text in texts.items() if all(text.has(*place) for place in places)), None)


def entries(
    title: str,
    value_name: str,
    index: Mapping[str, np.ndarray],
    values: np.ndarray,
    rows: Sequence[int],
    words: Callable[[int], str],
    shade: Callable[[float], tuple[Side, float]],
    text: TokenText | None,
    folded: bool = False,
) -> Lines | Table:
    """Some rows of a table: tokens between their neighbours where there is text, else by their numbers.

    Args:
        index: columns of ``INDEX`` that the table has [row].
        values: that shade it [row].
        rows: chosen.
        words: what is shown of a row.
        shade: side and shade of a value.
    """
    if text is not None and "position" in index:
        places = ((int(index["sequence_id"][i]), int(index["position"][i])) for i in rows)
        lines = [text.line(*at, words(i), *shade(float(values[i]))) for i, at in zip(rows, places, strict=True)]
        return Lines(title, value_name, lines, folded=folded)
    columns = [name for name in INDEX if name in index]
    cells = [[*(str(index[name][i]) for name in columns), words(i)] for i in rows]
    headers = [*(name.removesuffix("_id") for name in columns), value_name]
    return Table(headers, cells, "" if folded else title, title if folded else "")


def shades(values: np.ndarray) -> Callable[[float], tuple[Side, float]]:
    """Side and shade of a value among others."""
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    return lambda value: ("up" if value > 0 else "down", abs(value) / largest)


def strongest(weights: np.ndarray, count: int, largest: bool) -> np.ndarray:
    """Indices of the `count` largest (or smallest) values, best first; among equals a fixed random choice."""
    values = weights if largest else -weights
    count = min(count, values.size)
    if not count:
        return np.empty(0, dtype=np.int64)
    edge = np.partition(values, values.size - count)[values.size - count]
    above, ties = np.flatnonzero(values > edge), np.flatnonzero(values == edge)
    above = above[np.argsort(-values[above], kind="stable")]
    ties = np.random.default_rng(0).permutation(ties)[: count - above.size]
    return np.concatenate([above, ties])


def varied(text: TokenText | None, index: Mapping[str, np.ndarray], order: np.ndarray, count: int) -> list[int]:
    """The first `count` rows of `order`; of tokens, no sequence twice and no token more than twice."""
    if text is None or "position" not in index:
        return order[:count].tolist()
    chosen: list[int] = []
    seen_sequences: set[int] = set()
    seen_tokens: dict[int, int] = {}
    for row in order:
        sequence_id = int(index["sequence_id"][row])
        token = int(text.block(sequence_id)[index["position"][row]])
        if sequence_id not in seen_sequences and seen_tokens.get(token, 0) < 2:
            chosen.append(int(row))
            seen_sequences.add(sequence_id)
            seen_tokens[token] = seen_tokens.get(token, 0) + 1
        if len(chosen) == count:
            break
    return chosen


def passage(
    text: TokenText,
    sequence_id: int,
    piece: Callable[[int, str, str, bool], Piece],
    title: str,
    scale: tuple[str, str, str],
    value_name: str,
) -> Passage:
    """A whole block, token by token.

    Args:
        piece: (position, text as shown, text with its spaces marked, whether a line ends there) -> what is shown.
        title: over it.
        scale: words at the lower end, the middle and the upper end of the shading.
        value_name: what shades.
    """
    pieces = []
    for position, token in enumerate(text.block(sequence_id)):
        shown = text.shown(int(token))
        words = shown.replace("\t", "⇥").replace("\n", "↵")
        pieces.append(piece(position, words, text.visible(int(token)), "\n" in shown))
    return Passage(title, pieces, scale, value_name)
