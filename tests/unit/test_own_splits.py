"""A split loss may be a function of the user's own, columns -> mask or signs; its code is an input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from language_targets import Sequences, language_task, whole_sets
from tokenizers import Tokenizer, models, pre_tokenizers

from patterning_dist.config import load_config
from patterning_dist.errors import PatterningError
from patterning_dist.tasks.held_out import held_out_splits
from patterning_dist.tasks.splits import split_terms
from patterning_dist.training.job import TrainingJob

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(4)
TOKENS = RNG.integers(0, 31, (12, 7))
DOMAINS = np.array(["a", "b", "b"], object)[np.arange(12) % 3]
FUNCTIONS = """
import numpy as np
def small(columns): return columns["token"] < 10
def signed(columns): return np.sign(columns["token"] - 15)
def of_b(columns): return np.where(columns["domain"] == "b", 2.5, -1)
def words(columns): return columns["text"] == "w3"
def raises(columns): return columns["nothing"]
def short(columns): return np.zeros(3)
def nan(columns): return np.full(12, np.nan)
def text(columns): return np.full(12, "x")
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``own_splits`` on the path, new for every test."""
    file = tmp_path / "own_splits.py"
    file.write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_splits", raising=False)
    return file


def task(counted=None):
    found = language_task(TOKENS[:4], TOKENS, domains=DOMAINS)
    found.held_out["held_out"].mask = counted
    return found


def value(function: str, losses: np.ndarray, counted: np.ndarray | None = None, part: str = "observed") -> list[float]:
    """The split on given losses."""
    opened = task(counted)
    found = held_out_splits(opened, whole_sets(opened), {"own": f"own_splits:{function}"}, part)
    return (found.coefficients * torch.from_numpy(losses)).sum(dim=(1, 2)).tolist()


def test_a_mask_is_a_mean_and_signs_are_a_difference_of_means() -> None:
    losses, token = RNG.normal(size=(12, 6)), TOKENS[:, 1:]
    assert value("small", losses) == pytest.approx([losses[token < 10].mean()])
    expected = losses[token > 15].mean() - losses[token < 15].mean()
    assert value("signed", losses) == pytest.approx([expected])
    found = value("signed", losses, part="predicted")
    assert found[:2] == pytest.approx([expected, losses[token > 15].mean()])


def test_a_value_a_sample_counts_for_all_its_losses_and_what_does_not_count_is_left_out() -> None:
    losses, counted = RNG.normal(size=(12, 6)), RNG.random((12, 6)) < 0.7
    of_b = (DOMAINS == "b")[:, None]
    expected = losses[of_b & counted].mean() - losses[~of_b & counted].mean()
    assert value("of_b", losses, counted)[0] == pytest.approx(expected)


def test_tokens_come_with_their_text_where_the_run_cut_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "data").mkdir()
    tokenizer.save(str(tmp_path / "data" / "tokenizer.json"))
    opened = task()
    opened.folder = tmp_path
    [(sign, mask)] = split_terms(opened, "own_splits:words", opened.held_out["held_out"], np.arange(12))
    np.testing.assert_array_equal(mask, TOKENS[:, 1:] == 3)
    assert sign == 1


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "raised KeyError: 'nothing'; it gets the columns sequence_id, domain, document, token"),
        ("short", r"returned float64 of shape \[3\]; expected booleans or finite numbers of shape \[12\] or \[12, 6\]"),
        ("nan", "expected booleans or finite numbers"),
        ("text", "expected booleans or finite numbers"),
        ("missing", "cannot be loaded"),
    ],
)
def test_what_is_no_split_is_refused(function: str, said: str) -> None:
    with pytest.raises(PatterningError, match=said):
        split_terms(task(), f"own_splits:{function}", Sequences(TOKENS, DOMAINS), np.arange(12))


def test_a_training_that_reports_it_is_another_when_its_file_changes(own: Path) -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    plain = TrainingJob(name="x", folder=own.parent, inputs=None, seed=0, num_steps=2, splits=(("a", "domain:x"),))
    job = TrainingJob(
        name="x", folder=own.parent, inputs=None, seed=0, num_steps=2, splits=(("a", "own_splits:small"),)
    )
    before = plain.fingerprint(config), job.fingerprint(config)
    own.write_text(FUNCTIONS.replace("< 10", "< 11"))
    assert plain.fingerprint(config) == before[0]
    assert job.fingerprint(config) != before[1]
