"""A training whose processes are killed goes on from its last checkpoint, to the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import copy_run, quiet, tiny_config

from patterning_dist.errors import PatterningError
from patterning_dist.runtime.training.jobs import run_jobs
from patterning_dist.training.job import TrainingJob

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow, pytest.mark.extended, pytest.mark.timeout(900)]

TESTS = Path(__file__).parents[1]
ZERO = TESTS.parent / "configs" / "deepspeed"
# Stage train in a process of its own, with checkpoints often enough for a job of seconds.
DRIVER = f"""
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from tiny_run import quiet, tiny_config
from patterning_dist.preemption import preemptible
from patterning_dist.storage.run import RunDirectory
from patterning_dist.stages import train as stage
stage.TrainingJob = partial(stage.TrainingJob, checkpoint_seconds=0.1)
if __name__ == "__main__":
    with preemptible(), RunDirectory(sys.argv[1]).locked() as run:
        stage.train(tiny_config(run.path, *sys.argv[2:]), run, quiet())
"""


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    return copy_run(tiny_run, tmp_path_factory.mktemp("kills"))


def make_job(run, name, **changes):
    job = TrainingJob(
        name=name,
        folder=run.path / "jobs" / name,
        inputs=[],
        seed=4,
        num_steps=800,
        anneal_steps=20,
        evaluate_every=300,
        checkpoint_seconds=0.1,
    )
    return dataclasses.replace(job, **changes)


def events(run, *kinds):
    file = run.path / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] in kinds]


def assert_equal(job, undisturbed):
    for name in ("initial", "model", "raw"):
        if name != "raw" or undisturbed.anneal_steps:
            weights, expected = (load_file(j.folder / f"{name}.safetensors") for j in (job, undisturbed))
            assert weights.keys() == expected.keys()
            assert all(torch.equal(w, expected[key]) for key, w in weights.items()), name
    metrics, expected = (pq.read_table(j.folder / "metrics.parquet") for j in (job, undisturbed))
    seconds = metrics["seconds"].to_pylist()
    assert seconds == sorted(seconds)
    for name in ("step", "validation_loss", "induction_gap"):
        assert metrics[name] == expected[name]
    assert not (job.folder / ".checkpoint").exists()


def steps_saved(job):
    """Steps of the checkpoints that are there, ascending."""
    names = [path.name for path in (job.folder / ".checkpoint").glob("*-shared.*")]
    return sorted(int(name.split(".")[1]) for name in names if not name.startswith("."))


def training_workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "TrainingRank" in (command := " ".join(process.cmdline())) or "ModelWorker.train" in command:
                found.append(process)
    return found


def disturb(job, signals, sent, above):
    """Send one of a training's workers one signal after another, each at a random time after a further checkpoint."""
    rng, before, deadline = random.Random(1), above, time.monotonic() + 300
    for number in signals:
        while time.monotonic() < deadline:
            steps = steps_saved(job)
            workers = training_workers()
            if steps and steps[-1] > before and workers:
                time.sleep(rng.uniform(0, 0.2))
                with contextlib.suppress(psutil.Error):
                    worker = rng.choice(workers)
                    worker.send_signal(number)
                    worker.wait(60)
                    sent.append(number)
                before = max(steps_saved(job), default=before)
                break
            time.sleep(0.01)


@contextlib.contextmanager
def disturbed(*jobs_and_signals, above=0):
    """Disturb jobs one after another, above a step, while the block runs; yields the signals that got through."""
    sent = []

    def run_all():
        for job, signals in jobs_and_signals:
            disturb(job, signals, sent, above)

    thread = threading.Thread(target=run_all)
    thread.start()
    yield sent
    thread.join()


@pytest.fixture(scope="module")
def undisturbed(run):
    job = make_job(run, "undisturbed")
    run_jobs(tiny_config(run.path, "retrain.max_failures=0"), run, [job], "training", quiet(), 1)
    assert not (job.folder / ".checkpoint").exists()
    return job


def test_a_worker_killed_twice_and_preempted_once(run, undisturbed):
    job = make_job(run, "undisturbed", folder=run.path / "jobs" / "disturbed")
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    # Every restart gets further than the one before: they do not add up.
    config = tiny_config(run.path, "retrain.max_failures=1")
    with disturbed((job, signals)) as sent:
        run_jobs(config, run, [job], "training", quiet(), 1)
    assert sent == signals
    assert_equal(job, undisturbed)
    resumed = [event["step"] for event in events(run, "job_resumed")]
    assert len(resumed) == 3
    assert 0 < resumed[0] < resumed[1] < resumed[2] < 820
    # Preempted, it saved the step it was in.
    assert [event["step"] for event in events(run, "job_stopped")] == [resumed[1]]
    assert "a worker died" in events(run, "job_restarted")[0]["text"]


def test_two_ranks_under_zero(run):
    config = tiny_config(run.path, "training.optimizer=adamw", "retrain.max_failures=1")
    # Weights are averaged from step 200 on, by every rank its pieces under stage 3: the kills come after that.
    common = {"num_workers": 2, "num_steps": 50, "anneal_steps": 300}

    def jobs(prefix):
        return [
            make_job(run, f"zero{stage}", folder=run.path / prefix / str(stage), deepspeed=ZERO / f"zero{stage}.json")
            for stage in (2, 3)  # the optimizer is shared out; the parameters too
        ]

    whole, broken = ([dataclasses.replace(job, **common) for job in jobs(prefix)] for prefix in ("whole", "broken"))
    run_jobs(config, run, whole, "training", quiet(), 1)
    before = len(events(run, "job_resumed"))
    with disturbed(*((job, [signal.SIGKILL]) for job in broken), above=200) as sent:
        run_jobs(config, run, broken, "training", quiet(), 1)
    assert sent == [signal.SIGKILL] * 2
    for job, expected in zip(broken, whole, strict=True):
        assert_equal(job, expected)
    resumed = events(run, "job_resumed")[before:]
    assert [event["job"] for event in resumed] == [job.name for job in broken]
    assert all(event["step"] > 200 for event in resumed)


def test_a_worker_that_dies_again_and_again_is_given_up(run):
    job = make_job(run, "plus seed 7", checkpoint_seconds=1000.0, num_steps=100_000)
    given_up = threading.Event()

    def kill_all():
        while not given_up.is_set():
            if (job.folder / "initial.safetensors").exists():
                for worker in training_workers():
                    with contextlib.suppress(psutil.Error):
                        worker.kill()
            time.sleep(0.05)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(PatterningError) as raised:
            run_jobs(tiny_config(run.path, "retrain.max_failures=1"), run, [job], "training", quiet(), 1)
    finally:
        given_up.set()
        killer.join()
    text = str(raised.value)
    assert "plus seed 7: a worker died 2 times without getting further than step 0 of 100020" in text
    assert "raise retrain.max_failures" in text


def wait_for_checkpoints(job, process, above):
    """Wait until two checkpoints lie above a step."""
    deadline = time.monotonic() + 240
    while len([step for step in steps_saved(job) if step > above]) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_driver_killed_then_preempted_then_a_checkpoint_damaged(tiny_run, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    runs = [copy_run(tiny_run, tmp_path / name) for name in ("whole", "broken")]
    overrides = ["training.num_steps=1500", "training.anneal_steps=20", "training.evaluate_every=500"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start(directory):
        return subprocess.Popen(
            [sys.executable, str(driver), str(directory), *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip

    whole, broken = (make_job(r, "baseline", folder=r.path / "baseline") for r in runs)
    with start(runs[0].path) as process:
        assert process.wait(300) == 0, process.stdout.read()

    with start(runs[1].path) as process:
        wait_for_checkpoints(broken, process, 0)
        orphans = training_workers()
        assert orphans
        process.kill()
    # They go on, and go on saving, until they notice that they are alone.
    assert not psutil.wait_procs(orphans, timeout=120)[1]
    killed_at = steps_saved(broken)[-1]

    with start(runs[1].path) as process:
        wait_for_checkpoints(broken, process, killed_at)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        process.wait(30)
        assert process.returncode != 0
        assert time.monotonic() - asked < 30
    (stopped,) = events(runs[1], "job_stopped")
    older, newest = steps_saved(broken)
    assert stopped["step"] == newest > killed_at

    (file,) = (broken.folder / ".checkpoint").glob(f"*-shared.{newest:012d}.*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with start(runs[1].path) as process:
        assert process.wait(300) == 0, process.stdout.read()
    assert_equal(broken, whole)
    (damaged,) = events(runs[1], "checkpoint_damaged")
    assert f"baseline: baseline/.checkpoint/{file.name} is damaged" in damaged["text"]
    resumed = [event["step"] for event in events(runs[1], "job_resumed")]
    assert resumed == [killed_at, older]
