"""Rows of text, of conversations, or of a prompt and what follows it, as rows of token ids.

A column holds token ids already, strings, or lists of messages with ``role`` and ``content`` (or ``from`` and
``value``), as the trainers of ``trl`` take them. Strings are encoded with the model's own tokenizer, special tokens
and all, and end with its end-of-text token; messages are rendered by its chat template. What counts:

    text                       every token
    prompt and completion      tokens that reach beyond the prompt, whether they are ids, strings or messages
    messages                   the assistant's turns where the template marks them ({% generation %}), else the last
                               turn, if it is the assistant's
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from patterning_dist.data.token_blocks import COMPLETION_MASK, MASKS, without_pads
from patterning_dist.data.token_rows import Rows, is_list
from patterning_dist.data.tokenizer import load_tokenizer
from patterning_dist.errors import PatterningError, first_line

# Columns that are looked for where none is named: the first of these that are all there.
_KNOWN = (("input_ids",), ("messages",), ("conversations",), ("prompt", "completion"), ("text",))
_ROLES = {"human": "user", "gpt": "assistant"}  # of ``from``
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def known_columns(names: Sequence[str], column: str | None, prompt: str | None) -> list[str]:
    """Columns of the samples, a prompt first where there is one."""
    if column is not None:
        return [*([prompt] if prompt else []), column]
    return list(next((known for known in _KNOWN if set(known) <= set(names)), _KNOWN[0]))


class RowTokenizer:
    """The tokenizer of a model, or of ``data.tokenizer``, read when the first text is met.

    Args:
        path: its folder (or that of its checkpoints), or a name on the hub; None: there is none.

    Attributes:
        used: what was done with it, a sentence each.
    """

    def __init__(self, path: str | None) -> None:
        self.path, self.used = path, set[str]()
        self._loaded: Any = None

    @property
    def vocabulary_size(self) -> int | None:
        """Of the tokenizer, added tokens included; None where no text was met."""
        return None if self._loaded is None else len(self._loaded)

    def __call__(
        self, rows: Rows, column: str, prompt: str | None = None, pad: int | None = None, losses: bool = True
    ) -> Rows:
        """Rows whose ``column`` holds token ids, those of the prompt before it.

        Where something was encoded or joined, ``completion_mask`` says what counts, and other masks are gone.

        Args:
            rows: with the columns.
            pad: token that fills ids up where no attention_mask says so.
            losses: whether it matters what counts.

        Raises:
            PatterningError: nulls, columns that do not go together, or messages that the chat template refuses.
        """
        names = [column] if prompt is None else [prompt, column]
        for name in names:
            rows.refuse_nulls(name, "give token ids or text, or leave the row out")
        if all(_is_text(rows.columns[name]) for name in names):
            return self._encoded(rows, names, losses)
        if all(_is_chat(rows.columns[name]) for name in names):
            return self._rendered(rows, names, losses)
        if prompt is None:
            return rows
        kinds = [_is_text(rows.columns[name]) + 2 * _is_chat(rows.columns[name]) for name in names]
        if kinds != [0, 0]:
            held = " and ".join(f"{name!r} {rows.columns[name].type}" for name in names)
            raise PatterningError(f"{rows.file}: columns hold {held}; expected text, messages or token ids in both")
        return _joined(rows, prompt, column, pad)

    def _load(self, rows: Rows, column: str) -> Any:
        if self._loaded is None:
            if self.path is None:
                raise PatterningError(
                    f"{rows.file}: column {column!r} holds {rows.columns[column].type}; expected lists of whole "
                    "numbers, the token ids, or the name of a tokenizer in data.tokenizer"
                )
            self._loaded = load_tokenizer(self.path)
        return self._loaded

    def _encoded(self, rows: Rows, names: Sequence[str], losses: bool) -> Rows:
        """Strings end to end, encoded as one text."""
        tokenizer, column = self._load(rows, names[-1]), names[-1]
        parts = [rows.columns[name].to_pylist() for name in names]
        prompts = parts[0] if len(parts) == 2 else [""] * len(rows)
        ids, begins = self._ids(tokenizer, list(map("".join, zip(*parts, strict=True))), prompts, special=True)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        for row, tokens in enumerate(ids):
            if bos is not None and tokens[:2] == [bos, bos]:  # the text has it already
                del tokens[0]
                begins[row] = max(begins[row] - 1, 0)
            if eos is not None and tokens and tokens[-1] != eos:
                tokens.append(eos)
        said = f"{' + '.join(names)} encoded with the tokenizer of {self.path}"
        self.used.add(said + (f"; no loss on {names[0]}" if losses and len(names) == 2 else ""))
        return _made(rows, names, column, ids, begins)

    def _rendered(self, rows: Rows, names: Sequence[str], losses: bool) -> Rows:
        """Messages end to end, as the chat template has them."""
        tokenizer, column = self._load(rows, names[-1]), names[-1]
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise PatterningError(
                f"{rows.file}: column {column!r} holds messages, and the tokenizer of {self.path} has no chat "
                "template; put its chat_template.jinja there, or give text"
            ) from None
        parts = [[_messages(turns) for turns in rows.columns[name].to_pylist()] for name in names]
        said = f"{' + '.join(names)} rendered by the chat template of {self.path}"
        if losses and len(names) == 1 and _MARKED.search(template) and tokenizer.is_fast:
            found = [
                _template(rows, row, tokenizer, turns, tokenize=True, return_assistant_tokens_mask=True)
                for row, turns in enumerate(parts[0])
            ]
            self.used.add(f"{said}; loss on the assistant's turns, which it marks")
            ids = [list(entry["input_ids"]) for entry in found]
            return _made(rows, names, column, ids, [np.array(entry["assistant_masks"]) != 0 for entry in found])
        texts, prompts = [], []
        for row, turns in enumerate(parts[-1]):
            before = parts[0][row] if len(parts) == 2 else turns[:-1]
            texts.append(_template(rows, row, tokenizer, before + turns if len(parts) == 2 else turns))
            if not losses:
                prompts.append("")
            elif len(parts) == 1 and turns and turns[-1].get("role") != "assistant":
                prompts.append(texts[-1])
            else:
                prompts.append(_template(rows, row, tokenizer, before, add_generation_prompt=True))
                if not texts[-1].startswith(prompts[-1]):
                    rows.refuse(
                        np.arange(len(rows)) == row,
                        f"{column} does not go on from the turns before as the chat template of {self.path} has them; "
                        "mark the assistant's turns in it with {% generation %}",
                    )
        if losses:
            last = "the last turn where it is the assistant's, since the template marks none ({% generation %})"
            said += f"; loss on {column if len(parts) == 2 else last}"
        self.used.add(said)
        ids, begins = self._ids(tokenizer, texts, prompts, special=False)
        return _made(rows, names, column, ids, begins)

    def _ids(
        self, tokenizer: Any, texts: list[str], prompts: Sequence[str], special: bool
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids of every text, and the number of its first token that reaches beyond the prompt."""
        if not texts:
            return [], []
        plain = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        found = tokenizer(texts, **plain)
        ids = [list(tokens) for tokens in found["input_ids"]]
        if not any(prompts):
            return ids, [0] * len(ids)
        if tokenizer.is_fast:
            rows = enumerate(zip(texts, prompts, strict=True))
            begins = [_token_at(found, row, len(prompt), len(text)) for row, (text, prompt) in rows]
            return ids, [len(tokens) if at is None else at for tokens, at in zip(ids, begins, strict=True)]
        alone = tokenizer(list(prompts), **plain)["input_ids"]
        return ids, [_first(a != b for a, b in zip(*pair, strict=False)) for pair in zip(ids, alone, strict=True)]


def _token_at(found: Any, row: int, start: int, stop: int) -> int | None:
    """The token of the first character from ``start`` on that is part of one; 0 at the beginning of the text."""
    places = (found.char_to_token(row, place) for place in range(start, stop))
    return 0 if start == 0 else next((at for at in places if at is not None), None)


def mask_name(column: str) -> str:
    """Of the mask of a column of token ids; a name that no column has where there is no rule."""
    return column.replace("input_ids", "attention_mask") if "input_ids" in column else f"{column}_attention_mask"


def real_tokens(rows: Rows, column: str, pad: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that are no pads, end to end, and where rows begin."""
    mask = rows.columns.get(mask_name(column))
    columns = {column: rows.columns[column]} | ({} if mask is None else {"attention_mask": mask})
    return without_pads(Rows(rows.file, rows.first, columns), column, pad)[:2]


def _is_text(array: pa.Array) -> bool:
    return pa.types.is_string(array.type) or pa.types.is_large_string(array.type)


def _is_chat(array: pa.Array) -> bool:
    return is_list(array) and pa.types.is_struct(array.type.value_type)


def _first(found: Any) -> int:
    """Number of the first True; one past the last where there is none."""
    number = -1
    for number, there in enumerate(found):
        if there:
            return number
    return number + 1


def _messages(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} if "from" in turn else turn
        for turn in turns
    ]


def _template(rows: Rows, row: int, tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> Any:
    from jinja2 import TemplateError

    if not turns:
        return {"input_ids": [], "assistant_masks": []} if options.get("tokenize") else ""
    try:
        return tokenizer.apply_chat_template(turns, **{"tokenize": False, **options})
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise PatterningError(
            f"{rows.file} row {rows.first + row}: the chat template refuses these messages ({first_line(error)}); "
            "mend them or leave the row out"
        ) from None


def _joined(rows: Rows, prompt: str, column: str, pad: int | None) -> Rows:
    """Token ids of two columns, one behind the other."""
    parts = [real_tokens(rows, name, pad) for name in (prompt, column)]
    ids = [
        np.concatenate([values[offsets[row] : offsets[row + 1]] for values, offsets in parts])
        for row in range(len(rows))
    ]
    return _made(rows, (prompt, column), column, ids, np.diff(parts[0][1]).tolist())


def _made(rows: Rows, names: Sequence[str], column: str, ids: Sequence[Any], counted: Sequence[Any]) -> Rows:
    """Rows with these ids instead; ``counted`` is a mask of each, or the number of its first token that counts."""
    masks = [np.arange(len(t)) >= c if isinstance(c, int) else c for t, c in zip(ids, counted, strict=True)]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    lists = [
        pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate([np.zeros(0, np.int64), *values]).astype(int)))
        for values in (ids, masks)
    ]
    gone = {*names, *(mask_name(name) for name in names), *MASKS}
    kept = {name: array for name, array in rows.columns.items() if name not in gone}
    unused = (*rows.unused, *(name for name in rows.columns if name in gone and name not in names))
    return Rows(rows.file, rows.first, {column: lists[0], COMPLETION_MASK: lists[1], **kept}, unused)
