"""Chains on Ray actors leave what the same chains leave without Ray, whoever ran them and in whatever order."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from tiny_run import copy_run, quiet, subjects_of, tiny_config

from patterning_dist.aggregation.files import read_chains, read_gradients, read_records
from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.boards import progress_board
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.runtime.resources import Resources
from patterning_dist.runtime.watch import Watch
from patterning_dist.runtime.workforce import Workforce
from patterning_dist.sampling.chain import ChainFailure
from patterning_dist.stages.sample import sample
from patterning_dist.storage.store import LocalStorage

pytestmark = pytest.mark.usefixtures("local_ray")

NAN_OBSERVABLE = "sampling.observables.0={kind: function, names: [edge], path: 'tiny_run:undefined_on_one_side'}"


@pytest.fixture
def as_in_a_worker():
    threads = torch.get_num_threads()
    prepare_process(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def sample_by_hand(config, directory):
    """All chains one after another in this process, blocks of draws as large as the workers push them."""
    study, size, found = subjects_of(config, directory), config.sampling.draws_per_push, {}
    for component in [c.name for c in config.sampling.components]:
        settings = config.sampling.resolve(component)
        num_columns = len(study.probe.ids) * (study.task.num_positions + 1)  # predicted tokens, and means
        shape = (settings.num_draws, len(study.observable_names), num_columns, config.sampling.num_batches)
        healthy, failed, gradients = [], {}, {}
        for number in range(settings.num_chains):
            chain, draws, moments = study.chain(component, number), [], CoMoments.empty(number, *shape)
            try:
                for draw in chain.draws():
                    draws.append(draw)
            except ChainFailure as failure:
                failed[number] = str(failure)
                continue
            for start in range(0, len(draws), size):
                block = draws[start : start + size]
                losses = np.stack([d.losses for d in block]).astype(np.float32)
                moments.update(np.stack([d.observables for d in block]), losses)
            healthy.append(moments)
            if "gradients" in chain.statistics:
                gradients[number] = chain.statistics["gradients"].result()["means"]
        found[component] = healthy, failed, gradients
    return found


def assert_same_chains(found, expected):
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        for name in ("count", "mean_phi", "mean_loss", "m2_phi", "m2_loss"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name), err_msg=name)
        # Products of matrices of another width are rounded in another order.
        np.testing.assert_allclose(x.comoment, y.comoment, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("shards", [1, 3])
def test_one_worker_two_workers_and_no_ray_at_all(tiny_run, tmp_path, as_in_a_worker, shards):
    folders = []
    for workers in (1, 2):
        config = tiny_config(tiny_run, f"sampling.workers={workers}", f"sampling.aggregator_shards={shards}")
        run = copy_run(tiny_run, tmp_path / f"workers-{workers}")
        outputs = sample(config, run, quiet())
        assert outputs and all(path.exists() for path in outputs)
        folders.append(run.path)
    by_hand = sample_by_hand(tiny_config(tiny_run), tiny_run)
    for component in ("layer.0.head.1", "everything"):
        subjects = [folder / "sampling" / component for folder in folders]
        assert_same_chains(read_chains(subjects[0])[0], by_hand[component][0])
        # Whoever ran it, everything but the time that it took is the same to the bit.
        assert_same_files(*subjects)
        for suffix in ("", "-samples"):
            name = f"susceptibility-{component}{suffix}.parquet"
            tables = [pq.read_table(folder / "response" / name) for folder in folders]
            assert tables[0].equals(tables[1])
        records = read_records(subjects[1])
        assert [record.chain for record in records] == [0, 1, 2]
        assert all(r.healthy and r.draws == 12 and r.steps == 3 + 11 * 2 for r in records)
    gradients = read_gradients(LocalStorage(folders[0]), "everything", [0, 1, 2])
    np.testing.assert_array_equal(gradients, np.stack(list(by_hand["everything"][2].values())))
    assert not by_hand["layer.0.head.1"][2]
    # Every chain is another one, and the draws did move.
    (a, b, c), _ = read_chains(folders[0] / "sampling" / "everything")
    for x, y in ((a, b), (a, c), (b, c)):
        assert np.abs(x.total().mean_loss - y.total().mean_loss).max() > 1e-4
    # What the shards made of their columns is what comes of all columns together.
    study = subjects_of(tiny_config(tiny_run), tiny_run)
    table = pq.read_table(folders[0] / "response" / "susceptibility-everything.parquet")
    is_token = np.arange(a.mean_loss.shape[-1]) < len(table)
    measured = susceptibility([a, b, c], loss_weights=is_token.astype(float))
    for k, name in enumerate(study.observable_names):
        np.testing.assert_allclose(table[f"chi_{name}"], measured.chi[k, : len(table)], rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(table[f"se_{name}"], measured.standard_error[k, : len(table)], rtol=1e-4, atol=1e-9)


def assert_same_files(a, b):
    for name in ("traces.parquet",):
        assert pq.read_table(a / name).equals(pq.read_table(b / name))
    for x, y in zip(read_chains(a)[0], read_chains(b)[0], strict=True):
        for name, array in x.state_dict().items():
            np.testing.assert_array_equal(array, y.state_dict()[name], err_msg=name)


def test_a_chain_that_fails_is_left_out_and_reported(tiny_run, tmp_path, as_in_a_worker):
    overrides = ("sampling.components=[{name: everything}]", "sampling.num_chains=5", NAN_OBSERVABLE)
    config = tiny_config(tiny_run, *overrides)
    healthy, expected, _ = sample_by_hand(config, tiny_run)["everything"]
    assert 1 <= len(expected) <= 3
    run = copy_run(tiny_run, tmp_path / "run")
    sample(config, run, quiet())
    records = json.loads((run.path / "sampling" / "everything" / "chains.json").read_text())
    assert {r["chain"]: r["reason"] for r in records if not r["healthy"]} == expected
    for reason in expected.values():
        assert reason.startswith("a loss or observable is not finite at draw ")
        assert reason.endswith("lower sampling.step_size (0.001)")
    diagnostics = json.loads((run.path / "response" / "diagnostics.json").read_text())["subjects"]["everything"]
    assert {entry["chain"]: entry["reason"] for entry in diagnostics["excluded"]} == expected
    assert diagnostics["num_chains"] == len(healthy) == 5 - len(expected)
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert {e["chain"]: e["reason"] for e in events if e["kind"] == "chain_excluded"} == expected
    found, _ = read_chains(run.path / "sampling" / "everything")
    assert_same_chains(found, healthy)


@pytest.mark.slow
def test_an_observable_that_raises_or_hangs_fails_its_chain_alone(tiny_run, tmp_path, as_in_a_worker):
    """Chain 1 raises at draw 9, chain 4 hangs at draw 1, each time that it is tried; once more is enough."""
    either = "sampling.observables.0={kind: function, names: [edge], path: 'tiny_run:%s'}"
    overrides = ("sampling.components=[{name: everything}]", "sampling.num_chains=5", "sampling.progress_timeout=10")
    healthy, _, _ = sample_by_hand(tiny_config(tiny_run, *overrides, either % "edge"), tiny_run)["everything"]
    run = copy_run(tiny_run, tmp_path / "run")
    sample(tiny_config(tiny_run, *overrides, either % "raise_or_hang_at_the_edge"), run, quiet())
    found, excluded = read_chains(run.path / "sampling" / "everything")
    assert_same_chains(found, [chain for chain in healthy if chain.chain in (0, 2, 3)])
    place = r"observable edge \(tiny_run:raise_or_hang_at_the_edge\)"
    assert excluded.keys() == {1, 4}
    raised = rf"draw 9, {place}: ValueError: too far \(tiny_run\.py:\d+\); the same twice"
    assert re.fullmatch(raised, excluded[1])
    hung = rf"no progress for \d+ s, 1 of 12 done, in draw 1, {place}; sampling\.progress_timeout is 10 s; the same"
    assert re.fullmatch(rf"{hung} twice", excluded[4])
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    lost = [event["chain"] for event in events if event["kind"] == "chain_lost" and event["chain"] in excluded]
    assert sorted(lost) == [1, 1, 4, 4]
    said = [event["text"] for event in events if event["kind"] == "stalled"]
    assert any(re.match(rf"everything chain 4 has shown nothing for \d+ s: 1 of 12 .* {place}", text) for text in said)


def test_too_few_healthy_chains_are_an_error(tiny_run, tmp_path):
    config = tiny_config(
        tiny_run,
        "sampling.components=[{name: everything}]",
        "sampling.num_chains=5",
        "sampling.min_chains=5",
        NAN_OBSERVABLE,
    )
    run = copy_run(tiny_run, tmp_path / "run")
    with pytest.raises(PatterningError) as caught:
        sample(config, run, quiet())
    text = str(caught.value)
    assert text.startswith("component everything: 1 of 5 chains failed, so fewer than sampling.min_chains = 5 can be")
    assert "a loss or observable is not finite at draw" in text
    assert text.endswith("lower sampling.step_size (0.001)")


def test_chains_whose_workers_die_again_and_again_are_an_error_that_says_so(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path / "run")
    killer = "sampling.observables.0={kind: function, names: [edge], path: 'tiny_run:kill_the_worker'}"
    config = tiny_config(tiny_run, killer, "sampling.max_chain_failures=1")
    with pytest.raises(PatterningError) as caught:
        sample(config, run, quiet())
    assert re.search(
        r"2 of 3 chains failed, .* chain \d: lost 2 times without getting beyond draw 0; last: .* died",
        str(caught.value),
    )
    assert not (run.path / "response").exists()
    assert not list(run.path.rglob("*.tmp"))
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "chain_lost" for event in events) >= 4


def test_a_worker_that_cannot_be_started_is_an_error_and_not_a_wait():
    @ray.remote
    class Broken:
        def __init__(self):
            raise ImportError("no module named nowhere")

        def open(self):
            pass

    def start():
        worker = Broken.remote()
        return worker, worker.open.remote()

    with (
        Workforce(start, 1, Resources("a worker", 1), quiet()) as workers,
        pytest.raises(PatterningError, match=r"^a worker cannot be started: ImportError: no module named nowhere$"),
    ):
        watch = Watch(progress_board(), 300, print)
        workers.run([("task", lambda worker, pulse: worker.open.remote())], lambda results: None, watch)
