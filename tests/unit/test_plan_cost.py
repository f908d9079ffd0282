"""The arithmetic of a plan: counts as a chain makes them, bytes as the aggregator holds them, tasks as workers take
them."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.response.cost import NOTHING, ChainCounts, Seconds, aggregator_bytes, makespan
from patterning_dist.response.moments import CoMoments
from patterning_dist.stages.plan.table import Plan, StagePlan, duration, size


def counts(**changes: int) -> ChainCounts:
    settings = {"num_chains": 3, "num_draws": 16, "burn_in": 20, "steps_between_draws": 5, "draws_per_push": 6}
    return ChainCounts.of("head", **(settings | changes))


def test_counts_of_a_chain() -> None:
    # The first draw comes right after the burn-in: 15 gaps between 16 draws.
    assert counts() == ChainCounts("head", 3, 16, 20 + 15 * 5, 3)
    assert counts(num_draws=1, burn_in=0).num_steps == 0


def test_bytes_of_the_aggregator_are_those_of_its_arrays() -> None:
    num_observables, num_columns, num_batches = 3, 50, 8
    moments = CoMoments.empty(0, 16, num_observables, num_columns, num_batches)
    arrays = [v for v in moments.state_dict().values() if np.ndim(v)]
    trace = 16 * (1 + num_observables) * 8
    expected = 3 * (sum(a.nbytes for a in arrays) + trace)
    assert aggregator_bytes(counts(), num_batches, num_observables, num_columns) == expected


def test_tasks_are_taken_in_turn_by_whoever_is_free() -> None:
    tasks = [Seconds(value, value / 2, value * 3) for value in (4.0, 1.0, 1.0, 1.0)]
    # One worker takes the first; the other takes the rest, and is through before it.
    assert makespan(tasks, 2) == Seconds(4.0, 2.0, 12.0)
    assert makespan(reversed(tasks), 2) == Seconds(5.0, 2.5, 15.0)
    assert makespan(tasks, 1).value == pytest.approx(7.0)
    assert makespan([], 2) == NOTHING


def test_intervals_add_up_and_negative_times_count_as_none() -> None:
    assert Seconds.measured([1.0, 3.0, -2.0]) == Seconds(4 / 3, 0.0, 3.0)
    assert Seconds.about(10.0, 0.2) + Seconds(1.0, 0.5, 2.0) * 4 == Seconds(14.0, 10.0, 20.0)


def stage(name: str, **changes: object) -> StagePlan:
    seconds = {"seconds": Seconds(3600.0, 1800.0, 7200.0), "processes": 4, "cores": 2, "disk_bytes": 1000}
    return StagePlan(name, "work", **(seconds | changes))


def test_totals_count_what_is_still_to_be_done() -> None:
    stages = [stage("prepare", is_done=True, seconds=NOTHING), stage("train", on_device=True), stage("report")]
    on_cpus = Plan("x", "cpu", stages, 0, 1, {}, 1.0)
    assert on_cpus.disk_bytes == 2000
    assert on_cpus.device_hours == pytest.approx(2 * 4 * 2)  # two stages of an hour on 4 processes of 2 cores
    assert on_cpus.seconds.low < 3600 < on_cpus.seconds.value == 7200 < 14400 < on_cpus.seconds.high
    on_gpus = Plan("x", "cuda", stages, 0, 1, {}, 1.0)
    assert on_gpus.device_hours == pytest.approx(4)  # the report takes no GPU
    assert "total: about 2 h 0 min" in on_gpus.summary and "4 GPU-hours" in on_gpus.summary
    assert on_gpus.as_json()["total"]["gpu_hours"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (520, "8 min 40 s"), (3599.9, "1 h 0 min"), (400_000, "111 h 6 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("amount", "words"), [(0, "0 B"), (1234, "1.23 kB"), (2.5e8, "250 MB"), (4e12, "4 TB")])
def test_sizes_in_words(amount: float, words: str) -> None:
    assert size(amount) == words
