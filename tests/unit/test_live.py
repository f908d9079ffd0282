"""The state of a run: what the terminal shows of many chains, and what others read of it in live.json."""

from __future__ import annotations

import io
import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.live import Line, Live, measured_words
from patterning_dist.progress import Progress
from patterning_dist.status import SILENCE, Status
from patterning_dist.storage.run import RunDirectory, read_state


def shown(live: Live, height: int, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(live.table(height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def many(num_subjects: int, num_chains: int) -> Live:
    lines = {
        f"layer.{s}.head.0 chain {c}": Line(10 + c, 40, 2.5) for s in range(num_subjects) for c in range(num_chains)
    }
    return Live(lines=lines)


def test_few_chains_have_a_row_each() -> None:
    live = many(1, 3)
    live.lines["layer.0.head.0 chain 1"] = Line(20, 40, healthy=False)
    lines = shown(live, 10)
    assert [line.split()[2] for line in lines[1:]] == ["1", "0", "2"]  # what failed stands first
    assert lines[1].endswith("failed")


def test_four_hundred_chains_fit_a_screen_and_the_worst_are_named() -> None:
    live = many(50, 8)
    live.lines["layer.7.head.0 chain 3"] = Line(20, 40, healthy=False)
    live.lines["layer.9.head.0 chain 5"] = Line(1, 40, 2.5)
    for chain in range(8):
        live.lines[f"layer.0.head.0 chain {chain}"] = Line(40, 40, 2.5)
    live.measured["layer.7.head.0"] = {"rhat": 1.5}
    lines = shown(live, 36)
    assert len(lines) == 37  # and the heading
    assert lines[1].startswith("layer.7.head.0") and lines[1].endswith("failed: chain 3; R-hat 1.50")
    (slow,) = [line for line in lines if line.startswith("layer.9.head.0 ")]
    assert slow.endswith("0 of 8 through; last: chain 5 at 1")
    assert lines[-1].strip() == "and 15 more"
    assert not any(line.startswith("layer.0.head.0 ") for line in lines)  # it is through
    assert max(map(len, lines)) <= 80


def test_arms_are_rows_of_seeds() -> None:
    live = Live(lines={f"{arm} seed {seed}": Line(5, 10) for arm in ("plus", "base") for seed in range(30)})
    assert [line.split()[:2] for line in shown(live, 8)[1:]] == [["plus", "150/300"], ["base", "150/300"]]


def test_progress_keeps_its_state_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, kept = [0.0], []
    monkeypatch.setattr("patterning_dist.progress.time.monotonic", lambda: clock[0])
    with (
        pytest.raises(ValueError),
        Progress(Console(file=io.StringIO(), width=80), keep=lambda state: kept.append(state)) as progress,
    ):
        progress.enter("sample")
        progress.start("sampling", 40)
        for second in range(1, 21):
            clock[0] = second / 4
            progress.update(second)
            progress.update_line("chain 1", done=second, total=40)
        progress.say("a word")
        progress.measured("head", rhat=1.25)
        raise ValueError("too bad")
    assert [state["done"] for state in kept] == [0, 8, 16, 20]
    last = Live.of_json(json.loads(json.dumps(kept[-1])))
    assert (last.stage, last.total, last.said, last.measured) == ("sample", 40, ["a word"], {"head": {"rhat": 1.25}})
    assert last.lines["chain 1"] == Line(20, 40)
    assert last.ended == "ValueError: too bad"


def run_with(folder: Path, live: Live, seconds_ago: float = 0.0) -> RunDirectory:
    run = RunDirectory(folder)
    run.update_manifest(stages={"train": {"status": "finished", "seconds": 12.4}, "sample": {"status": "started"}})
    run.keep_state(live.as_json())
    state = json.loads((folder / "live.json").read_text())
    time = datetime.fromisoformat(state["time"]) - timedelta(seconds=seconds_ago)
    (folder / "live.json").write_text(json.dumps(state | {"time": time.isoformat()}))
    return run


def said(folder: Path, *options: str, command: str = "status") -> str:
    result = CliRunner().invoke(app, [command, str(folder), *options], env={"COLUMNS": "100", "LINES": "30"})
    assert result.exit_code == 0, result.output
    return result.output


def test_status_of_a_run_at_work(tmp_path: Path) -> None:
    live = many(2, 2)
    live.stage, live.label, live.total, live.done, live.seconds_left = "sample", "sampling the posterior", 160, 42, 9.2
    live.measured = {"layer.0.head.0": {"llc": 1.234, "llc_error": 0.1, "rhat": 1.02, "ess": 80.0, "reliability": 0.4}}
    run_with(tmp_path, live, 3)
    text = said(tmp_path)
    for words in (
        "train finished 12",
        "sample started",
        "stage sample, its last word 3 s ago",
        "sampling the posterior: 42 of 160, 9 s left",
        "layer.1.head.0 chain 1 11/40 2.5000 healthy",
        "layer.0.head.0: LLC 1.23 ± 0.1, R-hat 1.02, effective draws 80, reliability of chi 0.40",
    ):
        assert words in " ".join(text.split())
    found = json.loads(said(tmp_path, "--json"))
    assert found["at_work"] and found["live"]["done"] == 42


def test_chains_that_stand_still_or_say_nothing_are_shown_too(tmp_path: Path) -> None:
    live = many(1, 9)
    live.measured = {"layer.0.head.0": {"llc": 1.0, "llc_error": float("nan"), "rhat": float("inf")}}
    live.lines["layer.0.head.0 chain 1"] = Line(3, 40, float("nan"), healthy=False)
    live.label = "sampling"
    run_with(tmp_path, live)
    assert "layer.0.head.0: LLC 1 ± not finite, R-hat not finite" in said(tmp_path)
    assert shown(Status.read(tmp_path).live or Live(), 3, 120)[1].endswith("R-hat not finite")


def test_a_directory_that_was_taken_away_does_not_come_back(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", Live())
    shutil.rmtree(run.path)
    run.keep_state(Live().as_json())
    assert not run.path.exists()


def test_a_driver_that_says_nothing_is_thought_to_be_gone(tmp_path: Path) -> None:
    run_with(tmp_path, Live(stage="sample", said=["chain 1 is left out"]), SILENCE + 5)
    text = " ".join(said(tmp_path).split())
    assert "has said nothing for 65 s: it is stopped, or gone; `patterning run" in text
    assert "sample begun, and nobody at it" in text
    assert "chain 1 is left out" in text


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    run_with(tmp_path, Live(ended="finished"))
    assert "ended 0 s ago: finished" in " ".join(said(tmp_path, command="watch").split())


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for command in ("status", "watch"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "no")])
        assert result.exit_code == 2
        assert "no: no run there, there is no manifest.json; give a run directory" in result.output
    assert not (tmp_path / "no").exists()
    run_with(tmp_path, Live())
    for spoilt, words in (
        ("[]", "holds no object; delete it"),
        ("{", "cannot be read"),
        ('{"time": 3}', "cannot be read"),
    ):
        (tmp_path / "live.json").write_text(spoilt)
        result = CliRunner().invoke(app, ["status", str(tmp_path)])
        assert result.exit_code == 2 and "live.json" in result.output and words in result.output


def test_a_status_needs_no_driver(tmp_path: Path) -> None:
    RunDirectory(tmp_path).update_manifest(stages={})
    assert read_state(tmp_path) == {}
    assert not Status.read(tmp_path).at_work
    assert measured_words({}) == ""
