"""What a run measures goes to experiment trackers: every point once, whenever and how often a run is followed.

With the libraries that are installed, in their offline modes; of others a stand-in says that our calls are those
that the adapter was written with, and no more: ``tests/tracker_libraries.py``.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from tracker_libraries import NAMES, READERS, Series, StandIn, configure, import_again, is_installed
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.errors import PatterningError
from patterning_dist.live import Line, Live
from patterning_dist.storage.files import write_parquet
from patterning_dist.storage.run import RunDirectory
from patterning_dist.trackers import follow

FOUND = {"llc": 1.5, "llc_error": 0.25, "rhat": 1.03, "ess": 80.0, "reliability": 0.5}


def make_run(folder: Path) -> RunDirectory:
    """A run whose baseline is trained, one of whose two subjects is done, and at which a driver is at work."""
    run = RunDirectory(folder)
    run.store_config("name: tiny\nsampling: {num_draws: 4}\n")
    run.event("train", "started")
    add_training(run, "baseline", [math.nan, 2.0])
    run.event("sample", "started")
    for subject in ("layer.0.head.0", "layer.0.head.1"):
        run.event("sample", "subject_started", subject=subject, chains=4)
    run.event("sample", "subject_finished", subject="layer.0.head.0", **FOUND)
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"time": "2026-\n')  # a driver was killed here
    run.update_manifest(stages={"train": {"status": "finished"}, "sample": {"status": "started"}})
    return run


def add_training(run: RunDirectory, name: str, losses: list[float]) -> None:
    (run.path / name).mkdir(parents=True)
    rows = [{"step": 10 * n, "validation_loss": loss, "seconds": 0.5 * n} for n, loss in enumerate(losses)]
    write_parquet(run.path / name / "metrics.parquet", pa.Table.from_pylist(rows))


def at_work(run: RunDirectory, ended: str | None = None) -> None:
    """Chains of the second subject half through, and a training that has no table yet."""
    lines = {f"layer.0.head.1 chain {c}": Line(c, 4, -0.5) for c in (1, 3)} | {"plus seed 0": Line(7, 20, 2.5)}
    measured = {"layer.0.head.0": FOUND, "layer.0.head.1": {"rhat": 1.25}}
    live = Live(stage="sample", label="sampling", done=4, total=16, lines=lines, measured=measured, ended=ended)
    run.keep_state(live.as_json())


EXPECTED = {
    **{f"{name}/layer.0.head.0": [value] for name, value in FOUND.items()},
    "progress/sample": [0.25],
    "progress/layer.0.head.1": [0.25],  # two of its four chains have not begun
    "progress/plus seed 0": [0.35],
    "loss/plus seed 0": [2.5],
    "rhat_of_loss/layer.0.head.1": [1.25],
    "validation_loss/baseline": [2.0],  # not the NaN before
}


def track(run: Path | str, tracker: str) -> str:
    result = CliRunner().invoke(app, ["track", str(run), "--to", tracker])
    assert result.exit_code == 0, result.output
    return result.output


def values(series: Series) -> dict[str, list[float]]:
    """Event files of TensorBoard are in float32."""
    return {name: [round(value, 5) for _, value in points] for name, points in series.items()}


@pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs
@pytest.mark.parametrize("name", NAMES)
def test_every_point_arrives_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    at_work(run, ended="finished")
    configure(monkeypatch, tmp_path)
    stand_in = None if is_installed(name) else StandIn(name, monkeypatch)

    def found() -> Series:
        return READERS[name](tmp_path) if stand_in is None else stand_in.series

    assert "11 new points" in track(run.path, name)
    first = found()
    assert values(first) == EXPECTED
    assert first["validation_loss/baseline"] == [(10, 2.0)] and first["loss/plus seed 0"] == [(7, 2.5)]
    assert "0 new points" in track(run.path, name) and found() == first
    add_training(run, "retrain/plus/seed-0", [3.0, 1.0])
    add_training(run, "retrain/online/seed-0/round-1", [5.0])
    assert "3 new points" in track(run.path, name)
    arms = {"validation_loss/plus/seed-0": [3.0, 1.0], "validation_loss/online/seed-0/round-1": [5.0]}
    assert values(found()) == EXPECTED | arms
    assert stand_in is None or not stand_in.open


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Series:
    """What a stand-in of trackio was sent."""
    return StandIn("trackio", monkeypatch).series


def test_a_run_at_work_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: Series) -> None:
    run = make_run(tmp_path)
    at_work(run)

    looks = iter(range(3))

    def later(_: float) -> None:
        match next(looks):
            case 0:
                monkeypatch.setattr("patterning_dist.status.SILENCE", 0.0)  # it says nothing, and is waited for
            case 1:
                run.event("sample", "subject_finished", subject="layer.0.head.1", **FOUND)
            case 2:
                at_work(run, ended="finished")

    monkeypatch.setattr(follow.time, "sleep", later)
    track(tmp_path, "trackio")
    assert values(sent)["llc/layer.0.head.1"] == [1.5]
    assert values(sent)["llc/layer.0.head.0"] == [1.5]
    assert all(step == sorted(set(step)) for step in ([step for step, _ in points] for points in sent.values()))


def test_another_experiment_is_another_run_of_the_tracker(tmp_path: Path, sent: Series) -> None:
    run = make_run(tmp_path)
    before = track(tmp_path, "trackio").split(":")[0]
    run.store_config("name: tiny\nsampling: {num_draws: 8}\n")
    after = track(tmp_path, "trackio").split(":")[0]
    assert before.startswith("tiny-") and after.startswith("tiny-") and before != after
    assert values(sent)["llc/layer.0.head.0"] == [1.5, 1.5]  # what is the same goes into either
    assert len(json.loads((tmp_path / "tracked/trackio.json").read_text())) == 2


def test_a_run_at_a_url_is_followed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: Series) -> None:
    monkeypatch.setenv("PATTERNING_CACHE", str(tmp_path / "cache"))
    make_run(tmp_path / "run")
    url = f"file://{tmp_path}/run"
    assert "6 new points" in track(url, "trackio") and "0 new points" in track(url, "trackio")
    assert not list((tmp_path / "cache").rglob("*.parquet"))  # read, not copied


def test_what_a_tracker_refuses_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: Series) -> None:
    make_run(tmp_path)

    def refuse(**_: object) -> None:
        raise OSError("no network\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["trackio"], "init", refuse)
        result = CliRunner().invoke(app, ["track", str(tmp_path), "--to", "trackio"])
    assert result.exit_code == 2
    assert "trackio: the tracker refuses (OSError: no network); put that right and run the same" in result.output
    assert not (tmp_path / "tracked").exists()
    import_again("trackio", monkeypatch)
    assert "6 new points" in track(tmp_path, "trackio")


def test_what_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    for name in NAMES:
        for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, module, None)
        import_again(name, monkeypatch)
        with pytest.raises(PatterningError, match=rf"^{name} cannot be imported .*install 'patterning-dist\[trackers"):
            follow.track(tmp_path, name, "patterning")


def test_what_cannot_be_followed_is_refused_in_a_line(tmp_path: Path, sent: Series) -> None:
    def refused() -> str:
        result = CliRunner().invoke(app, ["track", str(tmp_path), "--to", "trackio"])
        assert result.exit_code == 2 and len(result.output.splitlines()) == 1
        return result.output

    assert "no run there" in refused()
    RunDirectory(tmp_path).update_manifest(stages={})
    assert "nothing has been run there yet; start the run first" in refused()
    make_run(tmp_path)
    (tmp_path / "tracked").mkdir()
    for spoilt in ("{", "[]", '{"patterning": '):
        (tmp_path / "tracked/trackio.json").write_text(spoilt)
        assert "tracked/trackio.json: cannot be read" in refused()
    shutil.rmtree(tmp_path / "tracked")
    for file in ("baseline/metrics.parquet", "config.yaml"):
        before = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(before[:3])
        assert file in refused()
        (tmp_path / file).write_bytes(before)
    assert "6 new points" in track(tmp_path, "trackio")
