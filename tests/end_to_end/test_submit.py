"""`patterning submit` and the jobs on a real cluster, whose head is killed in the middle of the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny_run import SETTINGS
from typer.testing import CliRunner

from patterning_dist.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
OWN = """
import patterning_dist
from own_part import half

def norm(model):
    if "working_dir_files" not in patterning_dist.__file__:
        raise RuntimeError("not the uploaded package")
    return half(sum((p**2).sum() for p in model.parameters()))[None]
"""


def environment(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    return clean | auth | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | changes


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Head:
    """A one-node cluster; its processes are known by a variable in their environment, and no others are touched."""

    def __init__(self, port: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))  # sockets in it: the path must be short
        self.mark = f"PATTERNING_TEST_CLUSTER={self.folder}"
        ports = {"ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"}
        options = {name: free_port() for name in sorted(ports)} | {"port": 0, "dashboard-port": port, "num-cpus": 2}
        options |= {"dashboard-host": "127.0.0.1", "temp-dir": self.folder, "object-store-memory": 200_000_000}
        command = [str(BIN / "ray"), "start", "--head", *(f"--{name}={value}" for name, value in options.items())]
        for _ in range(3):  # Ray gives its own processes 30 s to start, which a loaded machine may exceed
            marked = environment(PATTERNING_TEST_CLUSTER=str(self.folder))
            started = subprocess.run(command, env=marked, capture_output=True, text=True, timeout=240)
            if started.returncode == 0:
                return
            self.kill()
        raise RuntimeError(started.stdout + started.stderr)

    def kill(self) -> None:
        """As when a machine is lost: everything at once."""
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pids(self) -> list[int]:
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
        return found


def submit(folder: Path, address: str, *arguments: str, setup: str = "", **changes: str) -> subprocess.Popen[str]:
    script = f"{setup}\nfrom patterning_dist.cli import app_main; app_main()"
    command = [sys.executable, "-c", script, "submit", "tiny.yaml", "--address", address, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(**changes), **pipes)


def events(run: Path) -> list[tuple[str, str]]:
    lines = (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").exists() else []
    return [(event["stage"], event["kind"]) for event in map(json.loads, lines)]


def wait_for(run: Path, event: tuple[str, str], times: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while events(run).count(event) < times:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, events(run)
        time.sleep(0.1)


@dataclass
class Story:
    """A run whose cluster was lost, taken up again by two submissions at once and watched by a third."""

    folder: Path
    run: Path
    address: str
    head: Head
    lost: tuple[int, str, str]  # exit code, log, what the command said
    resumed: list[tuple[int, str, str]]
    watcher: tuple[int, str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user submits from: an experiment, its corpus, and an observable in modules of the user's own."""
    folder = tmp_path_factory.mktemp("submit")
    for domain, words in {"fables": "fox crow lion mouse", "recipes": "flour butter sugar salt"}.items():
        (folder / "corpus" / domain).mkdir(parents=True)
        for number in range(40):
            line = " ".join(words.split()[number % 4 :] + words.split()[: number % 3 + 1])
            (folder / "corpus" / domain / f"{number:02}.txt").write_text(f"{number} {line}, {line}.\n" * 4)
    settings = {key: value for key, value in SETTINGS.items() if key not in ("response", "solve", "retrain")}
    settings["data"] = settings["data"] | {"sources": [{"path": "corpus"}]}
    settings["training"] = settings["training"] | {"num_steps": 2}
    (folder / "plain.yaml").write_text(yaml.safe_dump(settings))
    own = {"kind": "function", "names": ["norm"], "path": "own:norm"}
    sampling = settings["sampling"] | {"observables": [*settings["sampling"]["observables"], own]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings | {"sampling": sampling}))
    (folder / "own.py").write_text(OWN)
    (folder / "own_part.py").write_text("def half(number):\n    return number / 2\n")
    return folder


@pytest.fixture(scope="module")
def story(folder: Path) -> Iterator[Story]:
    run, port = folder / "runs" / "tiny", free_port()
    address, heads, clients = f"http://127.0.0.1:{port}", [], []
    try:
        heads.append(Head(port))
        clients.append(first := submit(folder, address, "--run-dir", str(run)))
        wait_for(run, ("sample", "started"), 1, first)
        heads[0].kill()
        heads.append(Head(port))
        lost = (*first.communicate(timeout=120), first.returncode)
        # One of the two takes five silent seconds for a dead connection, and makes a new one.
        impatient = "import patterning_dist.runtime.jobs.submit as submit; submit._SILENCE = 5"
        clients += (both := [submit(folder, address, "--run-dir", str(run), setup=setup) for setup in ("", impatient)])
        wait_for(run, ("sample", "started"), 2, both[0])
        clients.append(watcher := submit(folder, address, "--run-dir", str(run), "--set", "seed=4"))
        assert watcher.stdout.readline(), watcher.communicate()
        watcher.send_signal(signal.SIGINT)
        seen = (*watcher.communicate(timeout=60), watcher.returncode)
        ended = [(*process.communicate(timeout=400), process.returncode) for process in both]
        outcomes = [(code, log, said) for log, said, code in (lost, *ended, seen)]
        yield Story(folder, run, address, heads[1], outcomes[0], outcomes[1:3], outcomes[3])
    finally:
        for client in clients:  # if one of them failed
            client.kill()
            client.communicate()
        for head in heads:
            head.kill()


def test_a_lost_cluster_is_said_and_what_to_do(story: Story) -> None:
    code, log, said = story.lost
    assert code == 2 and "prepare: " in log
    listed, *contents, submitted, error = said.splitlines()
    assert listed.startswith("goes to the cluster, besides this package and the experiment: 82 files, ")
    assert len(contents) == 41 and contents[-1] == "  and 42 more of these folders"
    assert submitted.startswith("patterning-tiny-") and f"-1 is submitted to {story.address}" in submitted
    assert error.startswith(f"error: {story.address}: the cluster is lost, or out of reach (")
    assert error.endswith("when there is one again, the same command goes on from the run directory")


def test_the_same_command_goes_on_from_the_run_directory(story: Story) -> None:
    for code, log, said in story.resumed:
        assert code == 0, log + said
        for stage in ("prepare", "train"):
            assert f"{stage}: done before, inputs unchanged" in log
    found = events(story.run)
    for stage in ("prepare", "train"):
        assert found.count((stage, "started")) == 1
    for stage in ("sample", "report"):
        assert found.count((stage, "finished")) == 1
    assert (story.run / "report.html").stat().st_size > 10_000


def test_a_second_submission_attaches_and_misses_nothing(story: Story) -> None:
    (_, log, said), (_, other_log, other_said) = story.resumed
    assert log == other_log, "the connection that was taken up again and again shows every line once"
    assert log.count("Running entrypoint for job") == 1
    how = sorted(line.split(" ", 1)[1] for line in (said + other_said).splitlines() if line.startswith("patterning-"))
    assert how == [
        "is done",
        "is done",
        f"is running already at {story.run}: attached to it",
        f"is submitted to {story.address}; it keeps its run in {story.run}",
    ]


def test_leaving_a_job_lets_it_go_on(story: Story) -> None:
    code, _, said = story.watcher
    attached, note, left = said.splitlines()
    job = attached.split()[0]
    assert code == 130
    assert note.startswith("note: it was submitted with other settings or files; to run with these, stop it (ray job")
    assert left == (
        f"{job} goes on; to follow it again: the same command. To stop it: ray job stop {job} --address {story.address}"
    )


def test_what_is_done_is_not_done_again(story: Story) -> None:
    arguments = ("--run-dir", f"{story.run}/", "--no-follow")
    sent = submit(story.folder, story.address, *arguments)
    log, said = sent.communicate(timeout=120)
    assert (sent.returncode, log) == (0, "")
    job = said.splitlines()[-1].split()[0]
    assert job.endswith("-2")
    followed = submit(story.folder, story.address, *arguments[:2])
    log, _ = followed.communicate(timeout=120)
    assert followed.returncode == 0
    assert "report: done before, inputs unchanged" in log
    assert events(story.run).count(("sample", "started")) == 2


def test_a_job_from_the_checkout_runs_its_own_code(story: Story) -> None:
    command = [str(BIN / "ray"), "job", "submit", "--address", story.address, "--working-dir", ".", "--"]
    command += ["python", "jobs/sample.py", "--config", str(story.folder / "plain.yaml")]
    command += ["--run-dir", str(story.run), "--set", "sampling.num_draws=10"]
    job = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "sampling the posterior: 0 of 60" in job.stdout and "sample: " in job.stdout
    manifest = json.loads((story.run / "manifest.json").read_text())
    assert manifest["stages"]["sample"]["status"] == "finished"
    folders = (story.head.folder / "session_latest" / "runtime_resources" / "working_dir_files").iterdir()
    [uploaded] = [folder for folder in folders if (folder / "jobs").is_dir()]
    names = {path.name for path in uploaded.iterdir()} | {f"corpora/{p.name}" for p in (uploaded / "corpora").iterdir()}
    assert not names & {".git", ".venv", "runs", ".ruff_cache", ".pytest_cache", ".hypothesis", "corpora/large"}
    assert sum(p.stat().st_size for p in uploaded.rglob("*") if p.is_file()) < 30 << 20


def test_the_exit_code_is_that_of_the_job(story: Story) -> None:
    failing = submit(story.folder, story.address, "--run-dir", str(story.run), "--set", "data.sources.0.path=/none")
    log, said = failing.communicate(timeout=120)
    assert failing.returncode == 2
    assert log.splitlines()[-1] == "error: data.sources.0.path: /none is not there; correct it"
    assert said.splitlines()[-1].endswith(
        "failed with exit code 2, see above; put that right, and the same command goes on"
    )


def test_no_token_is_one_line(story: Story) -> None:
    def refusal(**changes: str) -> str:
        refused = submit(story.folder, story.address, "--run-dir", str(story.run), **changes)
        log, said = refused.communicate(timeout=60)
        assert (refused.returncode, log, len(said.splitlines())) == (2, "", 1), said
        return said

    remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file of the cluster's token"
    for changes, reason in (
        ({"RAY_AUTH_TOKEN": "wrong"}, "Invalid authentication token; "),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token; "),
    ):
        said = refusal(**changes)
        assert reason + remedy in said and said.startswith(f"error: {story.address}: Authentication ")


def test_no_cluster_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*arguments: str) -> str:
        refused = CliRunner().invoke(app, ["submit", "tiny.yaml", *arguments])
        assert (refused.exit_code, refused.stdout) == (2, "")
        return refused.stderr

    monkeypatch.chdir(folder)
    elsewhere = ("--run-dir", str(folder / "elsewhere"))
    nobody = f"http://127.0.0.1:{free_port()}"
    assert refusal(*elsewhere, "--address", nobody).startswith(
        f"error: {nobody}: no answer (Connection refused); start the cluster"
    )
    assert refusal(*elsewhere, "--address", "auto") == (
        "error: --address auto: expected the URL of the cluster's dashboard, http://HOST:8265\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:  # the address that was given counts
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert refusal(*elsewhere, "--address", nobody).startswith(f"error: {nobody}: no answer")
    assert refusal("--address", "http://127.0.0.1:1") == (
        "error: tiny.yaml: a job needs a run directory that outlives it, got none; give --run-dir an absolute path on "
        "storage that all nodes share, or a URL\n"
    )
