"""The report says what its numbers bear, survives a half-finished run and replaces its file in one step."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.report import build_report

sys.path.append(str(Path(__file__).parent))  # whatever the import mode of the tests
write_run = importlib.import_module("report_fixture").write_run
write_table = importlib.import_module("report_fixture_posterior").write_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def warnings_of(html: str) -> str:
    found = re.search(r'<aside class="warnings">(.*?)</aside>', html, re.S)
    return found[1] if found else ""


LABELS = ("Prefix matching", "Repeated gap")


class Reader(HTMLParser):
    """Tags that were opened, with their addresses, and the text of every element of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_a_finished_run_shows_every_section_and_no_problem(run):
    html = page(run)
    assert "Not run yet" not in html
    assert "all stages run" in html
    assert warnings_of(html).count("<li>") == 1  # the one that the summary itself gives
    assert html.count("<section id=") == 8
    assert html.count("<figure>") > 25


def test_the_page_needs_no_network_and_is_light(run):
    path = build_report(run)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert all(address.startswith("#") or address == "data:," for address in reader.addresses)
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert path.stat().st_size < 2_000_000


def test_tokens_are_text_never_markup(run):
    html = page(run)
    reader = Reader()
    reader.feed(html)
    assert reader.tags.count("script") == 1  # the page's own; the corpus is full of <script>
    assert "b" not in reader.tags  # so it is of <b>bold</b>
    assert "&lt;markup&gt;" in html and "&gt;" in html


@pytest.mark.parametrize("what", ["summary.name", "config", "reason", "warning", "observable"])
def test_names_from_files_are_escaped(run, what):
    bad = "<img src=x onerror=alert(1)>"
    if what in ("summary.name", "warning"):
        summary = json.loads((run / "summary.json").read_text())
        summary |= {"name": bad} if what == "summary.name" else {"warnings": [bad]}
        (run / "summary.json").write_text(json.dumps(summary))
    elif what == "config":
        (run / "config.yaml").write_text(bad)
    elif what == "reason":
        (run / "sampling/everything/chains.json").write_text(
            json.dumps([{"chain": 0, "healthy": False, "reason": bad}])
        )
    else:
        diagnostics = json.loads((run / "response/diagnostics.json").read_text())
        observables = diagnostics["subjects"]["everything"]["observables"]
        observables[bad] = observables.pop("rest_loss")
        (run / "response/diagnostics.json").write_text(json.dumps(diagnostics))
    html = page(run)
    assert "<img" not in html.lower()
    assert "onerror=alert(1)&gt;" in html


STAGES = {
    "headline": ["summary.json", "weights"],
    "arms": ["retrain"],
    "response": ["weights"],
    "weights": ["weights"],
    "susceptibilities": ["response"],
    "chains": ["sampling", "response"],
    "baseline": ["baseline"],
    "record": ["summary.json", "manifest.json", "config.yaml"],
}


@pytest.mark.parametrize("section", STAGES)
def test_a_missing_stage_is_one_line(run, section):
    for name in STAGES[section]:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    html = page(run)
    body = re.search(rf'<section id="{section}">(.*?)</section>', html, re.S)[1]
    assert "Not run yet." in body and "<figure>" not in body
    assert "partly finished" in html
    assert "cannot be" not in warnings_of(html)


def test_what_was_left_out_of_the_data_is_on_the_page(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert "have no effect" not in page(run)
    remark = "t.jsonl: columns that have no effect: <id>"
    (run / "manifest.json").write_text(json.dumps(manifest | {"remarks": [remark]}))
    record = re.search(r'<section id="record">(.*?)</section>', page(run), re.S)[1]
    assert "t.jsonl: columns that have no effect: &lt;id&gt;" in record


def test_an_empty_run_directory_makes_a_page(tmp_path):
    html = page(tmp_path)
    assert html.count("Not run yet.") == 8 and warnings_of(html) == ""


@pytest.mark.parametrize(
    "missing",
    [
        f.relative_to("x").as_posix()
        for f in map(
            Path,
            (
                "x/data/tokenizer.json",
                "x/data/train.parquet",
                "x/response/pool.parquet",
                "x/response/modes.parquet",
                "x/response/mode-tokens.parquet",
                "x/response/diagnostics.json",
                "x/weights/plus.parquet",
                "x/weights/solution.json",
                "x/baseline/evaluation.json",
                "x/summary.json",
                "x/retrain/plus/seed-1/metrics.parquet",
                "x/sampling/everything/traces.parquet",
                "x/sampling/everything/chains.json",
            ),
        )
    ],
)
def test_any_single_file_may_be_missing(run, missing):
    (run / missing).unlink()
    assert "cannot be" not in warnings_of(page(run))


@pytest.mark.parametrize(
    "path",
    [
        "summary.json",
        "weights/plus.parquet",
        "response/diagnostics.json",
        "data/tokenizer.json",
        "sampling/everything/chains.json",
    ],
)
def test_a_broken_file_is_named_at_the_top(run, path):
    (run / path).write_bytes(b'{"half": ')
    assert re.search(rf"{re.escape(path)} cannot be read .*run .* again\.", warnings_of(page(run)))


def test_a_file_of_an_unexpected_shape_costs_its_section_only(run):
    solution = json.loads((run / "weights/solution.json").read_text())
    solution["arms"]["plus"]["histogram"] = {"edges": "none", "counts": 3}
    (run / "weights/solution.json").write_text(json.dumps(solution))
    html = page(run)
    assert "“The weights” cannot be drawn" in warnings_of(html)
    assert '<section id="arms">' in html and "Prefix matching passes 0.1" in html


def contrast(run: Path, low: float, high: float, other: tuple[float, float] = (-0.4, -0.2)) -> str:
    """The lead sentence when plus-base has the interval given."""
    summary = json.loads((run / "summary.json").read_text())
    for name, (a, b) in {"base": (low, high), "permuted": other}.items():
        summary["contrasts"]["plus"][name]["induction_gap"] = {
            "value": (a + b) / 2,
            "interval": [a, b],
            "per_seed": [],
        }
    summary["contrasts"].pop("minus", None)
    (run / "summary.json").write_text(json.dumps(summary))
    return re.search(r'<p class="lead">(.*?)</p>', page(run), re.S)[1].replace("\u00a0", " ")


def test_the_sentence_follows_the_interval(run):
    assert "lowered the induction gap (−0.30 [−0.40, −0.20] nats) compared with base, as asked" in contrast(
        run, -0.4, -0.2
    )
    assert (
        "raised the induction gap" in (opposite := contrast(run, 0.2, 0.4)) and "opposite of what was asked" in opposite
    )
    assert (
        "had no clear effect on the induction gap" in (nothing := contrast(run, -0.1, 0.2))
        and "as asked" not in nothing
    )
    assert "but there is no clear difference against permuted" in contrast(run, -0.4, -0.2, other=(-0.2, 0.1))


@pytest.mark.parametrize(("low", "high", "is_said"), [(0.1, 0.3, True), (-0.1, 0.3, False)])
def test_what_was_to_be_held_and_moved_is_in_the_sentence(run, low, high, is_said):
    summary = json.loads((run / "summary.json").read_text())
    summary["contrasts"]["plus"]["base"]["rest_loss"] = {"value": (low + high) / 2, "interval": [low, high]}
    (run / "summary.json").write_text(json.dumps(summary))
    words = contrast(run, -0.4, -0.2)
    assert ("What was to stay unmoved was not: training raised the" in words) == is_said


def test_scores_are_compared_by_ratios_in_words_in_the_table_and_on_a_logarithmic_axis(run):
    summary = json.loads((run / "summary.json").read_text())
    score = summary["contrasts"]["plus"]["base"]["prefix_matching"]
    score |= {"value": 0.2, "interval": [-0.1, 0.5], "ratio": {"value": 4, "interval": [2, 8], "per_seed": [2, 8]}}
    (run / "summary.json").write_text(json.dumps(summary))
    html = section_of(page(run), "headline").replace("\u00a0", " ")
    assert "plus: the prefix matching times 4 [2, 8] against base, times" in html
    assert "0.40 [0.20, 0.60] of the effect of plus" in html  # of minus, in the line and in the table
    assert "<td>0.40 [0.20, 0.60]</td>" in html
    assert "Prefix matching: plus above base" in html
    assert "<td>times 4 [2, 8]; +0.20 [−0.10, 0.50]</td>" in html
    drawn = re.search(r"Ratios between arms in Prefix matching.*?</svg>", html, re.S)[0]
    tips = ("seed: 2", "times 4 .2, 8.", "seed: 8")
    places = [float(re.search(rf'cx="([\d.]+)"[^>]*{tip}"', drawn)[1]) for tip in tips]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.11)  # tenths of a unit are kept


def test_without_an_interval_a_ratio_claims_nothing(run):
    summary = json.loads((run / "summary.json").read_text())
    for value in summary["contrasts"]["plus"].values():
        value["prefix_matching"]["ratio"] |= {"interval": None, "per_seed": [3.0]}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "Prefix matching: plus ≈ base, plus ≈ permuted" in page(run)


def test_effect_against_cost_is_a_curve_for_every_row_of_scores(run):
    summary = json.loads((run / "summary.json").read_text())
    arms = {"weak": (0.02, -0.3, 2.0), "strong": (0.05, -0.9, 4.0), "told": (0.06, -3.0, 8.0)}
    for arm, (cost, gap, factor) in arms.items():
        ratio = {"value": factor, "interval": [0.8 * factor, 1.25 * factor]}
        summary["contrasts"][arm] = {
            "base": {
                "validation_loss": {"value": cost, "interval": [cost - 0.01, cost + 0.01]},
                "repeated_gap": {"value": gap, "interval": None},
                "prefix_matching": {"value": 0.1, "interval": [0, 0.2], "ratio": ratio},
            }
        }
    points = [{"arm": arm, "strength": s, "share": share} for arm, s, share in (("weak", 0.5, 0.9), ("strong", 1, 0.7))]
    told = [{"arm": "told", "strength": 1, "share": None}]
    summary["frontier"] = {
        "cost": "validation_loss",
        "effects": ["prefix_matching", "repeated_gap", "absent"],
        "rows": {"base": {"plus": points, "oracle": told}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    html = section_of(page(run), "headline").replace("\u00a0", " ")
    assert "against its cost: plus times 4 for +0.05, oracle times 8 for +0.06</figcaption>" in html
    assert "against its cost: plus −0.9 for +0.05, oracle −3 for +0.06</figcaption>" in html
    score, gap = (re.search(rf'aria-label="{name} against the.*?</svg>', html, re.S)[0] for name in LABELS)
    for drawn in (score, gap):
        x = [float(x) for x in re.findall(r"[ML]([\d.]+)", re.search(r'curve arm-plus thick" d="(.*?)"', drawn)[1])]
        assert len(x) == 3 and (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(1.5, abs=0.01)  # from the plain arm on
        assert 'data-tip="strong: ' in drawn and ">0.7</text>" in drawn
    heights = [float(y) for y in re.findall(r'class="dot [^"]*" cx="[\d.]+" cy="([\d.]+)"', score)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)  # factors of 2, equally far apart
    # Costs have intervals everywhere, effects where there are some: a line and two ends each.
    assert ".arm-own-oracle { --arm: var(--other-1); }" in page(run).partition("</style>")[0]
    assert score.count('class="span') == 2 * 3 * 3 and gap.count('class="span') == 3 * 3
    summary["frontier"] = {}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "against its cost" not in page(run)


def test_times_to_the_circuit_are_curves_and_a_table(run):
    summary = json.loads((run / "summary.json").read_text())
    found = summary["time_to_event"]
    found["plus"]["against"]["base"]["hazard_ratio"] = {"value": None, "interval": [1.9, None]}
    found["minus"]["against"]["base"]["hazard_ratio"] = {"value": 0, "interval": [0, 0.4]}
    found["permuted"]["against"]["base"] = {"chi2": None, "p": None, "hazard_ratio": {"value": None, "interval": None}}
    (run / "summary.json").write_text(json.dumps(summary))
    html = section_of(page(run), "arms").replace("\u00a0", " ")
    assert "half of the runs have an induction head: base 2,400, plus 2,400" in html
    assert "<td>2,400 [2,400, not reached]</td>" in html
    rows = {row[1]: row[2] for row in re.finditer(r"<td>(\w+)</td><td>1 of 2</td>(.*?)</tr>", html, re.S)}
    assert "<td>χ² 4, p = 0.045</td><td>above 1.9</td>" in rows["plus"]
    assert "below 0.4" in rows["minus"]
    assert rows["permuted"].count("<td>–</td>") == rows["base"].count("<td>–</td>") == 2
    drawn = re.search(r"Share of runs without an induction head.*?</svg>", html, re.S)[0]
    y = re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'curve arm-base thick" d="(.*?)"', drawn)[1])
    assert len(y) == 4 and y[0] == y[1] != y[2] == y[3]
    summary.pop("time_to_event")
    (run / "summary.json").write_text(json.dumps(summary))
    assert "half of the runs" not in page(run)


def test_what_heads_carry_is_drawn_and_claimed_no_further_than_the_intervals_go(run):
    summary = json.loads((run / "summary.json").read_text())

    def rises(own: float, other: float, width: float) -> dict:
        values = {"induction_head": own, "other_heads": other, "difference": own - other}
        return {name: {"value": value, "interval": [value - width, value + width]} for name, value in values.items()}

    summary["head_ablations"] = {"plus": rises(1.2, 0.1, 0.5), "base": rises(0.2, 0.1, 0.5)}
    (run / "summary.json").write_text(json.dumps(summary))
    html = section_of(page(run), "arms").replace("\u00a0", " ")
    assert "carries more of the gap than others of its layer in plus</figcaption>" in html
    assert "<td>plus</td><td>+1.2 [0.7, 1.7]</td><td>+0.1 [−0.4, 0.6]</td><td>+1.1 [0.6, 1.6]</td>" in html
    assert html.index("base: top head") < html.index("plus: other heads")
    summary["head_ablations"].pop("plus")
    (run / "summary.json").write_text(json.dumps(summary))
    assert "In no arm does the head" in section_of(page(run), "arms")


def test_transition_steps_are_those_of_the_summary_or_else_of_the_curves(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["transition_steps"] = {"plus": [1234, None], "base": [None, None]}
    (run / "summary.json").write_text(json.dumps(summary))
    html = page(run)
    assert "<td>1,234</td><td>not reached</td>" in html
    assert "passes 0.1 in 0 of 2 base and 1 of 2 plus runs" in html
    (run / "summary.json").unlink()
    table = pq.read_table(run / "retrain/plus/seed-0/metrics.parquet").to_pydict()
    first = next(s for s, v in zip(table["step"], table["prefix_matching"], strict=True) if v > 0.1)
    assert f"<td>plus</td><td>{first:,}</td>" in page(run)


def test_folders_of_what_is_asked_for_no_longer_are_not_read(run):
    """Lowered rounds, strengths, arms and seeds leave theirs behind."""
    summary = json.loads((run / "summary.json").read_text())
    sampled = json.loads((run / "response/diagnostics.json").read_text())["subjects"]
    summary["chains"] = {name: {} for name in (*sampled, "check/everything@+1")}
    (run / "summary.json").write_text(json.dumps(summary))
    shutil.copytree(run / "sampling/everything", run / "sampling/check/everything@+1")
    wanted = page(run)
    assert "check/everything@+1" in section_of(wanted, "chains")
    shutil.copytree(run / "sampling/everything", run / "sampling/check/everything@+2")
    shutil.copytree(run / "sampling/everything", run / "sampling/retrain/plus/seed-0/round-1/everything")
    shutil.copytree(run / "retrain/plus", run / "retrain/gone")
    shutil.copytree(run / "retrain/plus/seed-0", run / "retrain/plus/seed-7")
    assert page(run) == wanted


def test_rhat_and_ess_are_flagged_with_what_to_turn(run):
    html = page(run)
    assert "⚑ 1.080" in html and "⚑ 84" in html and "⚑ 1.020" not in html
    assert "R-hat above 1.05 in layer.0.head.1, layer.1.head.0 and layer.1.head.1" in html and "burn_in" in html
    assert "loss became NaN at step 212" in html


def test_nothing_is_said_of_chains_whose_state_is_unknown(run):
    for path in [*run.glob("sampling/*/chains.json"), run / "response/diagnostics.json"]:
        path.unlink()
    html = page(run)
    assert "everything: loss" in html
    assert "No chain was left out" not in html and "Every observable has" not in html


def test_probe_tokens_of_another_split_are_not_matched_by_their_ids(run):
    def scatter(html: str) -> int:
        return html.count("the estimators agree with r =")

    assert scatter(page(run)) == 2
    train, validation = run / "data/train.parquet", run / "data/validation.parquet"
    train.rename(run / "data/swap"), validation.rename(train), (run / "data/swap").rename(validation)
    html = page(run)
    assert scatter(html) == 0
    # The text of the modes' tokens is found in the other split.
    assert re.search(r'Mode 0: highest and lowest scores</h3>\s*<div[^>]*><table class="lines"', html)


def test_the_page_replaces_the_old_one_in_one_step(run, monkeypatch):
    path = build_report(run)
    assert path == run / "report.html"
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PatterningError, match=r"report\.html: cannot be written \(disk full\)"):
        build_report(run)
    assert path.read_bytes() == before
    assert not list(run.glob(".report*"))


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(
        PatterningError, match=r"nowhere is not a run directory; give the folder that holds config\.yaml"
    ):
        build_report(tmp_path / "nowhere")


def test_a_study_says_in_a_sentence_what_is_meaningless_and_shows_the_rest(run):
    for stage in ("weights", "check", "retrain", "baseline"):
        shutil.rmtree(run / stage)
    (run / "response/pool.parquet").unlink()
    config = {"model": {"path": "somewhere"}, "training": None, "solve": None, "check": None, "retrain": None}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "summary.json").write_text(json.dumps({"name": "study", "warnings": []}))
    html = page(run)
    assert "Not run yet" not in html and "all stages run" in html and warnings_of(html) == ""
    for sentence in (
        "it asks for no weights and trains no arms",
        "no section retrain, so no model is trained",
        "no response is predicted",
        "so there are no weights",
        "The checkpoint was given, not trained here.",
    ):
        assert sentence in html
    assert "Local learning coefficient of every subject" in html
    assert re.findall(r'<section id="(\w+)">', html)[:3] == ["susceptibilities", "chains", "record"]


def test_samples_without_tokens_go_by_their_numbers(run):
    """As a classifier of the user's own writes them: one loss a sample, no text, two checkpoints."""
    shutil.rmtree(run / "data")
    for table in ("plus", "minus", "permuted"):
        write_table(run / f"weights/{table}.parquet", {"sample_id": np.arange(30), "weight": np.linspace(0, 2, 30)})
    shutil.rmtree(run / "response")
    chi = np.linspace(-1, 1, 30)
    columns = {"sample_id": np.arange(30), "domain": ["digits"] * 30, "chi_margin": chi, "se_margin": chi * 0 + 0.25}
    for checkpoint in ("early", "final"):
        write_table(run / f"response/{checkpoint}/susceptibility-everything.parquet/part-00000.parquet", columns)
    html = page(run)
    assert warnings_of(html).count("<li>") == 1
    assert "<td>early/everything</td><td>margin</td><td>30</td>" in html
    assert "<td>29</td><td>digits</td><td>+1 ± 0.25</td>" in html and "final/everything: highest" in html
    assert "Plus: most up-weighted samples" in html and "<td>29</td><td>2.00</td>" in html
    assert "two attention heads or more" in html


def section_of(html: str, name: str) -> str:
    return re.search(rf'<section id="{name}">(.*?)</section>', html, re.S)[1].replace("\u00a0", " ")


def test_the_check_stands_between_prediction_and_outcome(run):
    body = section_of(page(run), "response")
    row = re.search(r"<td>plus</td><td>induction_gap</td>(.*?)</tr>", body)[1]
    assert row.index("−0.050 [−0.066, −0.034]") < row.index("−0.040 [−0.052, −0.028]")
    assert "checked: " in body and "Chains of everything under plus weights" in body
    (run / "check/response.json").unlink()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"checked": {}}))
    assert "checked: " not in section_of(page(run), "response")


def test_slopes_at_zero_stand_beside_chi(run):
    body = section_of(page(run), "response")
    row = re.search(r"<td>Induction gap</td>(<td>−0.050 .*?)</tr>", body)[1]
    cells = ["−0.050 [−0.066, −0.034]", "−0.0450 [−0.0489, −0.0411]", "0.9", "+0.7", "agrees"]
    assert re.findall("<td>(.*?)</td>", row) == cells
    assert "at 0.1 and −0.1 times the weights" in body
    assert "induction gap: chi: −0.050 [−0.066, −0.034]" in body and "induction gap: checked: −0.0450" in body
    title = re.search(r"Slope at strength 0 against chi; (.*?)<", body)[1]
    assert "the induction gap" in title and title.endswith(": agrees")
    # Of what chi says nothing there is the measurement alone.
    row = re.search(r"<td>Loss</td>(.*?)</tr>", body)[1]
    assert re.findall("<td>(.*?)</td>", row) == ["–", "+0.0120 [0.0100, 0.0140]", "–", "–", "–"]
    assert "loss: checked: +0.0120" in body and "loss: chi" not in body.replace("rest loss: chi", "")
    checked = json.loads((run / "check/response.json").read_text())
    (run / "check/response.json").write_text(json.dumps(checked | {"slopes": {}}))  # strengths of one sign
    assert "Slope" not in section_of(page(run), "response")


def test_terms_of_a_difference_stand_beside_it(run):
    body = section_of(page(run), "response")
    row = re.search(r"<td>plus</td><td>induction_gap:rest</td>(.*?)</tr>", body)[1]
    headers = re.search(r"<th>arm</th><th>observable</th>(.*?)</tr>", body)[1]
    assert re.findall("<th>(.*?)</th>", headers) == ["solved", "cross-fitted", "predicted", "checked", "realised"]
    assert re.findall("<td>(.*?)</td>", row) == ["–", "–", "+0.57 [0.47, 0.67]", "–", "+0.570 [0.531, 0.609]"]
    assert "rest: predicted: +0.57" in body  # what the pointer tells
    for kind in ("solved", "cross_fitted", "predicted", "checked"):  # any of them may be missing
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {kind: {}}))
        shown = re.search(r"<th>arm</th><th>observable</th>(.*?)</tr>", section_of(page(run), "response"))[1]
        assert f"<th>{kind.replace('_', '-')}</th>" not in shown and shown.endswith("<th>realised</th>")


def test_the_headline_is_one_row_an_arm_and_target(run):
    body = section_of(page(run), "headline")
    assert body.index("<table>") < body.index('class="lead"') < body.index("<figure>")
    row = re.findall("<td>(.*?)</td>", re.search(r"<tbody>\s*<tr>(.*?)</tr>", body)[1])
    assert row[:2] == ["plus", "the induction gap down"]
    assert row[2] == "−0.050 [−0.066, −0.034] at share 0.5"
    assert row[3] == "outside the window, no prediction (1)"
    assert "(1) outside the window, no prediction: it starts from initialisation." in body
    assert row[4] == "−0.040 [−0.052, −0.028]"
    assert row[6:] == ["induction −0.160 [−0.199, −0.121], rest +0.570 [0.531, 0.609]", "+0.450 [0.411, 0.489]"]
    assert "solved chains; checked chains; realised seeds and held-out samples." in body
    summary = json.loads((run / "summary.json").read_text())
    summary["contrasts"]["plus"]["base"] |= {"induction_gap:rest": {"value": 0.57, "interval": [0.5, 0.64]}}
    summary["headline"][0]["realised"]["interval"] = None  # of one seed
    (run / "summary.json").write_text(json.dumps(summary))
    body = section_of(page(run), "headline")
    assert "compared with base, of which rest +0.57 [0.50, 0.64]" in body and "(no interval)</td>" in body


def test_what_no_row_has_is_no_column_of_the_headline(run):
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["headline"]:
        row |= {"predicted": {"missing": "stage predict was not asked for"}}
    (run / "summary.json").write_text(json.dumps(summary))
    body = section_of(page(run), "headline")
    assert "<th>predicted</th>" not in body and "<th>realised</th>" in body
    assert "Not predicted: stage predict was not asked for." in body


def test_what_was_not_asked_for_is_not_judged(run):
    path = run / "weights" / "solution.json"
    solution = json.loads(path.read_text())
    solution["arms"]["plus"]["target"] = {"free_energy": 1.0}
    path.write_text(json.dumps(solution))
    summary = json.loads((run / "summary.json").read_text())
    summary["headline"][0] |= {"asked": None}
    (run / "summary.json").write_text(json.dumps(summary))
    lead = re.search(r'class="lead">(.*?)</p>', section_of(page(run), "headline"))[1]
    assert "With the plus weights, of which that was not asked, training" in lead
    assert "as asked" not in lead.split("With the minus")[0] and "opposite" not in lead.split("With the minus")[0]


def test_a_cost_that_was_held_and_metrics_of_a_window_are_told(run):
    path = run / "weights" / "solution.json"
    solution = json.loads(path.read_text())
    overall = {"value": 0.0123, "interval": [0.0081, 0.0165]}
    tried = [[0.25, 0.0165], [0.5, 0.07], [1.0, None]]
    solution["arms"]["plus"]["cost"] = {"scale": 0.25, "max_cost": 0.017, "overall": overall, "tried": tried}
    path.write_text(json.dumps(solution))
    (run / "predict").mkdir(exist_ok=True)
    metrics = {"prefix_matching": {"value": 0.037, "interval": [0.031, 0.043]}}
    entry = {"outside": None, "observables": {}, "metrics": metrics}
    (run / "predict" / "response.json").write_text(json.dumps({"arms": {"plus": entry}}))
    html = page(run)
    assert "Plus is scaled to 0.25 of what was solved for" in html and "end is held to 0.017; 3 strengths" in html
    table = html[html.index("Metrics where the windows lead") :]
    assert "the very samples" in table[:200] and "+0.037\u00a0[0.031,\u00a00.043]" in table


def test_controls_are_named_in_words(run):
    path = run / "weights" / "solution.json"
    solution = json.loads(path.read_text())
    assert "controls are made of" not in section_of(page(run), "weights")
    plus = solution["arms"]["plus"]
    replicates = {"reliability": 0.71, "replicates": {"of": "chains", "number": 3}}
    for name, entry in {
        "aligned": {"control": {"kind": "gradient", "split": "induction"}},
        "by_chains": {"control": {"kind": "first_moment", "draws": "chains"}, **replicates},
        "dealt": {"control": {"kind": "permuted", "within": "token"}},
        "earlier": {"control": {"kind": "loss_contrast", "checkpoint": "initialisation"}},
        "influential": {
            "control": {"kind": "influence", "split": "rest"},
            "conjugate_gradients": {"num_iterations": 7, "relative_residual": 0.25, "negative_curvature": True},
        },
        "nothing": {"control": {"kind": "ablation"}},
        "oracle": {"control": {"kind": "split", "split": "rest"}},
    }.items():
        solution["arms"][name] = {"histogram": plus["histogram"], "effective_sample_share": 0.8} | entry
    path.write_text(json.dumps(solution | {"subject": "layer.1.head.3"}))
    words = re.sub("<[^>]*>|\u00a0", " ", section_of(page(run), "weights"))
    for said in (
        "What the controls are made of, within the bounds and at the effective share of plus",
        "gradient over layer.1.head.3 with that of the held-out loss induction, at the checkpoint, without draws",
        "from draws of the chains; scores from 3 chains repeat from half to half of them with r = 0.71",
        "the weights of plus, dealt to other losses of the same token",
        "how much larger each loss is at initialisation than at the checkpoint that is sampled",
        "how far each loss rises where layer.1.head.3 is set to 0",
        "gradient over layer.1.head.3 with the damped inverse Hessian of that of the split, at the checkpoint, without",
        "it is told the split (7 products, residual 0.25, stopped at negative curvature)",
        "the losses that the split rest names, without any posterior: an oracle",
    ):
        assert said in words.replace("&#x27;", "'"), said
    assert "Histogram of dealt weights" not in page(run)  # it is that of plus


@pytest.mark.parametrize(("reliability", "is_drawn"), [(0.2, False), (0.5, True)])
def test_modes_of_noise_are_called_noise(run, reliability, is_drawn):
    diagnostics = json.loads((run / "response/diagnostics.json").read_text())
    diagnostics["modes"]["baseline"]["observable"] = "rest_loss"
    diagnostics["subjects"]["layer.1.head.0"]["observables"]["rest_loss"]["reliability"] = reliability
    (run / "response/diagnostics.json").write_text(json.dumps(diagnostics))
    html = section_of(page(run), "susceptibilities")
    assert ("The first mode over heads carries" in html) == is_drawn
    assert ("The modes over heads are mostly noise and not drawn" in html) != is_drawn
