"""How much does an aggregator shard take, and how many chains can push before pushes wait?

Real shards on a real Ray; the chains are one generator, which sends prepared blocks with the right sequence numbers and
a chain of digests (of stand-ins: hashing is a chain's work, and shards do not repeat it). Blocks lie in the object
store already, so that the generator is not what is measured. One machine holds shards and generator: with fewer cores
than processes they take time from each other.

First every chain pushes as fast as its window lets it: MB/s of losses that one shard takes, with snapshots of a chain
at most once a second and without. Then every chain has a push ready once in a period: the time from then to the last
answer, and the share of pushes that found their chain's window full.

    python benchmarks/aggregator_throughput.py                        # under five minutes on two cores
    python benchmarks/aggregator_throughput.py --out throughput.json
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.actor import ActorHandle

from patterning_dist.aggregation.ledger import LedgerPlan
from patterning_dist.aggregation.protocol import START, Incarnation, PushId, Verdict, block_digest
from patterning_dist.runtime.chains.aggregator import AggregatorShard
from patterning_dist.runtime.chains.pushes import WINDOW
from patterning_dist.runtime.environment import ray_session
from patterning_dist.storage.store import LocalStorage

BLOCKS = ((10, 1_024, 2), (10, 16_384, 2), (10, 131_072, 4))  # draws, columns, observables
SHARDS, CHAINS = (1, 2), (10, 30, 100, 300, 1_000)
NEVER, NUM_BATCHES, SUBJECT = 1e9, 8, "unit"


class Setting(NamedTuple):
    """One measurement: the block that every push has, and who there is."""

    draws: int
    columns: int
    observables: int
    num_shards: int
    num_chains: int
    snapshot_seconds: float


@ray.remote(num_cpus=0)
class Generator:
    """All chains: pushes of one block, over and over.

    Args:
        setting: of the measurement.
        plan: of the chains.
        shards: that every push goes to.
    """

    def __init__(self, setting: Setting, plan: LedgerPlan, shards: list[ActorHandle]) -> None:
        self._setting, self._plan, self._shards = setting, plan, shards
        rng = np.random.default_rng(0)
        losses = rng.normal(size=(setting.draws, setting.columns)).astype(np.float32)
        columns = [plan.columns(shard, len(shards)) for shard in range(len(shards))]
        self._losses = [ray.put(np.ascontiguousarray(losses[:, part])) for part in columns]
        self._observables = rng.normal(size=(setting.draws, setting.observables))
        self._mean_losses = losses.mean(axis=1, dtype=np.float64)
        self._sequence, self._digest = [0] * setting.num_chains, [START] * setting.num_chains
        chains = range(setting.num_chains)
        ray.get([shard.open.remote(SUBJECT, self._push(chain), None, False) for shard in shards for chain in chains])

    def flat_out(self, seconds: float) -> float:
        """Pushes a second that all shards take, with full windows."""
        self._warm_up()
        chains = range(self._setting.num_chains)
        in_flight = deque(self._send(chain) for _ in range(WINDOW) for chain in chains)
        started, taken = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            sent = in_flight.popleft()
            _check(sent.refs)
            taken += 1
            in_flight.append(self._send(sent.chain))
        rate = taken / (time.monotonic() - started)
        for sent in in_flight:
            _check(sent.refs)
        return rate

    def paced(self, period: float, seconds: float) -> dict[str, float]:
        """Seconds from when a push was ready to the last answer, and the share of pushes that were held up."""
        self._warm_up()
        num_chains, started = self._setting.num_chains, time.monotonic()
        due = [(started + period * chain / num_chains, chain) for chain in range(num_chains)]
        held: list[deque[float]] = [deque() for _ in due]  # when pushes were ready that cannot be sent
        in_flight = [0] * num_chains
        unanswered: dict[ray.ObjectRef, _Sent] = {}
        latencies, num_ready, num_held = [], 0, 0

        def fill(chain: int) -> None:
            while held[chain] and in_flight[chain] < WINDOW:
                sent = self._send(chain, held[chain].popleft())
                in_flight[chain] += 1
                unanswered.update(dict.fromkeys(sent.refs, sent))

        while due[0][0] < started + seconds or unanswered:
            while due[0][0] <= min(time.monotonic(), started + seconds):
                ready, chain = due[0]
                heapq.heapreplace(due, (ready + period, chain))
                num_ready += 1
                num_held += in_flight[chain] >= WINDOW
                held[chain].append(ready)
                fill(chain)
            # Nothing becomes ready after the end: only answers are waited for then.
            wait = due[0][0] - time.monotonic() if due[0][0] < started + seconds else 1.0
            if not unanswered:
                time.sleep(max(wait, 0))
                continue
            for ref in ray.wait(list(unanswered), num_returns=1, timeout=max(wait, 0))[0]:
                sent = unanswered.pop(ref)
                _check([ref])
                sent.num_missing -= 1
                if sent.num_missing == 0:
                    latencies.append(time.monotonic() - sent.ready)
                    in_flight[sent.chain] -= 1
                    fill(sent.chain)
        p50, p99 = np.quantile(latencies, [0.5, 0.99]).tolist()
        return {"p50": p50, "p99": p99, "held": num_held / num_ready}

    def _warm_up(self) -> None:
        for chain in range(self._setting.num_chains):
            _check(self._send(chain).refs)

    def _send(self, chain: int, ready: float = 0.0) -> _Sent:
        push, previous = self._push(chain), self._digest[chain]
        digest = block_digest(previous, [np.array(push.sequence)])
        refs = [
            shard.push.remote(SUBJECT, push, previous, digest, self._observables, losses, self._mean_losses)
            for shard, losses in zip(self._shards, self._losses, strict=True)
        ]
        self._sequence[chain], self._digest[chain] = push.sequence + 1, digest
        return _Sent(chain, ready, refs, len(refs))

    def _push(self, chain: int) -> PushId:
        return PushId(self._plan.run, chain, Incarnation(1, 1), self._sequence[chain])


@dataclass
class _Sent:
    chain: int
    ready: float  # monotonic time when it could have been sent
    refs: list[ray.ObjectRef]
    num_missing: int  # answers


def _check(refs: list[ray.ObjectRef]) -> None:
    for answer in ray.get(refs):
        if answer.verdict is not Verdict.APPLIED:
            raise SystemExit(f"a shard answered {answer.verdict} to a push in order")


def measure(setting: Setting, method: str, *arguments: float) -> Any:
    """Start shards and a generator, run one method of it, and end them."""
    observables = tuple(f"observable-{n}" for n in range(setting.observables))
    # So many draws planned that none of the measurements comes to the end of a chain.
    plan = LedgerPlan("benchmark", observables, setting.columns, 10**9, NUM_BATCHES, setting.num_chains)
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))
        shards = [
            AggregatorShard.remote(
                "benchmark", {SUBJECT: plan}, shard, setting.num_shards, storage, setting.snapshot_seconds
            )
            for shard in range(setting.num_shards)
        ]
        generator = Generator.remote(setting, plan, shards)
        try:
            return ray.get(getattr(generator, method).remote(*arguments))
        finally:
            for actor in (generator, *shards):
                ray.kill(actor)


def flat_out(seconds: float) -> list[dict[str, Any]]:
    """MB/s of a shard, for all blocks, numbers of shards, with snapshots and without."""
    print(f"{'draws x columns x observables':>30}{'shards':>8}{'snapshots':>11}{'pushes/s':>10}{'MB/s a shard':>14}")
    rows = []
    for (draws, columns, observables), num_shards, every in itertools.product(BLOCKS, SHARDS, (NEVER, 1.0)):
        setting = Setting(draws, columns, observables, num_shards, 4, every)
        rate = measure(setting, "flat_out", seconds)
        speed = rate * draws * columns * 4 / 1e6 / num_shards
        print(
            f"{f'{draws} x {columns:,} x {observables}':>30}{num_shards:>8}{'off' if every == NEVER else 'on':>11}"
            f"{rate:>10.0f}{speed:>14.1f}",
            flush=True,
        )
        rows.append(setting._asdict() | {"pushes_per_second": rate, "megabytes_per_second_and_shard": speed})
    return rows


def paced(period: float, columns: int, bound: float) -> list[dict[str, Any]]:
    """Latencies for more and more chains, with snapshots; says for how many nothing waits."""
    print(f"\n10 draws x {columns:,} columns x 2 observables, a push every {period:g} s of every chain")
    print(f"{'chains':>8}{'shards':>8}{'p50, ms':>10}{'p99, ms':>10}{'held up':>10}")
    rows, largest = [], 0
    for num_chains, num_shards in [*((chains, 1) for chains in CHAINS), (CHAINS[-1], 2)]:
        setting = Setting(10, columns, 2, num_shards, num_chains, 10.0)
        # Half of the chains have a third push, which is held up if the first is still under way.
        found = measure(setting, "paced", period, 2.5 * period)
        p50, p99, held = found["p50"] * 1e3, found["p99"] * 1e3, found["held"]
        print(f"{num_chains:>8}{num_shards:>8}{p50:>10.1f}{p99:>10.1f}{held:>10.1%}", flush=True)
        rows.append(setting._asdict() | found)
        if num_shards == 1 and found["p99"] <= bound and not held:
            largest = num_chains
    print(f"with one shard, {largest} chains push without waiting (p99 up to {bound:g} s)")
    return rows


def main() -> None:
    """Measure both, and print the tables."""
    parser = argparse.ArgumentParser(description="What a shard of the aggregator takes.")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of one measurement flat out; the others take thrice"
    )
    parser.add_argument("--period", type=float, default=10.0, help="between two pushes of a chain [s]")
    parser.add_argument("--columns", type=int, default=4_096, help="probe columns of the paced chains")
    parser.add_argument("--bound", type=float, default=0.5, help="p99 above which pushes count as waiting [s]")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    args = parser.parse_args()
    with ray_session(1):
        rows = {
            "flat_out": flat_out(args.seconds),
            "paced": paced(args.period, args.columns, args.bound),
        }
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
