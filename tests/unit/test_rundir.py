"""A run directory: one driver at a time, files whole or absent, stages done once for the same inputs."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import atomic_path, write_json, write_npz, write_parquet, write_text
from patterning_dist.storage.run import RunDirectory, read_manifest, stage_fingerprint


def events(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]


def test_second_driver_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    script = (
        "import sys; from patterning_dist.storage.run import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).locked(): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(PatterningError, match=rf"in use by another driver \(pid {holder.pid} on .*--run-dir"),
            RunDirectory(tmp_path).locked(),
        ):
            raise AssertionError("two drivers hold the same run directory")
        holder.kill()
        holder.wait()
    with RunDirectory(tmp_path).locked():  # a killed driver holds nothing
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


DRIVER = """
import sys, time
from pathlib import Path
from patterning_dist.errors import PatterningError
from patterning_dist.storage.run import RunDirectory
try:
    with RunDirectory(sys.argv[1]).locked() as run:
        storage = run.location.storage
        print("held", flush=True)
        if sys.argv[2] == "waits":
            time.sleep(600)
        sys.stdin.readline()
        for act in (lambda: storage.write("chain", b"x"), lambda: storage.clear(""), lambda: run.update_manifest(a=1),
                    lambda: run.event("a", "b"), run.publish, lambda: run.keep_state({})):
            try:
                print("written", act())
            except PatterningError as error:
                print("refused", flush=True)
except PatterningError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("does", ["waits", "writes"])
def test_a_driver_whose_folder_is_taken_away_stops(tmp_path: Path, again: bool, does: str) -> None:
    """By itself, whatever it waits for; and nothing that it has written for it lands in another's folder."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", DRIVER, str(folder), does]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as driver:
        assert driver.stdout.readline() == "held\n", driver.stderr.read()
        if does == "writes":
            driver.send_signal(signal.SIGSTOP)  # it has had no time to look for itself
        shutil.rmtree(folder)
        there = []
        with contextlib.ExitStack() as other:
            if again:
                other.enter_context(RunDirectory(folder).locked())  # the new folder has no lock yet
                there = [folder / ".lock"]
            driver.send_signal(signal.SIGCONT)
            said, error = driver.communicate("go\n", timeout=60)
            if does == "writes" and said:  # unless its own look came first
                assert said.splitlines()[-1] == "written None", "the state of a run is not worth an error"
                assert set(said.splitlines()[:-1]) == {"refused"}
            assert driver.returncode == 1
            expected = "was removed, or made again, under the run that wrote there, which has stopped; run the same"
            assert error == f"{folder}: {expected} command again\n"
            assert list(folder.glob("*")) == there


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.txt"
    write_text(file, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(file) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_leftovers_of_a_killed_driver_are_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_text(tmp_path / "data" / "kept.txt", "kept")
    (tmp_path / "data" / ".train.parquet.0123456789ab.tmp").write_text("half")
    with run.locked():
        assert [file.name for file in (tmp_path / "data").iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free some disk space"), (errno.EROFS, "choose another with --run-dir")],
)
def test_write_that_fails_names_the_path_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    file = tmp_path / "file.json"
    write_json(file, {"old": 1})

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PatterningError) as caught:
        write_json(file, {"new": 2})
    assert str(caught.value).startswith(f"{file}: cannot be written ({os.strerror(code)}); ")
    assert remedy in str(caught.value)
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PatterningError, match=r"file/run: cannot be written \(Not a directory\)"):
        RunDirectory(tmp_path / "file" / "run")


def test_read_only_file_system_is_refused_at_once(tmp_path: Path) -> None:
    """A real one: whoever is root may write in spite of permissions."""
    script = (
        "import sys; from patterning_dist.errors import PatterningError; "
        "from patterning_dist.storage.run import RunDirectory\n"
        "for name in ('there', 'new'):\n"
        "    try:\n"
        "        with RunDirectory(f'{sys.argv[1]}/{name}').locked(): print('written')\n"
        "    except PatterningError as error: print(error)"
    )
    mount = 'mount -t tmpfs tmpfs "$1" && mkdir "$1/there" && mount -o remount,ro "$1"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} || exit 77; "$2" -c "$3" "$1"', "sh"]
    try:
        result = subprocess.run([*command, tmp_path, sys.executable, script], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if result.returncode in (1, 77) and not result.stdout:
        pytest.skip(f"this process may not mount: {result.stderr}")
    remedy = "make it writable, or choose another with --run-dir, and run the same command again"
    assert result.stdout.splitlines() == [
        f"{tmp_path}/there/.lock: cannot be written (Read-only file system); {remedy}",
        f"{tmp_path}/new: cannot be written (Read-only file system); {remedy}",
    ]


def test_json_is_strict(tmp_path: Path) -> None:
    content = {
        "nan": math.nan,
        "array": np.array([1.5, np.inf]),
        "int": np.int64(3),
        "path": Path("a"),
        1: True,
    }
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None, "array": [1.5, None], "int": 3, "path": "a", "1": True,
    }  # fmt: skip


def test_tables_and_arrays_come_back(tmp_path: Path) -> None:
    table = pa.table({"chi": [0.5, -1.0]}).replace_schema_metadata({b"patterning": b"{}"})
    write_parquet(tmp_path / "a.parquet", table)
    assert pq.read_table(tmp_path / "a.parquet").equals(table, check_metadata=True)
    write_npz(tmp_path / "a.npz", {"x": np.arange(3)})
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "a.parquet"]


def test_stage_is_done_once_for_the_same_inputs(tmp_path: Path) -> None:
    run, fingerprint = RunDirectory(tmp_path), stage_fingerprint("train", {"training": {"num_steps": 3}})
    assert not run.is_done("train", fingerprint)
    with run.stage("train", fingerprint) as outputs:
        assert run.manifest["stages"]["train"]["status"] == "started"
        assert not run.is_done("train", fingerprint)
        outputs.append(tmp_path / "model.safetensors")
        write_text(outputs[0], "weights")
    assert RunDirectory(tmp_path).is_done("train", fingerprint)
    entry = run.manifest["stages"]["train"]
    assert entry["outputs"] == {"model.safetensors": 7}
    assert entry["seconds"] >= 0
    assert not run.is_done("train", stage_fingerprint("train", {"training": {"num_steps": 4}}))
    write_text(tmp_path / "model.safetensors", "cut")
    assert not run.is_done("train", fingerprint)
    (tmp_path / "model.safetensors").unlink()
    assert not run.is_done("train", fingerprint)


def test_change_of_an_early_stage_reaches_the_late_ones() -> None:
    def chain(seed: int, strength: float) -> list[str]:
        prepare = stage_fingerprint("prepare", {"seed": seed})
        train = stage_fingerprint("train", {"num_steps": 5}, [prepare])
        return [prepare, train, stage_fingerprint("solve", {"strength": strength}, [train])]

    base = chain(0, 0.5)
    assert chain(0, 0.5) == base
    assert [a == b for a, b in zip(base, chain(1, 0.5), strict=True)] == [False, False, False]
    assert [a == b for a, b in zip(base, chain(0, 0.6), strict=True)] == [True, True, False]
    assert stage_fingerprint("a", {"x": 1, "y": 2}) == stage_fingerprint("a", {"y": 2, "x": 1})
    assert stage_fingerprint("a", {}) != stage_fingerprint("b", {})


@pytest.mark.parametrize(("error", "status"), [(ValueError("why"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_stage_that_ends_badly_is_not_done(tmp_path: Path, error: BaseException, status: str) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(type(error)), run.stage("solve", "f"):
        raise error
    assert run.manifest["stages"]["solve"]["status"] == status
    assert not run.is_done("solve", "f")
    assert [event["kind"] for event in events(run)] == ["started", status]
    with run.stage("solve", "g"):
        pass
    assert run.is_done("solve", "g")
    assert [event["kind"] for event in events(run)][2:] == ["inputs_changed", "started", "finished"]


def test_stage_that_does_not_write_what_it_says(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with (
        pytest.raises(PatterningError, match="stage solve did not write it"),
        run.stage("solve", "f") as outputs,
    ):
        outputs.append(tmp_path / "absent.json")
    assert not run.is_done("solve", "f")


def test_changed_sections_are_said(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.store_config("seed: 1\ndata: {a: 1}\n") == []
    run.update_manifest(data={"train.parquet": "abc"})
    assert run.store_config("seed: 1\ndata: {a: 1}\n") == []
    assert not (tmp_path / "events.jsonl").exists()
    assert run.store_config("seed: 1\ndata: {a: 2}\nmodel: {}\n") == ["data", "model"]
    assert events(run)[0]["sections"] == ["data", "model"]
    manifest = run.manifest
    assert manifest["data"] == {"train.parquet": "abc"}
    assert manifest["versions"]["numpy"] == np.__version__
    assert len(manifest["config_sha256"]) == 64


def test_event_after_half_a_line_is_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.event("sample", "chain", chain=0, loss=math.nan)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": "20')
    run.event("sample", "chain", chain=1)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(lines[0])[key] for key in ("chain", "loss")] == [0, None]
    assert json.loads(lines[2])["chain"] == 1


def test_spoilt_manifest_is_an_error(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "absent") == {}
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(PatterningError, match=r"manifest\.json: cannot be read .*delete it"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../precious", "/precious", "a/../../precious", "", "a\0b"])
@pytest.mark.parametrize("key", ["outputs", "sha256", "sha256_before"])
def test_a_manifest_that_lists_what_is_not_of_the_run_is_refused(tmp_path: Path, key: str, name: str) -> None:
    """Damaged outputs are deleted before their stage runs again: files beside the run may not be among them."""
    (tmp_path / "precious").write_text("precious")
    run = RunDirectory(tmp_path / "run")
    value = 3 if key == "outputs" else "0" * 64
    entry = {"status": "finished", "fingerprint": "f", "outputs": {}, key: {name: value}}
    write_json(run.path / "manifest.json", {"stages": {"train": entry}})
    with (
        pytest.raises(PatterningError, match=rf"manifest\.json: stages\.train\.{key} does not list files of the run"),
        run.stage("train", "f"),
    ):
        raise AssertionError("begun")
    assert (tmp_path / "precious").read_text() == "precious"


def test_an_output_with_another_bit_is_not_believed(tmp_path: Path) -> None:
    """Whatever its size and time; and what stage made of the damaged bits is not kept in place of the old ones."""
    run = RunDirectory(tmp_path)

    def finish(stage: str, content: str, later: tuple[str, ...] = ()) -> None:
        with run.stage(stage, "f", later) as outputs:
            assert not (tmp_path / stage / "damaged").exists()
            write_text(tmp_path / stage / "a", content)
            write_text(tmp_path / stage / "deep" / "b", "b")
            outputs.append(tmp_path / stage)

    for stage in ("first", "second"):
        finish(stage, "one")
    assert run.manifest["stages"]["first"]["outputs"] == {"first/a": 3, "first/deep/b": 1}
    file = tmp_path / "first" / "a"
    stat = file.stat()
    file.write_text("onf")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = run = RunDirectory(tmp_path)
    assert again.changed_outputs("first") == ["first/a"] and not again.is_done("first", "f")
    with pytest.raises(ValueError), again.stage("first", "f", ("second",)):
        assert not file.exists()
        raise ValueError("on the way")
    assert again.is_done("second", "f")
    finish("first", "one", ("second",))
    assert again.is_done("first", "f") and again.is_done("second", "f")
    file.write_text("onf")
    with pytest.raises(KeyboardInterrupt), again.stage("first", "f", ("second",)):
        raise KeyboardInterrupt
    finish("first", "two", ("second",))
    assert again.is_done("first", "f") and not again.is_done("second", "f"), "it is of the old bits"


def test_another_version_is_said(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.changed_versions() == []
    run.store_config("seed: 1\n")
    assert run.changed_versions() == []
    run.update_manifest(versions=run.manifest["versions"] | {"torch": "1.0", "xarray": "0.1"})
    assert [line.partition(" ")[0] for line in run.changed_versions()] == ["torch"]
    assert run.changed_versions()[0].endswith(" (was 1.0)")
