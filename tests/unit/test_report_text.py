"""Numbers are claimed no further than their intervals go, and tokens look as they are."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np

from patterning_dist.report import words
from patterning_dist.report.reading import Run
from patterning_dist.report.svg import nice_ticks, tick_words
from patterning_dist.report.text import open_text, strongest

sys.path.append(str(Path(__file__).parent))  # whatever the import mode of the tests
write_run = importlib.import_module("report_fixture").write_run


def test_one_seed_claims_nothing():
    value = {"value": 0.3, "interval": None}
    assert words.clear(value) == 0
    assert "is not distinguishable from chance" in words.Metrics({}).effect("prefix_matching", value)
    assert words.clear({"value": 0.3, "interval": [float("nan"), 1.0]}) == 0


def test_tokens_look_as_they_are(tmp_path):
    run = write_run(tmp_path / "run")
    text = open_text(Run(run))["train"]
    shown = {text.shown(i) for i in range(text.tokenizer.get_vocab_size())}
    visible = {text.visible(i) for i in range(text.tokenizer.get_vocab_size())}
    assert "\u2407" in shown and "\x07" not in shown  # a bell is its picture
    assert any(re.fullmatch(r"⟨[0-9a-f]{2}⟩", token) for token in shown)  # half of a character is its bytes
    assert not any(re.search(r"[\x00-\x1f \ufffd]", token) for token in visible)
    assert "↵" in visible and "⇥" in visible and "·" in visible
    ids = text.tokenizer.encode("Café naïve — 漢字\n").ids
    raw = "".join(text.tokenizer.id_to_token(i) for i in ids)
    assert text.tokenizer.decode(ids) == "Café naïve — 漢字\n" and raw != "Café naïve — 漢字\n"


def test_strongest_takes_the_extremes_and_draws_ties_evenly():
    values = np.array([1.0, 4.0, 4.0, 0.5, 4.0, 3.0, 4.0])
    assert strongest(values, 1, largest=False).tolist() == [3]
    assert set(strongest(values, 5, largest=True).tolist()) == {1, 2, 4, 5, 6}
    tied = np.repeat([0.0, 1.0], [1000, 1000])
    picked = strongest(tied, 100, largest=True)
    assert picked.min() < 1200 and picked.max() > 1800 and (picked >= 1000).all()
    assert strongest(values, 99, largest=True).size == 7 and strongest(np.empty(0), 3, largest=True).size == 0


def test_numbers_are_written_with_what_their_intervals_bear():
    assert words.estimate({"value": -0.1234, "interval": [-0.21, -0.03]}) == "−0.12\u00a0[−0.21,\u00a0−0.03]"
    assert words.estimate({"value": 0.5, "interval": None}, sign=True) == "+0.5"
    assert [words.number(v) for v in (None, float("nan"), 0.0, 12345, 1.5e-7)] == [
        "–",
        "–",
        "0",
        "12,345",
        "1.50e−7",
    ]
    assert tick_words(nice_ticks(-0.31, 0.22)) == ["−0.2", "0.0", "0.2"]
