"""What actors report is what Prometheus reads: a real Ray, its metrics port scraped."""

from __future__ import annotations

import logging
import math
import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray
from exported_metrics import exported_names
from prometheus_client.parser import text_string_to_metric_families

from patterning_dist.runtime.metrics import Metrics

Samples = dict[str, dict[tuple[str, ...], float]]
# Ray forgets a gauge after two of these. It exports every so often, and the driver repeats itself every 5 s.
REPORT_SECONDS = 5
RUN = "scraped"  # and no other: a driver repeats what it said of the runs of other tests in its process


@ray.remote(num_cpus=0)
class Reporter:
    """Reports all there is, some of it twice: metrics made again are the same metrics."""

    def report(self) -> None:
        for loss in (3.5, 2.5):
            chain = Metrics(run=RUN, subject="w/head", chain=3)
            chain.add("patterning_draws", 5)
            chain.set("patterning_chain_loss_nats", loss)
            chain.observe("patterning_push_seconds", 0.004, shard=1)
            chain.add("patterning_push_bytes", 1000, shard=1)
            chain.add("patterning_pushes", 1, verdict="applied")
            chain.set("patterning_unacknowledged_pushes", 2)
            chain.observe("patterning_checkpoint_seconds", 0.2)
        chain.observe("patterning_push_seconds", 20.0, shard=0)
        chain.add("patterning_push_bytes", 0, shard=0)
        chain.add("patterning_pushes", 1, verdict="duplicate")
        shard = Metrics(run=RUN, shard=1)
        shard.observe("patterning_snapshot_seconds", 0.3)
        shard.set("patterning_snapshot_bytes", 4096)
        training = Metrics(run=RUN, arm="up-0")
        training.add("patterning_training_steps", 7)
        training.set("patterning_training_loss_nats", 1.25)
        Metrics(run=RUN, subject="w/head", chain=4).set("patterning_chain_loss_nats", math.nan)


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    names = exported_names()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_patterning_") and sample.labels["run"] == RUN:
                keys = (*names[sample.name], "le") if sample.name.endswith("_bucket") else names[sample.name]
                found.setdefault(sample.name, {})[tuple(sample.labels[key] for key in keys)] = sample.value
    return found


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", str(REPORT_SECONDS * 1000))
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _metrics_export_port=port,
        )
        yield port
        ray.shutdown()


@pytest.fixture(scope="module")
def samples(port: int) -> Iterator[Samples]:
    """One scrape with all that was reported; the actor lives on, and reports no more."""
    run = Metrics(run=RUN)
    run.hold("patterning_rhat", 1.01, subject="w/head")
    run.hold("patterning_chains_excluded", 1, subject="w/head")
    run.add("patterning_chain_restarts", 1, subject="w/head", chain=3)
    run.enter("train")
    Metrics(run=RUN).enter("sample")  # as the driver does, stage by stage
    reporter = Reporter.remote()
    ray.get(reporter.report.remote())
    found: Samples = {}
    deadline = time.monotonic() + 60
    while set(found) != set(exported_names()) and time.monotonic() < deadline:
        time.sleep(1)
        found = scrape(port)
    yield found


def test_every_name_is_exported_with_its_tags(samples: Samples) -> None:
    assert set(samples) == set(exported_names())


def test_counters_add_up_and_gauges_keep_the_last(samples: Samples) -> None:
    chain = (RUN, "w/head", "3")
    assert samples["ray_patterning_draws_total"] == {chain: 10}
    assert samples["ray_patterning_chain_loss_nats"] == {chain: 2.5}  # Ray drops what is not a number
    assert samples["ray_patterning_unacknowledged_pushes"] == {chain: 2}
    assert samples["ray_patterning_pushes_total"] == {(RUN, "applied"): 2, (RUN, "duplicate"): 1}
    assert samples["ray_patterning_push_bytes_total"] == {(RUN, "1"): 2000}
    assert samples["ray_patterning_training_steps_total"] == {(RUN, "up-0"): 7}
    assert samples["ray_patterning_training_loss_nats"] == {(RUN, "up-0"): 1.25}
    assert samples["ray_patterning_snapshot_bytes"] == {(RUN, "1"): 4096}
    assert samples["ray_patterning_rhat"] == {(RUN, "w/head"): 1.01}
    assert samples["ray_patterning_chains_excluded"] == {(RUN, "w/head"): 1}
    assert samples["ray_patterning_chain_restarts_total"] == {chain: 1}
    assert samples["ray_patterning_stage"] == {(RUN, "train"): 0, (RUN, "sample"): 1}


def test_latencies_fall_into_their_buckets(samples: Samples) -> None:
    assert samples["ray_patterning_push_seconds_count"] == {(RUN, "0"): 1, (RUN, "1"): 2}
    buckets = samples["ray_patterning_push_seconds_bucket"]
    assert (buckets[RUN, "1", "0.0025"], buckets[RUN, "1", "0.005"]) == (0, 2)
    assert (buckets[RUN, "0", "10.0"], buckets[RUN, "0", "30.0"]) == (0, 1)


def test_what_the_driver_says_stays(port: int, samples: Samples) -> None:
    assert "ray_patterning_chain_loss_nats" in samples
    deadline = time.monotonic() + 60
    while "ray_patterning_chain_loss_nats" in (found := scrape(port)) and time.monotonic() < deadline:
        time.sleep(1)
    assert "ray_patterning_chain_loss_nats" not in found  # Ray has forgotten a gauge that was set once
    assert found["ray_patterning_stage"] == samples["ray_patterning_stage"]
    assert found["ray_patterning_rhat"] == samples["ray_patterning_rhat"]
    assert found["ray_patterning_chains_excluded"] == samples["ray_patterning_chains_excluded"]
