"""Numbers are claimed no further than their intervals go, and tokens look as they are."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from patterning_dist.report import words
from patterning_dist.report.reading import Run
from patterning_dist.report.svg import factor_ticks, nice_ticks, tick_words
from patterning_dist.report.text import open_text, strongest

sys.path.append(str(Path(__file__).parent))  # whatever the import mode of the tests
write_run = importlib.import_module("report_fixture").write_run


def test_one_seed_claims_nothing():
    value = {"value": 0.3, "interval": None}
    assert words.clear(value) == 0
    assert "is not distinguishable from chance" in words.Metrics({}).effect("prefix_matching", value)
    assert words.clear({"value": 0.3, "interval": [float("nan"), 1.0]}) == 0


def test_what_grows_by_factors_is_judged_and_told_by_its_ratio():
    """The difference holds zero, being that of one fast seed; the ratio leaves out one."""
    value = {"value": 0.3, "interval": [-0.4, 1.0], "ratio": {"value": 5.1, "interval": [3.1, 8.4]}}
    metrics = words.Metrics({"prefix_matching": {"label": "prefix matching", "unit": "probability"}})
    assert words.clear(value) == 1
    told = "raised the prefix matching (times 5.1 [3.1, 8.4])"
    assert metrics.effect("prefix_matching", value).replace("\u00a0", " ") == told
    value["ratio"] = {"value": 0.5, "interval": [0.2, 0.9]}
    assert words.clear(value) == -1 and "lowered" in metrics.effect("prefix_matching", value)
    value["ratio"] = {"value": 2.0, "interval": [0.8, 5.0]}
    assert words.clear(value | {"interval": [0.1, 0.5]}) == 0
    one_seed = value | {"ratio": {"value": 5.12, "interval": None}}
    assert words.clear(one_seed) == 0
    assert "moved, times\u00a05.1 (no interval" in metrics.effect("prefix_matching", one_seed)
    # Close to one, two digits would not tell the ends apart.
    near = words.times({"value": 1.042, "interval": [1.013, 1.072]})
    assert near.replace("\u00a0", " ") == "times 1.042 [1.013, 1.072]"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.4, 2.7, [0.5, 1, 2]), (0.99, 1.21, [1, 1.05, 1.1, 1.15, 1.2]), (0.5, 5000, [1, 10, 100, 1000])],
)
def test_factors_have_round_ticks_at_their_logarithms(low, high, ticks):
    found = factor_ticks(math.log(low), math.log(high))
    assert [math.exp(place) for place, _ in found] == pytest.approx(ticks)
    assert [text for _, text in found] == [words.number(tick) for tick in ticks]


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
