"""Training on Ray and DeepSpeed: the same weights however the work is shared out, interrupted or written down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file
from tiny_run import copy_run, quiet, tiny_config

from patterning_dist.data.tokens import TokenDataset
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.runtime.boards import JobControl
from patterning_dist.runtime.training.jobs import _pass_on, run_jobs
from patterning_dist.stages.train import arm_jobs, retrain
from patterning_dist.training.job import JOB_FILES, TrainingJob

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]

ZERO = Path(__file__).parents[2] / "configs" / "deepspeed"
NUM_UNWEIGHTED = 40


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A run with two weight tables: all ones, and unequal ones with 40 tokens left out."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("retraining"))
    pool = TokenDataset(run.path / "data" / "train.parquet")
    sequence, position = np.meshgrid(np.arange(len(pool)), np.arange(1, pool.context_length), indexing="ij")
    sequence, position = sequence.ravel(), position.ravel()
    rng = np.random.default_rng(0)
    weight = rng.choice([0.0, 0.5, 4.0], size=len(sequence)) * rng.random(len(sequence))
    (run.path / "weights").mkdir()
    write_sample_weights(run.path / "weights" / "ones.parquet", sequence, position, np.ones(len(sequence)), {})
    kept = slice(NUM_UNWEIGHTED, None)
    for name in ("uneven", "plus"):
        path = run.path / "weights" / f"{name}.parquet"
        write_sample_weights(path, sequence[kept], position[kept], weight[kept], {})
    return run


def make_job(run, name, *, weights=None, num_workers=1, zero=None, **changes):
    job = TrainingJob(
        name=name,
        folder=run.path / "jobs" / name,
        inputs=[],
        seed=4,
        num_steps=6,
        evaluate_every=4,
        start="baseline",
        weights=None if weights is None else run.path / "weights" / f"{weights}.parquet",
        deepspeed=None if zero is None else ZERO / f"zero{zero}.json",
        num_workers=num_workers,
    )
    return dataclasses.replace(job, **changes)


def train_all(config, run, jobs):
    """Weights after each job, all of them in one queue."""
    run_jobs(config, run, jobs, "training", quiet(), 1)
    for job in jobs:
        for name in JOB_FILES:
            assert (job.folder / name).is_file(), (job.name, name)
    return [load_file(job.folder / "model.safetensors") for job in jobs]


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def read_report(job):
    return json.loads((job.folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def one_rank(run):
    """Jobs of one rank in one queue: name -> (job, weights)."""
    jobs = [
        make_job(run, "plain"),
        make_job(run, "ones", weights="ones"),
        make_job(run, "uneven", weights="uneven"),
        make_job(run, "annealed", weights="uneven", anneal_steps=4),
        make_job(run, "long", weights="uneven", num_steps=400, evaluate_every=200),
    ]
    results = train_all(tiny_config(run.path, "retrain.max_failures=0"), run, jobs)
    return {job.name: (job, weights) for job, weights in zip(jobs, results, strict=True)}


def test_weights_of_one_change_nothing_and_others_do(one_rank, run):
    plain, ones, uneven = (one_rank[name][1] for name in ("plain", "ones", "uneven"))
    assert all(torch.equal(plain[name], ones[name]) for name in plain)
    assert distance(plain, uneven) > 1e-3
    start = load_file(run.path / "baseline" / "model.safetensors")
    assert distance(plain, start) > 1e-2
    assert all(
        torch.equal(start[n], w) for n, w in load_file(one_rank["plain"][0].folder / "initial.safetensors").items()
    )


def test_tokens_without_a_weight_are_counted(one_rank, run):
    num_tokens = pq.read_metadata(run.path / "data" / "train.parquet").num_rows * 15
    counts = {
        name: (read_report(job)["num_missing_weights"], read_report(job)["num_joined_weights"])
        for name, (job, _) in one_rank.items()
    }
    assert counts["plain"] == (0, 0)
    assert counts["ones"] == (0, num_tokens)
    assert counts["uneven"] == (NUM_UNWEIGHTED, num_tokens - NUM_UNWEIGHTED)


def test_metrics_are_those_of_the_steps(one_rank):
    job, _ = one_rank["annealed"]
    metrics = pq.read_table(job.folder / "metrics.parquet").to_pydict()
    assert metrics["step"] == [0, 4, 6, 8, 10]
    assert np.isnan(metrics["train_loss"][0])
    assert np.isfinite(metrics["train_loss"][1:]).all()
    plain = pq.read_table(one_rank["uneven"][0].folder / "metrics.parquet").to_pydict()
    assert plain["step"] == [0, 4, 6]
    assert metrics["validation_loss"][:3] == plain["validation_loss"]
    # Before the annealing the two jobs are one; the end is the mean of its last two checkpoints.
    raw, uneven = load_file(job.folder / "raw.safetensors"), one_rank["uneven"][1]
    assert all(torch.equal(raw[name], uneven[name]) for name in raw)
    assert distance(raw, one_rank["annealed"][1]) > 1e-4


def test_two_ranks_train_the_same_model(one_rank, run):
    jobs = [make_job(run, f"{name}-2", weights=w, num_workers=2) for name, w in (("plain", None), ("uneven", "uneven"))]
    plain, uneven = train_all(tiny_config(run.path, "retrain.max_failures=0"), run, jobs)
    assert distance(plain, one_rank["plain"][1]) < 1e-5
    assert distance(uneven, one_rank["uneven"][1]) < 1e-5


def test_zero_stages_agree(run):
    config = tiny_config(run.path, "training.optimizer=adamw", "retrain.max_failures=0")
    jobs = [
        make_job(run, f"zero{zero}", weights="uneven", num_workers=2, zero=zero, anneal_steps=2) for zero in range(4)
    ]
    results = train_all(config, run, jobs)
    start = load_file(run.path / "baseline" / "model.safetensors")
    assert distance(results[0], start) > 1e-2
    whole = read_report(jobs[0])
    for zero in (1, 2, 3):
        assert distance(results[0], results[zero]) < 1e-5, zero
        report = read_report(jobs[zero])
        for name in ("validation_loss", "induction_gap", "prefix_matching"):
            assert report[name] == pytest.approx(whole[name], abs=1e-4), (zero, name)
        metrics = [pq.read_table(job.folder / "metrics.parquet").to_pydict() for job in (jobs[0], jobs[zero])]
        assert metrics[0]["validation_loss"] == pytest.approx(metrics[1]["validation_loss"], abs=1e-4)


def training_workers():
    """Processes that train, among this process's own descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "TrainingRank" in (command := " ".join(process.cmdline())) or "ModelWorker.train" in command:
                found.append(process)
    return found


def kill_once(file, killed, sent=signal.SIGKILL):
    """Kill (or stop) the training worker soon after ``file`` has appeared."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists():
            time.sleep(0.1)
            for process in training_workers():
                process.send_signal(sent)
                if sent == signal.SIGKILL:
                    process.wait(10)
                killed.append("done" if (file.parent / "evaluation.json").exists() else "in the middle")
            return
        time.sleep(0.02)


def test_a_killed_worker_is_replaced_and_the_result_is_the_undisturbed_one(one_rank, run):
    config = tiny_config(run.path, "retrain.max_failures=1")
    first = make_job(run, "before", weights="uneven")
    disturbed = make_job(run, "disturbed", weights="uneven", num_steps=400, evaluate_every=200)
    killed = []
    killer = threading.Thread(target=kill_once, args=(disturbed.folder / "initial.safetensors", killed))
    killer.start()
    before, result = train_all(config, run, [first, disturbed])
    killer.join()
    assert killed == ["in the middle"]
    assert all(torch.equal(result[name], w) for name, w in one_rank["long"][1].items())
    assert all(torch.equal(before[name], w) for name, w in one_rank["uneven"][1].items())
    # What was finished before the death was not done again.
    assert (first.folder / "evaluation.json").stat().st_mtime < (
        disturbed.folder / "initial.safetensors"
    ).stat().st_mtime


def test_a_stopped_worker_is_found_and_replaced_and_the_result_is_the_undisturbed_one(one_rank, run):
    """SIGSTOP leaves a process that nobody else is told of."""
    config = tiny_config(run.path, "retrain.max_failures=3", "sampling.progress_timeout=10")
    disturbed = make_job(run, "stopped", weights="uneven", num_steps=400, evaluate_every=200)
    stopped = []
    stopper = threading.Thread(
        target=kill_once, args=(disturbed.folder / "initial.safetensors", stopped, signal.SIGSTOP)
    )
    stopper.start()
    (result,) = train_all(config, run, [disturbed])
    stopper.join()
    assert stopped == ["in the middle"]
    assert all(torch.equal(result[name], w) for name, w in one_rank["long"][1].items())
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    said = [e["text"] for e in events if e["kind"] == "stalled"]
    assert any(
        re.fullmatch(r"stopped has shown nothing for \d+ s: (\d+ of 400 done|nothing done yet)", text) for text in said
    )
    restarted = [e["text"] for e in events if e["kind"] == "job_restarted" and e["job"] == "stopped"]
    assert re.match(
        r"stopped: a worker died \(no progress for \d+ s, (\d+ of 400 done|nothing done yet); ", restarted[0]
    )


def test_a_stack_is_the_trainings_of_its_seeds_and_resumes_with_the_same_bits(one_rank, run):
    config = tiny_config(run.path, "retrain.max_failures=1")  # the optimizer is muon
    short = {"weights": "uneven", "anneal_steps": 4}
    other = make_job(run, "annealed-9", seed=9, **short)
    stacked = [make_job(run, f"stacked-{seed}", seed=seed, stack="uneven", **short) for seed in (4, 9)]
    alone, *found = train_all(config, run, [other, *stacked])
    for job, member, weights, expected in zip(
        (one_rank["annealed"][0], other), stacked, found, (one_rank["annealed"][1], alone), strict=True
    ):
        assert distance(weights, expected) < 1e-5
        rows = [pq.read_table(one.folder / "metrics.parquet").to_pydict() for one in (job, member)]
        assert rows[0]["step"] == rows[1]["step"]
        for name in ("train_loss", "validation_loss"):
            assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-5, nan_ok=True)
        assert read_report(member)["num_missing_weights"] == NUM_UNWEIGHTED
    long = {"weights": "uneven", "num_steps": 400, "evaluate_every": 200, "stack": "long", "checkpoint_seconds": 0.0}
    undisturbed = train_all(config, run, [make_job(run, f"long-{seed}", seed=seed, **long) for seed in (4, 9)])
    jobs, killed = [make_job(run, f"killed-{seed}", seed=seed, **long) for seed in (4, 9)], []
    killer = threading.Thread(target=kill_once, args=(jobs[1].folder / "initial.safetensors", killed))
    killer.start()
    results = train_all(config, run, jobs)
    killer.join()
    assert killed == ["in the middle"]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(undisturbed, results, strict=True) for name in a)
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [e["job"] for e in events if e["kind"] == "job_restarted"][-1:] == ["killed-4 and 1 more of its stack"]


def test_finished_retrainings_are_kept_and_changed_ones_done_again(run):
    config = tiny_config(run.path, "retrain.arms=[base,plus]", "retrain.start=baseline")
    outputs = retrain(config, run, quiet())
    assert len(outputs) == 2 * len(JOB_FILES)
    times = {path: path.stat().st_mtime_ns for path in outputs}
    assert retrain(config, run, quiet()) == outputs
    assert {path: path.stat().st_mtime_ns for path in outputs} == times
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [e["job"] for e in events if e["kind"] == "job_kept"][-2:] == ["base seed 0", "plus seed 0"]
    assert [job.is_finished(config) for job in arm_jobs(config, run)] == [True, True]
    # What it wrote counts by its bytes, and by its being there.
    for name in JOB_FILES:
        file = arm_jobs(config, run)[0].folder / name
        content = file.read_bytes()
        for damaged in (content[:-1] + bytes([content[-1] ^ 64]), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert [job.is_finished(config) for job in arm_jobs(config, run)] == [False, True], name
        file.write_bytes(content)
    # Other weights: that arm alone is another job.
    ones = (run.path / "weights" / "ones.parquet").read_bytes()
    (run.path / "weights" / "plus.parquet").write_bytes(ones)
    jobs = arm_jobs(config, run)
    assert [job.is_finished(config) for job in jobs] == [True, False]
    assert not jobs[0].is_finished(tiny_config(run.path, "training.weight_decay=0.1"))
    for changes in ({"num_steps": 7}, {"strength": 0.5}, {"weighted_share": 0.5}, {"weighting": "draw"}):
        assert not dataclasses.replace(jobs[0], **changes).is_finished(config)
    # The weights that it starts from count by their bytes.
    start = run.path / "baseline" / "model.safetensors"
    content = start.read_bytes()
    start.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not arm_jobs(config, run)[0].is_finished(config)
    start.write_bytes(content)
    assert arm_jobs(config, run)[0].is_finished(config)


@pytest.mark.parametrize("interrupted", ["before anything is read", "while it is written", "while it is said"])
def test_what_trainings_say_is_recorded_once_though_an_interruption_comes_between(run, monkeypatch, interrupted):
    control, heard, progress = JobControl.remote(), set(), quiet()
    for number in range(3):
        ray.get(control.tell.remote("told", f"message {number}", number=number))
    recorded = []

    def interrupt(*_):
        raise KeyboardInterrupt

    def record(stage, kind, text, number):
        if interrupted == "while it is written" and number == 1:
            interrupt()
        recorded.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(run, "event", record)
        if interrupted == "while it is said":
            patch.setattr(progress, "say", interrupt)
        if interrupted == "before anything is read":
            get = ray.get
            patch.setattr(ray, "get", lambda reference, timeout=None: interrupt(get(reference)))
        with pytest.raises(KeyboardInterrupt):
            _pass_on(control, heard, run, progress)
    monkeypatch.setattr(run, "event", lambda stage, kind, text, number: recorded.append(number))
    _pass_on(control, heard, run, progress)
    ray.get(control.tell.remote("told", "message 3", number=3))
    _pass_on(control, heard, run, progress)
    assert recorded == [0, 1, 2, 3]
