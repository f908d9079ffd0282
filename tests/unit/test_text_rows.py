"""Text, prompts and conversations: the tokens are the tokenizer's own, and what is decoded of those that count is the
completion, or what the assistant says."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tokenizer import MARKED, PLAIN, save_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer

from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.errors import PatterningError

LENGTH = 48
STRICT = "{{ raise_exception('roles must alternate') }}"
REWRITTEN = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"  # depends on what comes after
CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "yes it is"},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "maybe"},
]


def table(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, rows: list[dict], **options: Any) -> TokenDataset:
    return TokenDataset(table(folder / "t.jsonl", rows), LENGTH, tokenizer=str(folder), **options)


def said(data: TokenDataset, tokenizer: Any) -> list[tuple[str, str]]:
    """Of every sample, all of it as text, and what counts of it."""
    ids = np.arange(len(data))
    tokens, counted = data.tokens(ids), data.counted(ids)
    counted = np.ones_like(tokens[:, 1:], bool) if counted is None else counted
    lengths = [np.flatnonzero(row).max() + 1 for row in tokens]  # 0 is <s>, which nothing ends with
    return [
        (tokenizer.decode(row[:length]), tokenizer.decode(row[1:][mask]))
        for row, length, mask in zip(tokens, lengths, counted, strict=True)
    ]


def test_text_is_what_the_tokenizer_makes_of_it(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    data = read(tmp_path, [{"text": "what is it"}, {"text": "é <s> no</s>"}])
    for number, text in enumerate(["what is it</s>", "é <s> no</s>"]):
        ids = tokenizer(text).input_ids
        assert data.tokens([number])[0][: len(ids)].tolist() == ids
        assert data.counted([number])[0].sum() == len(ids) - 1
    assert data.vocabulary_size == len(tokenizer)
    assert data.remarks == [f"{tmp_path}/t.jsonl: text encoded with the tokenizer of {tmp_path}"]


def test_a_first_token_comes_once(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, bos=True)
    data = read(tmp_path, [{"text": "no"}, {"text": "<s>no"}])
    assert data.tokens([0]).tolist() == data.tokens([1]).tolist()
    assert data.tokens([0])[0][:2].tolist() == tokenizer("no").input_ids[:2] == [0, tokenizer("no").input_ids[1]]
    with_prompt = read(
        tmp_path, [{"prompt": "<s>it is", "completion": " no"}, {"prompt": "it is", "completion": " no"}]
    )
    assert said(with_prompt, tokenizer) == [("<s>it is no</s>", " no</s>")] * 2


@pytest.mark.parametrize("end", [None, "</s>"])
def test_a_tokenizer_without_an_end_adds_none(tmp_path: Path, end: str | None) -> None:
    save_tokenizer(tmp_path, eos_token=end)
    assert (1 in read(tmp_path, [{"text": "what is it"}]).tokens([0])) == (end is not None)


@pytest.mark.parametrize(
    ("prompt", "completion", "counted"),
    [
        ("it is", " no", " no</s>"),
        ("it is ", "no", " no</s>"),  # the blank is part of the token that the completion begins with
        ("", "it is", "t is</s>"),  # nothing comes before the first token
        ("it is", "", "</s>"),
        ("é", "é", "é</s>"),
    ],
)
def test_the_loss_is_on_the_completion(tmp_path: Path, prompt: str, completion: str, counted: str) -> None:
    tokenizer = save_tokenizer(tmp_path)
    data = read(tmp_path, [{"prompt": prompt, "completion": completion}, {"prompt": "what is", "completion": " it"}])
    whole = prompt + completion + "</s>"
    if prompt:
        assert said(data, tokenizer)[0] == (whole, counted)
    else:
        assert data.counted([0])[0].sum() == len(tokenizer(whole).input_ids) - 1
    assert data.tokens([0])[0][: len(tokenizer(whole).input_ids)].tolist() == tokenizer(whole).input_ids
    assert any("; no loss on prompt" in line for line in data.remarks)


def test_columns_of_other_names_can_be_given(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    rows = [{"question": "what", "answer": " it is", "text": "no", "domain": "a"}]
    data = read(tmp_path, rows, prompt="question", column="answer")
    assert said(data, tokenizer) == [("what it is</s>", " it is</s>")]
    assert data.domains.tolist() == ["a"]
    assert f"{tmp_path}/t.jsonl: columns that have no effect: text" in data.remarks
    again = pickle.loads(pickle.dumps(data))
    assert (again.sha256, again.counted([0]).tolist()) == (data.sha256, data.counted([0]).tolist())


def test_a_tokenizer_without_offsets_tells_the_prompt_by_its_own_tokens(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)  # pure Python: a token a byte, and an end
    data = read(tmp_path, [{"prompt": "abc", "completion": "de"}])
    assert data.counted([0])[0][:6].tolist() == [False, False, True, True, True, False]


def test_token_ids_behind_a_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": [9, 5, 6], "completion": [7, 8]}, {"prompt": [], "completion": [1, 2, 9, 9]}]
    data = TokenDataset(table(tmp_path / "t.jsonl", rows), 6, pad=9)
    assert data.tokens([0, 1]).tolist() == [[5, 6, 7, 8, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert data.counted([0, 1]).tolist() == [[False, True, True, False, False], [True, False, False, False, False]]


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_masks_of_trl_say_what_counts(tmp_path: Path, name: str) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], name: [0, 0, 1, 1], "labels": [5, 6, 7, -100]}]
    data = TokenDataset(table(tmp_path / "t.jsonl", rows), 4)
    assert data.counted([0]).tolist() == [[False, True, False]]


def test_the_assistants_turns_count_where_the_template_marks_them(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, MARKED)
    whole = "<s>user\nwhat is it</s><s>assistant\nyes it is</s><s>user\nno</s><s>assistant\nmaybe</s>"
    data = read(tmp_path, [{"messages": CHAT}])
    assert said(data, tokenizer) == [(whole, "yes it is</s>maybe</s>")]
    assert "loss on the assistant's turns, which it marks" in data.remarks[0]
    save_tokenizer(tmp_path, PLAIN)
    data = read(tmp_path, [{"messages": CHAT}, {"messages": CHAT[:3]}])
    assert said(data, tokenizer) == [(whole, "maybe</s>")]  # the other row ends with the user
    assert "loss on the last turn where it is the assistant's, since the template marks none" in data.remarks[0]
    assert "those of 1 rows without a token to predict" in data.remarks[-1]


@pytest.mark.parametrize("source", ["parquet", "datasets", "from and value"])
def test_conversations_come_from_anywhere(tmp_path: Path, source: str) -> None:
    tokenizer = save_tokenizer(tmp_path, PLAIN)
    expected = ("<s>user\nwhat is it</s><s>assistant\nyes it is</s>", "yes it is</s>")
    place, column, turns = tmp_path / "t.parquet", "messages", CHAT[:2]
    if source == "from and value":
        names = {"user": "human", "assistant": "gpt"}
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
        column = "conversations"
    if source == "datasets":
        import datasets

        place = tmp_path / "saved"
        datasets.Dataset.from_dict({column: [turns]}).save_to_disk(place)
    else:
        pq.write_table(pa.table({column: [turns]}), place)
    assert said(TokenDataset(place, LENGTH, tokenizer=str(tmp_path)), tokenizer) == [expected]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_conversation_as_prompt_and_completion(tmp_path: Path, template: str) -> None:
    tokenizer = save_tokenizer(tmp_path, template)
    data = read(tmp_path, [{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    assert said(data, tokenizer)[0][1] == "maybe</s>"
    assert "loss on completion" in data.remarks[0]


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        (
            None,
            [{"messages": CHAT}],
            "holds messages, and the tokenizer of .* has no chat template; put its chat_templ",
        ),
        (STRICT, [{"messages": CHAT}], r" row 0: the chat template refuses these messages \(roles must alternate\)"),
        (
            REWRITTEN,
            [{"messages": CHAT}],
            " row 0: messages does not go on from the turns before .* mark the assistant",
        ),
        (
            PLAIN,
            [{"prompt": "a", "completion": CHAT}],
            ": columns hold 'prompt' string and 'completion' list<.*; expected",
        ),
        (
            PLAIN,
            [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}],
            " row 1: prompt is null; give",
        ),
        (PLAIN, [{"text": 3}], ": column 'text' holds int64; expected lists of whole numbers, the token ids"),
    ],
)
def test_what_cannot_be_encoded_is_named(tmp_path: Path, template: str | None, rows: list, message: str) -> None:
    save_tokenizer(tmp_path, template)
    with pytest.raises(PatterningError, match=rf"t\.jsonl.*{message}"):
        read(tmp_path, rows)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(
        PatterningError, match=r"column 'text' holds string; .* or the name of a tokenizer in data\.tok"
    ):
        TokenDataset(path, 4)
    with pytest.raises(PatterningError, match=r"no tokenizer in this folder \(tokenizer\.json, .*give token ids"):
        read(tmp_path, [{"text": "a"}])
    save_tokenizer(tmp_path / "step10")  # as a folder of checkpoints has it
    assert len(read(tmp_path, [{"text": "what"}])) == 1


NAMES = {"chosen": "chosen", "rejected": "rejected"}


def sequences(folder: Path, row: dict, prompt: str | None = None) -> tuple[list[str], SequenceTable]:
    pairs = SequenceTable(str(table(folder / "t.jsonl", [row])), LENGTH, NAMES, prompt, tokenizer=str(folder))
    tokenizer, batch = AutoTokenizer.from_pretrained(folder), pairs[[0]]
    return [tokenizer.decode(batch[name][0][batch[f"{name}_mask"][0]]) for name in NAMES], pairs


@pytest.mark.parametrize("template", [PLAIN, MARKED, REWRITTEN])
def test_pairs_of_conversations_with_or_without_their_prompt(tmp_path: Path, template: str) -> None:
    tokenizer = save_tokenizer(tmp_path, template)
    worse = [{"role": "assistant", "content": "no"}]
    wanted = [tokenizer.apply_chat_template([CHAT[0], *end], tokenize=False) for end in (CHAT[1:2], worse)]
    apart = {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": worse}
    found, pairs = sequences(tmp_path, apart, "prompt")
    assert found == wanted
    within, same = sequences(tmp_path, {"chosen": CHAT[:2], "rejected": [CHAT[0], *worse]})
    assert within == wanted
    assert pairs.sha256 == same.sha256


def test_pairs_of_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    row = {"prompt": "what is it", "chosen": " yes", "rejected": " no", "id": 3}
    found, pairs = sequences(tmp_path, row, "prompt")
    assert found == ["what is it yes</s>", "what is it no</s>"]
    assert pairs.remarks[-1].endswith("columns that have no effect: id")
    found, pairs = sequences(tmp_path, row)
    assert found == [" yes</s>", " no</s>"]
    assert pairs.remarks[-1].endswith("columns that have no effect: prompt, id")


def test_text_with_a_class(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    path = str(table(tmp_path / "t.jsonl", [{"text": "yes", "label": 1}, {"text": "no", "label": 0}]))
    found = SequenceTable(path, LENGTH, {"tokens": "text"}, label="label", tokenizer=str(tmp_path))
    assert found.labels.tolist() == [1, 0]
    assert tokenizer.decode(found[[0]]["tokens"][0][found[[0]]["tokens_mask"][0]]) == "yes</s>"
    assert found.vocabulary_size == len(tokenizer)
