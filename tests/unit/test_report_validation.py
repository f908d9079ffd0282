"""The section on attribution says what the intervals bear, and warns where random scores predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patterning_dist.report import build_report


def estimate(value: float, width: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - width, value + width], "covers": ["subsets", "queries"]}


def found(random: float) -> dict[str, Any]:
    methods = {
        name: {
            "lds": estimate(value, 0.1) | {"interval_over_subsets": [value - 0.05, value + 0.05]},
            "qld": estimate(value / 10, 0.01),
        }
        for name, value in {"random": random, "bm25": 0.05, "influence": 0.4}.items()
    }
    return {
        "start": "baseline",
        "num_samples": 400,
        "num_subsets": 40,
        "num_removed": [200, 200],
        "num_queries": 16,
        "passes": 2.0,
        "removed_share": 0.02,
        "removed_token_share": None,
        "agreement": estimate(0.5, 0.1),
        "ceiling": 0.816,
        "methods": methods,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: x\nvalidation: {num_steps: 3}\n")
    (tmp_path / "validate").mkdir()
    return tmp_path


def page(run: Path, random: float) -> str:
    (run / "validate" / "summary.json").write_text(json.dumps(found(random)))
    return build_report(run).read_text(encoding="utf-8")


def test_methods_whose_interval_is_above_zero_predict(run: Path) -> None:
    html = page(run, 0.01)
    assert "influence predicts retrainings" in html
    assert "perfect scores would come to 0.816" in html and "QLD removes 2 % of the samples" in html
    rows = [html.index(f"<td>{name}</td>") for name in ("influence", "bm25", "random")]
    assert rows == sorted(rows)


def test_random_scores_that_predict_are_a_warning(run: Path) -> None:
    assert "Random scores differ from 0: the bank is not to be trusted" in page(run, 0.3)


def test_what_is_not_asked_for_is_not_on_the_page(run: Path) -> None:
    assert "Stage validate has not been run." in build_report(run).read_text(encoding="utf-8")
    (run / "config.yaml").write_text("name: x\n")
    assert "Attribution, measured" not in build_report(run).read_text(encoding="utf-8")
