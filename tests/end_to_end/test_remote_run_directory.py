"""A run kept at a URL: a machine without a cache goes on where a lost one stopped, and one driver has it at a time."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import s3_server
from typer.testing import CliRunner

import patterning_dist.storage.lease
from patterning_dist.cli import app
from patterning_dist.errors import PatterningError
from patterning_dist.storage.cell import open_cell
from patterning_dist.storage.files import write_text
from patterning_dist.storage.lease import FREE, NAME, lease_at
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import RunDirectory, read_manifest
from patterning_dist.storage.store import open_storage

BEAT = 0.3
# A driver: takes the run, finishes stage prepare, begins stage train, and waits.
DRIVER = f"""
import sys, time
import patterning_dist.storage.lease
from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import write_text
from patterning_dist.storage.run import RunDirectory

patterning_dist.storage.lease.BEAT = {BEAT}
try:
    with RunDirectory(sys.argv[1]).locked() as run:
        if not run.is_done("prepare", "p"):
            with run.stage("prepare", "p") as outputs:
                outputs.append(run.path / "data" / "tokens")
                write_text(outputs[0], "tokens")
        with run.stage("train", "t") as outputs:
            write_text(run.path / "baseline" / "model", "half a")
            print("training", flush=True)
            time.sleep(600)
except PatterningError as error:
    sys.exit(f"refused: {{error}}")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/far/run"
    return request.getfixturevalue("server").format(tmp_path.name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go on at the machine of that name, which has a cache of its own."""
    monkeypatch.setattr(patterning_dist.storage.lease, "BEAT", BEAT)

    def go_to(name: str) -> None:
        monkeypatch.setenv("PATTERNING_CACHE", str(tmp_path / name))

    go_to("first")
    return go_to


def kinds(run: RunDirectory) -> list[tuple[str, str]]:
    events = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return [(event["stage"], event["kind"]) for event in events]


@contextlib.contextmanager
def started_driver(url: str) -> Iterator[subprocess.Popen[str]]:
    """A process of DRIVER that has got as far as it goes."""
    command = [sys.executable, "-c", DRIVER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout.readline() == "training\n", driver.stderr.read()
            yield driver
        finally:
            driver.kill()


def test_a_new_machine_goes_on(url: str, machine: Callable[[str], None]) -> None:
    with RunDirectory(url).locked() as run:
        first = run.path
        run.store_config("seed: 1\n")
        for stage, name in (("prepare", "data/tokens"), ("train", "baseline/model")):
            with run.stage(stage, stage) as outputs:
                outputs.append(run.path / name)
                write_text(outputs[0], f"of {stage}")
        with pytest.raises(ValueError), run.stage("sample", "sample"):
            write_text(run.path / "sampling" / "half", "half")
            raise ValueError("why")
    machine("second")
    assert read_manifest(url)["stages"]["train"]["outputs"] == {"baseline/model": 8}
    with RunDirectory(url).locked() as run:
        assert run.path != first
        assert run.store_config("seed: 2\n") == ["seed"], "config.yaml has come along"
        assert [run.is_done(s, s) for s in ("prepare", "train", "sample")] == [True, True, False]
        assert not run.is_done("train", "of other inputs")
        assert (run.path / "data" / "tokens").read_text() == "of prepare"
        assert (run.path / "baseline" / "model").read_text() == "of train"
        assert ("sample", "failed") in kinds(run)
        run.storage.delete("data/tokens")
        assert not run.is_done("prepare", "prepare"), "the working copy does not count"
        with run.stage("prepare", "prepare") as outputs:  # finds its file there, as a resumed stage does
            outputs.append(run.path / "data" / "tokens")
        assert run.is_done("prepare", "prepare")
        assert run.storage.read("data/tokens") == b"of prepare"


def test_a_killed_driver_is_followed_and_a_living_one_is_not(
    url: str, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with started_driver(url) as driver:
        jumps = iter(range(0, 10**9, 10**6))
        monkeypatch.setattr(time, "time", lambda: float(next(jumps)))  # a clock that is set forward all the time
        with (
            pytest.raises(PatterningError, match=rf"{driver.pid} on .*wait for it or stop it, .*--run-dir") as caught,
            RunDirectory(url).locked(),
        ):
            raise AssertionError("two drivers have the same run")
        assert str(caught.value).startswith(f"{url.partition('?')[0]}: in use by another driver (pid ")
        driver.kill()
    with RunDirectory(url).locked() as run:
        assert run.is_done("prepare", "p")
        assert run.manifest["stages"]["train"]["status"] == "started"
        assert not (run.path / "baseline" / "model").exists(), "what was not published does not count"
        assert re.search(
            rf"held by another driver \(pid {driver.pid} on .*silent; taken over in", capsys.readouterr()[1]
        )
    assert open_storage(url).read(NAME) == FREE


def test_a_driver_that_was_thought_dead_stops(url: str, machine: Callable[[str], None]) -> None:
    storage = open_storage(url)
    with started_driver(url) as driver:
        # Between two beats: one that is held up halfway and then ends takes the lease back, and the other driver stops.
        beat = storage.read(NAME)
        while storage.read(NAME) == beat:
            time.sleep(0.01)
        driver.send_signal(signal.SIGSTOP)
        with RunDirectory(url).locked() as run:
            before = run.manifest
            driver.send_signal(signal.SIGCONT)
            _, refusal = driver.communicate(timeout=60)
            assert re.search(r"refused: .*: another driver \(pid \d+ on .*\) has taken this run over", refusal)
            assert driver.returncode == 1
            assert run.manifest == before, "nothing was written after the take-over"
            run.event("train", "goes on")  # the one that went wrong has not taken the lease along


def test_one_of_those_that_start_at_once_has_the_run(url: str, machine: Callable[[str], None]) -> None:
    storage, start = open_storage(url), threading.Barrier(4)
    place = re.escape(str(storage))
    won, refused = [], []

    def take() -> None:
        lease = lease_at(url, storage)
        start.wait()
        try:
            lease.take()
        except PatterningError as error:
            refused.append(str(error))
        else:
            won.append(lease)

    drivers = [threading.Thread(target=take) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert (len(won), len(refused)) == (1, 3)
    assert all(re.match(rf"{place}: in use by another driver \(pid ", error) for error in refused)
    won[0].confirm()
    won[0].release()


def test_the_store_lets_one_of_two_that_saw_the_same(server: str, tmp_path: Path) -> None:
    """However late the other writes: there is no time within which both have it."""
    url = server.format(tmp_path.name)
    quick, slow = (open_cell(url, open_storage(url), NAME, settle=0) for _ in range(2))
    assert quick.read() is slow.read() is None
    first = quick.write(b"1", None)
    assert slow.write(b"2", None) is None
    seen = slow.read()
    assert seen == first and seen.content == b"1"
    second = quick.write(b"3", first)
    assert slow.write(b"4", seen) is None, "changed since"
    assert quick.read() == second and second.content == b"3"
    open_storage(url).delete(NAME)
    assert quick.write(b"5", second) is None, "removed since"
    assert quick.read() is None


def test_elsewhere_the_last_of_them_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two found no lease; the slow one of them writes when the quick one has written already."""
    url = f"file://{tmp_path}/far"
    storage = open_storage(url)
    quick, slow = (open_cell(url, storage, NAME, settle=0) for _ in range(2))
    monkeypatch.setattr("patterning_dist.storage.cell.time.sleep", lambda seconds: storage.write(NAME, b"slow"))
    assert quick.write(b"quick", None) is None
    assert slow.write(b"slow", slow.read()) is not None


def test_a_run_that_is_removed_at_its_url_stops(url: str, machine: Callable[[str], None]) -> None:
    with (
        pytest.raises(PatterningError, match=r"was removed under the run that wrote there; run the same command again"),
        RunDirectory(url).locked() as run,
    ):
        for _ in range(50):  # this server, unlike a real one, may store a beat that it has looked at before
            run.storage.delete(NAME)
            time.sleep(BEAT)


def test_worker_on_another_node_fetches_and_publishes(url: str, machine: Callable[[str], None], tmp_path: Path) -> None:
    with RunDirectory(url).locked() as run:
        with run.stage("prepare", "p") as outputs:
            outputs.append(run.path / "data" / "tokens")
            write_text(outputs[0], "tokens")
        worker: Location = replace(pickle.loads(pickle.dumps(run.location)), path=tmp_path / "node")
        with run.stage("train", "t") as outputs:
            write_text(run.path / "baseline" / "model", "of a driver before")
            run.publish(run.path / "baseline")
            write_text(worker.fetch("data") / "baseline" / "model", "weights")
            assert (worker.path / "data" / "tokens").read_text() == "tokens"
            assert not (worker.path / "manifest.json").exists()
            write_text(worker.path / "baseline" / "note.json", "{}")
            write_text(worker.path / "baseline" / ".model.0123.tmp", "half")
            write_text(worker.path / "baseline" / ".checkpoint" / "part", "kept by other means")
            write_text(worker.path / "baseline" / "tree.zarr" / ".zgroup", "{}")
            worker.publish(worker.path / "baseline")
            outputs += [run.path / "baseline" / "model", run.path / "baseline" / "own"]
            write_text(outputs[1], "own")
        assert outputs[0].read_text() == "weights", "the newer one, from the other node"
        assert run.manifest["stages"]["train"]["outputs"] == {"baseline/model": 7, "baseline/own": 3}
        published = {"model", "note.json", "own", "tree.zarr/.zgroup"}
        assert set(run.storage.sizes("baseline")) == {f"baseline/{name}" for name in published}
        run.storage.write("data/tokens", b"TOKENS")  # as long as before
        run.storage.write("data/more", b"")
        run.storage.delete("baseline/note.json")
        worker.fetch("data", "baseline")
        assert sorted(file.name for file in (worker.path / "data").iterdir()) == ["more", "tokens"]
        assert (worker.path / "data" / "tokens").read_text() == "TOKENS"
        assert not (worker.path / "baseline" / "note.json").exists()


def test_processes_of_a_node_fetch_once(server: str, machine: Callable[[str], None], tmp_path: Path,
                                        caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    location = Location.at(server.format(tmp_path.name))
    for number in range(3):
        location.storage.write(f"data/{number}", b"tokens")
    script = "import pickle, sys; location = pickle.loads(sys.stdin.buffer.read()); location.fetch('data')"
    with caplog.at_level(logging.INFO, "werkzeug"):
        workers = [subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) for _ in range(3)]
        for worker in workers:
            worker.stdin.write(pickle.dumps(location))
            worker.stdin.close()
        assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert len(re.findall(r"GET /bucket/\S+/data/\d ", caplog.text)) == 3
    assert sorted(file.name for file in (location.path / "data").iterdir()) == ["0", "1", "2"]


def test_run_that_was_deleted_starts_anew(url: str, machine: Callable[[str], None]) -> None:
    with RunDirectory(url).locked() as run, run.stage("prepare", "p") as outputs:
        outputs.append(run.path / "data" / "tokens")
        write_text(outputs[0], "tokens")
    for name in run.storage.sizes(""):
        run.storage.delete(name)
    with RunDirectory(url).locked() as run:
        assert run.manifest == {}
        assert not (run.path / "data" / "tokens").exists()
        assert not (run.path / "events.jsonl").exists()


def test_working_copy_that_cannot_be_made(machine: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "first").write_text("")
    expected = rf"^{tmp_path}/first/\w+: the working copy of file://{tmp_path}/far cannot .*PATTERNING_CACHE"
    with pytest.raises(PatterningError, match=expected):
        RunDirectory(f"file://{tmp_path}/far")


def test_command_takes_up_a_run_at_a_url(
    server: str, machine: Callable[[str], None], tiny_run: Path, tmp_path: Path
) -> None:
    url = server.format(tmp_path.name)
    first = CliRunner().invoke(app, ["prepare", str(tiny_run / "config.yaml"), "--run-dir", url])
    assert first.exit_code == 0, first.output
    machine("second")
    again = CliRunner().invoke(app, ["prepare", url, "--set", "retrain.num_steps=7"])
    assert again.exit_code == 0, again.output
    assert "prepare: done before, inputs unchanged" in again.output
    assert b"num_steps: 7" in open_storage(url).read("config.yaml")
    refused = CliRunner().invoke(app, ["sample", url])
    assert refused.exit_code == 2
    assert "stage sample needs stage train, which is not done" in refused.stderr
