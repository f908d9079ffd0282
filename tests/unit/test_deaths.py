"""Any process dies at any moment of a run of chains, and chi is that of the undisturbed run, bit for bit.

The driver, its workers, their attempts at chains, the aggregator's shards and all files are the real ones; Ray alone is
``ray_in_process``. Every moment at which something leaves a process is tried with everything that can happen to it.
Kills of real processes are in ``tests/fault/``.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from ray_in_process import Moment, ProcessDied, Strike, World, kinds
from tiny_run import SETTINGS, quiet
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.aggregation.ledger import LedgerPlan, Part
from patterning_dist.aggregation.protocol import Mark, Sender, Verdict
from patterning_dist.config import SamplingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.chains.run import ChainsPlan, Events, run_chains
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.statistics import Draw, PositionMeans
from patterning_dist.sampling.target import Target
from patterning_dist.sampling.traces import TraceRecorder, create_traces
from patterning_dist.storage.snapshots import Snapshots, unpack

NUM_CHAINS, NUM_DRAWS, NUM_SAMPLES = 2, 11, 5
SUBJECT = "early/line"
PLAN = LedgerPlan("run", ("loss", "held out", "slope"), NUM_SAMPLES, NUM_DRAWS, 2, NUM_CHAINS)
# A snapshot about every second push: a second passes with every call.
LAYOUT = {"draws_per_push": 2, "aggregator_shards": 2, "snapshot_seconds": 4.0, "min_chains": 1}
SAMPLING = SamplingConfig(**SETTINGS["sampling"] | LAYOUT)
# Snapshots are two pushes of two draws apart, and a block that was drawn may die with its worker.
MOST_AGAIN = 6
CALL = ("ModelWorker", "AggregatorShard")
LINE = TensorDataset(torch.linspace(-1, 1, NUM_SAMPLES)[:, None], torch.tensor([[-2.0], [-0.5], [0.3], [1.2], [1.9]]))


class Watched(TraceRecorder):
    """Counts the draws of all chains, and dies at one of them."""

    def __init__(self, study: LineStudy, number: int) -> None:
        super().__init__(study.traces, number, 1, NUM_DRAWS)
        self.study, self.number = study, number

    def update(self, draw: Draw, target: Target) -> None:
        if (self.number, draw.number) == self.study.deadly:
            raise ProcessDied(self.study.world.stack[-1])
        self.study.num_draws += 1
        super().update(draw, target)


class LineStudy:
    """Chains of the one subject, on a line through five points with a Gaussian posterior; with every kind of statistic.

    Args:
        traces: where the losses go.
        world: that the chains live in.
        deadly: (chain, draw) at which the worker dies, every time.
    """

    def __init__(self, traces: Any, world: World, deadly: tuple[int, int] | None) -> None:
        self.traces, self.world, self.deadly, self.num_draws = traces, world, deadly, 0

    def chain(self, subject: str, number: int) -> Chain:
        model = nn.Linear(1, 1)
        with torch.no_grad():
            model.weight.fill_(1.9)
            model.bias.fill_(0.2)
        target = Target(
            model,
            select_component(model, "everything"),
            lambda model, batch: 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1),
            LINE,
            LINE,
            held_out=LINE,
            coefficients=torch.full((1, NUM_SAMPLES), 1 / NUM_SAMPLES),
            functions=(lambda model: model.weight.sum()[None],),
            num_component_losses=1,
        )
        settings = ChainSettings(Posterior(50.0, 5.0), 0.02, 3, 1, NUM_DRAWS, 1, seed=1)
        statistics = {"gradients": PositionMeans(target), "losses": Watched(self, number)}
        return Chain(target, settings, number, population=NUM_SAMPLES, statistics=statistics)


def analysis(part: Part) -> dict[str, np.ndarray]:
    """All that a shard knows, and chi of its columns."""
    found = {
        "center_losses": part.center_losses,
        "chi": susceptibility(part.chains, loss_weights=part.loss_weights).chi,
    }
    for chain in part.chains:
        found |= {f"{chain.chain}/{name}": value for name, value in chain.state_dict().items()}
    return found


class Run:
    """One run of chains to its end, by as many drivers as it takes.

    Args:
        strike: what goes wrong, and when.
        damage: one file is changed between two drivers.
        deadly: (chain, draw) at which the worker dies, every time.
    """

    def __init__(
        self,
        strike: Strike = lambda number, moment: None,
        damage: random.Random | None = None,
        deadly: tuple[int, int] | None = None,
    ) -> None:
        self.world, self.events, self.num_drivers = World(strike), Counter[str](), 0
        self.traces = zarr.storage.MemoryStore()
        create_traces(self.traces, NUM_CHAINS, NUM_DRAWS, NUM_SAMPLES, 1)
        self.study = LineStudy(self.traces, self.world, deadly)
        with pytest.MonkeyPatch.context() as patch:
            self.world.install(patch)
            while not hasattr(self, "result"):
                self.num_drivers += 1
                assert self.num_drivers <= 5, "the run does not come to an end"
                try:
                    self._drive()
                except (ProcessDied, KeyboardInterrupt):
                    self.world.restart()
                    if damage is not None:
                        self._damage(damage)
                except PatterningError as error:
                    assert "gave no answer" in str(error), error
                    self.world.restart()

    def _drive(self) -> None:
        events = Events(
            lambda subject, result: setattr(self, "result", result), lambda kind, **fields: self.events.update([kind])
        )
        subjects = {SUBJECT: ChainsPlan(PLAN, analysis)}
        run_chains(
            "run", lambda device, ranks: self.study, SAMPLING, "cpu", self.world.files, subjects, events, quiet()
        )

    def _damage(self, rng: random.Random) -> None:
        contents = self.world.files.contents
        # Not the gradients of chains that are through: to damage those is an error of those who read them.
        if files := sorted(name for name in contents if "/shard-" in name or "/checkpoints/" in name):
            name = rng.choice(files)
            changed = bytearray(contents[name])
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            contents[name] = bytes(changed)

    @property
    def drawn_again(self) -> int:
        return self.study.num_draws - NUM_CHAINS * NUM_DRAWS

    def numbers(self) -> dict[str, np.ndarray]:
        """All that is left of the run, by name."""
        found = {f"shard-{n}/{name}": value for n, part in enumerate(self.result.parts) for name, value in part.items()}
        found |= {f"traces-{n}": trace for n, trace in enumerate(self.result.traces)}
        found["records"] = np.array([(r.chain, r.healthy, r.draws, r.steps) for r in self.result.records])
        found["heat"] = np.array([(r.temperatures, r.step_biases) for r in self.result.records])
        files = self.world.files
        for name in files.names(folder := f"sampling/{SUBJECT}/gradients"):
            found |= {name.partition(".")[0]: value for value in unpack(files.contents[f"{folder}/{name}"]).values()}
        return found | {"losses": zarr.open_group(self.traces, mode="r")["losses"][:]}


@pytest.fixture(scope="module", autouse=True)
def as_in_a_worker():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    run = Run()
    assert not run.events
    assert run.study.num_draws == NUM_CHAINS * NUM_DRAWS
    assert len(run.numbers()) == 2 * (2 + NUM_CHAINS * 8) + 2 * NUM_CHAINS + 3
    assert run.numbers()["heat"].shape == (NUM_CHAINS, 2, NUM_DRAWS - 1)
    return run


def faults(run: Run) -> list[tuple[int, str]]:
    """Every moment of a run, with everything that can happen there."""
    return [(number, kind) for number, moment in enumerate(run.world.moments) for kind in kinds(moment)]


def struck(fault: tuple[int, str]) -> Run:
    return Run(lambda number, moment: fault[1] if number == fault[0] else None)


def differences(run: Run, undisturbed: Run) -> list[str]:
    found, expected = run.numbers(), undisturbed.numbers()
    return [n for n in expected.keys() | found.keys() if not np.array_equal(expected.get(n), found.get(n))]


def test_whatever_dies_at_whatever_moment(undisturbed: Run) -> None:
    tried, again = Counter[str](), Counter[str]()
    for fault in faults(undisturbed):
        run = struck(fault)
        assert not differences(run, undisturbed), (fault, undisturbed.world.moments[fault[0]])
        assert 0 <= run.drawn_again <= MOST_AGAIN, "a chain goes on where it was"
        tried[fault[1]] += 1
        again[fault[1]] += run.drawn_again
    assert len(tried) == 8 and tried.total() > 350
    assert again["stop"] == 0 < min(again[kind] for kind in tried.keys() - {"stop"}), again


def test_several_faults_in_one_run(undisturbed: Run) -> None:
    rng, length, happened = random.Random(7), len(undisturbed.world.moments), 0
    for _ in range(60):
        moments = set(rng.sample(range(length), 4))

        def strike(number: int, moment: Moment, moments: set[int] = moments) -> str | None:
            nonlocal happened
            possible = kinds(moment) if number in moments else ()
            happened += bool(possible)
            return rng.choice(possible) if possible else None

        assert not differences(Run(strike), undisturbed), moments
    assert happened > 150


def test_a_damaged_file_is_said_and_not_used(undisturbed: Run) -> None:
    """A driver is killed and one file of a shard or a chain changed; the next driver goes on from what is left."""
    rng, said = random.Random(5), 0
    calls = [number for number, (who, whom, _) in enumerate(undisturbed.world.moments) if (who, whom) == CALL]
    for number in calls:
        run = Run(lambda n, moment, number=number: "driver" if n == number else None, damage=rng)
        assert not differences(run, undisturbed), number
        said += run.events["damaged"]
    assert said > len(calls) // 4


def test_a_chain_whose_worker_always_dies_is_left_out(undisturbed: Run) -> None:
    """At the same draw every time; the other chain is what it is without it."""
    run = Run(deadly=(1, 7))
    assert run.events["chain_lost"] == 1 + SAMPLING.max_chain_failures
    whole, lost = run.result.records
    assert whole.healthy and not lost.healthy
    assert lost.reason.startswith(f"lost {1 + SAMPLING.max_chain_failures} times without getting beyond draw 7; last: ")
    for part, expected in zip(run.result.parts, undisturbed.result.parts, strict=True):
        assert {name for name in part if name.startswith("1/")} == set()
        for name in part.keys() - {"chi"}:
            np.testing.assert_array_equal(part[name], expected[name], err_msg=name)


def judge_that_counts_twice(mark, push, previous, digest):
    verdict = judge(mark, push, previous, digest)
    return Verdict.APPLIED if verdict is Verdict.DUPLICATE else verdict


def flush_at_the_end(recorder):
    if recorder._end == NUM_DRAWS:
        flush(recorder)


judge, flush = Mark.judge, TraceRecorder.flush
BROKEN = {
    "a push that was taken in is taken in again": (Mark, "judge", judge_that_counts_twice),
    "a checkpoint lacks the sums": (PositionMeans, "load_state_dict", lambda means, state: None),
    "traces are kept back when a checkpoint is written": (TraceRecorder, "flush", flush_at_the_end),
    "a shard that was restarted begins at nothing": (Snapshots, "newest", lambda snapshots: None),
    "checkpoints go before shards can do without": (Sender, "needed", lambda sender, checkpoints: sender.sequence),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_sweep_finds(undisturbed: Run, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[broken])
    assert not differences(Run(), undisturbed), "nothing is to be seen of it as long as nothing dies"
    shuffled = random.Random(3).sample(faults(undisturbed), len(faults(undisturbed)))
    assert any(is_broken(fault, undisturbed) for fault in shuffled)


def is_broken(fault: tuple[int, str], undisturbed: Run) -> bool:
    try:
        run = struck(fault)
        return run.drawn_again > MOST_AGAIN or bool(differences(run, undisturbed))
    except AssertionError:  # it does not come to an end
        return True
