"""Chains on Ray actors leave what the same chains leave without Ray, whoever ran them and in whatever order."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import copy_run, quiet, tiny_config

from patterning_dist.errors import PatterningError
from patterning_dist.response.ledger import ChainRecord, Ledger, read_chains
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.sampling.chain import ChainFailure
from patterning_dist.sampling.study import Study
from patterning_dist.stages.sample import sample

pytestmark = pytest.mark.usefixtures("local_ray")

NAN_OBSERVABLE = "sampling.observables.0={kind: function, names: [edge], path: 'tiny_run:undefined_on_one_side'}"


@pytest.fixture
def as_in_a_worker():
    threads = torch.get_num_threads()
    prepare_process(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def sample_by_hand(config, directory, folder):
    """All chains one after another in this process, blocks of draws as large as the workers push them."""
    study, size = Study(config, directory, "cpu"), config.sampling.draws_per_push
    for component in [c.name for c in config.sampling.components]:
        settings = config.sampling.resolve(component)
        num_columns = study.probe_tokens.size  # tokens but for the first of each sequence, and sequence means
        ledger = Ledger(study.observable_names, num_columns, settings.num_draws, config.sampling.num_batches)
        for number in range(settings.num_chains):
            ledger.open(number)
            chain, draws, record, arrays = study.chain(component, number), [], ChainRecord(number), {}
            try:
                for draw in chain.draws():
                    draws.append(draw)
            except ChainFailure as failure:
                record.healthy, record.reason = False, str(failure)
            for sequence_number, start in enumerate(range(0, len(draws), size)):
                block = draws[start : start + size]
                ledger.push(
                    number,
                    sequence_number,
                    np.stack([d.observables for d in block]),
                    np.stack([d.losses for d in block]).astype(np.float32),
                    np.array([d.mean_loss for d in block]),
                )
            if record.healthy:
                arrays["center_losses"] = chain.center_losses
                if chain.sums is not None:
                    arrays["sums"] = chain.sums.numpy() / chain.num_draws
            ledger.close(record, arrays)
        ledger.write(folder / component)


def assert_same_sampling(a, b, components):
    for component in components:
        for file in ("moments.npz", "arrays.npz"):
            with np.load(a / component / file) as x, np.load(b / component / file) as y:
                assert sorted(x.files) == sorted(y.files)
                for name in x.files:
                    np.testing.assert_array_equal(x[name], y[name], err_msg=f"{component} {file} {name}")
        traces = [pq.read_table(folder / component / "traces.parquet") for folder in (a, b)]
        assert traces[0].equals(traces[1])
        assert traces[0].num_rows > 0


def test_one_worker_two_workers_and_no_ray_at_all(tiny_run, tmp_path, as_in_a_worker):
    folders = []
    for workers in (1, 2):
        config = tiny_config(tiny_run, f"sampling.workers={workers}")
        run = copy_run(tiny_run, tmp_path / f"workers-{workers}")
        outputs = sample(config, run, quiet())
        assert all(path.is_file() for path in outputs)
        folders.append(run.path)
    sample_by_hand(tiny_config(tiny_run), tiny_run, tmp_path / "by-hand")
    components = ["layer.0.head.1", "everything"]
    assert_same_sampling(folders[0] / "sampling", folders[1] / "sampling", components)
    assert_same_sampling(folders[0] / "sampling", tmp_path / "by-hand", components)
    for component in components:
        name = f"susceptibility-{component}.parquet"
        tables = [pq.read_table(folder / "response" / name) for folder in folders]
        assert tables[0].equals(tables[1])
        records = json.loads((folders[1] / "sampling" / component / "chains.json").read_text())
        assert [r["chain"] for r in records] == [0, 1, 2]
        assert all(r["healthy"] and r["draws"] == 12 and r["steps"] == 3 + 11 * 2 for r in records)
    # Every chain is another one, and the draws did move.
    (a, b, c), _ = read_chains(folders[0] / "sampling" / "everything")
    for x, y in ((a, b), (a, c), (b, c)):
        assert np.abs(x.total().mean_loss - y.total().mean_loss).max() > 1e-4


def test_a_chain_that_fails_is_left_out_and_reported(tiny_run, tmp_path, as_in_a_worker):
    overrides = ("sampling.components=[{name: everything}]", "sampling.num_chains=5", NAN_OBSERVABLE)
    config = tiny_config(tiny_run, *overrides)
    sample_by_hand(config, tiny_run, tmp_path / "by-hand")
    healthy, expected = read_chains(tmp_path / "by-hand" / "everything")
    assert 1 <= len(expected) <= 3
    run = copy_run(tiny_run, tmp_path / "run")
    sample(config, run, quiet())
    records = json.loads((run.path / "sampling" / "everything" / "chains.json").read_text())
    assert {r["chain"]: r["reason"] for r in records if not r["healthy"]} == expected
    for reason in expected.values():
        assert reason.startswith("a loss or observable is not finite at draw ")
        assert reason.endswith("lower sampling.step_size (0.001)")
    diagnostics = json.loads((run.path / "response" / "diagnostics.json").read_text())["components"]["everything"]
    assert {entry["chain"]: entry["reason"] for entry in diagnostics["excluded"]} == expected
    assert diagnostics["num_chains"] == len(healthy) == 5 - len(expected)
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert {e["chain"]: e["reason"] for e in events if e["kind"] == "chain_excluded"} == expected
    found, _ = read_chains(run.path / "sampling" / "everything")
    for x, y in zip(found, healthy, strict=True):
        np.testing.assert_array_equal(x.comoment, y.comoment)


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


def test_a_killed_worker_is_an_error_that_says_how_to_go_on(tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path / "run")
    killer = "sampling.observables.0={kind: function, names: [edge], path: 'tiny_run:kill_the_worker'}"
    with pytest.raises(PatterningError, match=r"a worker process died .* run the same command again to resume"):
        sample(tiny_config(tiny_run, killer), run, quiet())
    assert not (run.path / "response").exists()
    assert not list(run.path.rglob("*.tmp"))
