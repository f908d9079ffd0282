"""The ledger takes every draw once, whatever the pushes and shards, and says which chains are left out."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patterning_dist.aggregation.files import read_chains, write_subject
from patterning_dist.aggregation.ledger import ChainRecord, Ledger, LedgerPlan
from patterning_dist.aggregation.protocol import START, Incarnation, PushId, Verdict, block_digest
from patterning_dist.errors import PatterningError
from patterning_dist.storage.store import LocalStorage

NAMES, NUM_COLUMNS, NUM_DRAWS = ("induction", "overall"), 5, 24
UNIT, RUN = "final/layer.0", "run"


def draws(seed=0, num=NUM_DRAWS):
    rng = np.random.default_rng(seed)
    observables = rng.normal(size=(num, 2)) + 3
    losses = rng.normal(size=(num, NUM_COLUMNS)) + observables[:, :1]
    return observables, losses, losses.mean(axis=1)


def block(data, start, stop):
    return tuple(part[start:stop] for part in data)


class Shards:
    """The ledgers of all shards, and what a chain knows of its own pushes."""

    def __init__(self, root, num_chains=1, num_shards=2, damaged=lambda message: None, run=RUN):
        self.root, self.plan = root, LedgerPlan(run, NAMES, NUM_COLUMNS, NUM_DRAWS, 4, num_chains)
        storage = LocalStorage(root)
        self.ledgers = [Ledger(self.plan, s, num_shards, storage, UNIT, damaged) for s in range(num_shards)]
        self.digests = {chain: [START] for chain in range(num_chains)}

    def id(self, chain, sequence, attempt=1):
        return PushId(self.plan.run, chain, Incarnation(1, attempt), sequence)

    def send(self, chain, sequence, arrays, attempt=1):
        """Verdict on the push after ``sequence`` others; the same on all shards."""
        known, (observables, losses, means) = self.digests[chain], arrays
        previous = known[sequence] if sequence < len(known) else b"of a push that never was"
        digest = block_digest(previous, arrays)
        verdicts = set()
        for ledger in self.ledgers:
            columns = losses[:, ledger.columns]
            answer = ledger.push(self.id(chain, sequence, attempt), previous, digest, observables, columns, means)
            verdicts.add(answer.verdict)
        if verdicts == {Verdict.APPLIED}:
            known.append(digest)
        (verdict,) = verdicts
        return verdict

    def send_all(self, chain, seed, sizes=(10, 10, 4)):
        data, start = draws(seed), 0
        for number, size in enumerate(sizes):
            assert self.send(chain, number, block(data, start, start + size)) is Verdict.APPLIED
            start += size
        return data

    def close(self, record, sequence=None):
        known = self.digests[record.chain]
        push = self.id(record.chain, len(known) - 1 if sequence is None else sequence)
        (verdict,) = {ledger.close(push, known[-1], record).verdict for ledger in self.ledgers}
        return verdict

    def stored(self):
        folder = self.root / "sampling" / UNIT
        ledger = self.ledgers[0]
        records = ledger.records()
        write_subject(folder, NAMES, records, [ledger.traces(record.chain) for record in records])
        return read_chains(folder)


def covariance(data):
    observables, losses = data[0] - data[0].mean(axis=0), data[1] - data[1].mean(axis=0)
    return observables.T @ losses


def assert_equal_moments(found, expected):
    for x, y in zip(found, expected, strict=True):
        for name, value in x.state_dict().items():
            np.testing.assert_array_equal(value, y.state_dict()[name], err_msg=name)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, NUM_DRAWS - 1)), seed=st.integers(0, 20), num_shards=st.integers(1, 6))
def test_pushes_of_any_size_give_the_two_pass_covariance(tmp_path_factory, cuts, seed, num_shards):
    """With six shards of five columns one shard has none."""
    edges = [0, *sorted(cuts), NUM_DRAWS]
    shards = Shards(tmp_path_factory.mktemp("ledger"), 1, num_shards)
    data = shards.send_all(0, seed, np.diff(edges).tolist())
    assert shards.close(ChainRecord(0)) is Verdict.APPLIED
    (moments,), excluded = shards.stored()
    total = moments.total()
    assert (moments.chain, total.count, excluded) == (0, NUM_DRAWS, {})
    np.testing.assert_allclose(total.comoment, covariance(data), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(total.mean_loss, data[1].mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(total.m2_loss, ((data[1] - data[1].mean(axis=0)) ** 2).sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(total.m2_phi, ((data[0] - data[0].mean(axis=0)) ** 2).sum(axis=0), rtol=1e-10)
    for ledger in shards.ledgers:  # the last column of every shard is the mean of all
        (moments,) = ledger.part().chains
        np.testing.assert_allclose(moments.total().mean_loss[-1], data[2].mean(), rtol=1e-10)


def test_a_second_push_of_the_same_draws_changes_nothing(tmp_path):
    once, twice = Shards(tmp_path / "a"), Shards(tmp_path / "b")
    data = once.send_all(0, 1)
    for number, (start, stop) in enumerate(((0, 10), (10, 20), (20, 24))):
        assert twice.send(0, number, block(data, start, stop)) is Verdict.APPLIED
        assert twice.send(0, number, block(data, start, stop)) is Verdict.DUPLICATE
        assert twice.send(0, 0, block(data, 0, 10)) is Verdict.DUPLICATE
        assert twice.send(0, 0, tuple(part[:10] + 5 for part in data)) is Verdict.CONFLICT
    for shards in (once, twice):
        assert shards.close(ChainRecord(0)) is Verdict.APPLIED
    a, b = once.stored()[0], twice.stored()[0]
    assert a[0].num_recorded == NUM_DRAWS
    assert_equal_moments(a, b)
    tables = [pq.read_table(shards.root / "sampling" / UNIT / "traces.parquet") for shards in (once, twice)]
    assert len(tables[0]) == NUM_DRAWS and tables[0].equals(tables[1])


def test_a_gap_is_refused_and_leaves_no_trace(tmp_path):
    shards = Shards(tmp_path)
    data = draws()
    assert shards.send(0, 0, block(data, 0, 10)) is Verdict.APPLIED
    assert shards.send(0, 2, block(data, 20, 24)) is Verdict.GAP
    assert shards.close(ChainRecord(0), sequence=2) is Verdict.GAP
    assert shards.ledgers[0].records() == [None]
    assert len(shards.ledgers[0].traces(0)) == 10
    assert shards.send(0, 1, block(data, 10, 20)) is Verdict.APPLIED
    assert shards.send(0, 2, block(data, 20, 24)) is Verdict.APPLIED
    assert shards.close(ChainRecord(0)) is Verdict.APPLIED
    np.testing.assert_allclose(shards.stored()[0][0].total().comoment, covariance(data), rtol=1e-10, atol=1e-10)


def test_opening_goes_on_with_the_earlier_attempt_and_fences_it(tmp_path):
    shards = Shards(tmp_path, 2)
    other, data = shards.send_all(1, 5), draws(9)
    assert shards.send(0, 0, block(data, 0, 10)) is Verdict.APPLIED
    for ledger in shards.ledgers:
        answer, record = ledger.open(shards.id(0, 0, attempt=2))
        assert (answer.mark, answer.durable, record) == (1, 0, None)
    assert shards.send(0, 1, block(data, 10, 20)) is Verdict.ZOMBIE
    for number, (start, stop) in enumerate(((10, 20), (20, 24)), 1):
        assert shards.send(0, number, block(data, start, stop), attempt=2) is Verdict.APPLIED
    assert shards.close(ChainRecord(0)) is Verdict.ZOMBIE
    for ledger in shards.ledgers:
        ledger.close(shards.id(0, 3, attempt=2), shards.digests[0][-1], ChainRecord(0))
    shards.close(ChainRecord(1))
    chains, _ = shards.stored()
    assert [moments.chain for moments in chains] == [0, 1]
    for moments, wanted in zip(chains, (data, other), strict=True):
        np.testing.assert_allclose(moments.total().comoment, covariance(wanted), rtol=1e-10, atol=1e-10)


def test_opening_anew_drops_the_earlier_attempt_and_its_snapshots(tmp_path):
    shards = Shards(tmp_path, 2)
    other = shards.send_all(1, 5)
    assert shards.send(0, 0, block(draws(9), 0, 10)) is Verdict.APPLIED
    for ledger in shards.ledgers:
        ledger.snapshot(0)
        answer, record = ledger.open(shards.id(0, 0, attempt=2), restart=True)
        assert (answer.mark, answer.durable, record) == (0, 0, None)
        assert ledger.snapshots[0].numbers() == []
    shards.digests[0] = [START]
    data = draws(2)
    for number, start in enumerate(range(0, NUM_DRAWS, 8)):
        assert shards.send(0, number, block(data, start, start + 8), attempt=2) is Verdict.APPLIED
    for ledger in shards.ledgers:  # the same question once more, late: it is not asked twice of one attempt
        answer, _ = ledger.open(shards.id(0, 0, attempt=2), restart=True)
        assert answer.mark == 3
        ledger.close(shards.id(0, 3, attempt=2), shards.digests[0][-1], ChainRecord(0))
    shards.close(ChainRecord(1))
    for moments, wanted in zip(shards.stored()[0], (data, other), strict=True):
        np.testing.assert_allclose(moments.total().comoment, covariance(wanted), rtol=1e-10, atol=1e-10)


def test_a_push_that_cannot_be_taken_in_leaves_no_mark(tmp_path):
    shards = Shards(tmp_path, 1, 1)
    observables, losses, means = block(draws(0), 0, 10)
    spoilt = losses.copy()
    spoilt[3, 2] = np.nan
    with pytest.raises(PatterningError, match=r"chain 0, draw 3: probe loss 2 is nan"):
        shards.send(0, 0, (observables, spoilt, means))
    assert shards.send(0, 0, (observables, losses, means)) is Verdict.APPLIED


def test_chains_do_not_mix_and_traces_are_those_of_the_draws(tmp_path):
    shards = Shards(tmp_path, 3)
    data = {chain: draws(chain) for chain in (0, 1, 2)}
    for ledger in shards.ledgers:
        ledger.open(shards.id(1, 0), np.append(np.arange(5.0)[ledger.columns], 2.0))
    for number, start in enumerate(range(0, NUM_DRAWS, 6)):
        for chain in (2, 0, 1):  # in turns, as several workers push
            shards.send(chain, number, block(data[chain], start, start + 6))
    assert shards.close(ChainRecord(0, healthy=False, reason="lost")) is Verdict.APPLIED
    for chain in (2, 1):
        assert shards.close(ChainRecord(chain, True, "", 0, 100 + chain, 1.5, [1.1, 0.1 + 0.2])) is Verdict.APPLIED
    chains, _ = shards.stored()
    assert [moments.chain for moments in chains] == [1, 2]
    table = pq.read_table(tmp_path / "sampling" / UNIT / "traces.parquet")
    assert table.column_names == ["chain", "draw", "loss", *NAMES]
    chain = table["chain"].to_numpy()
    for number in (0, 1, 2):
        rows = chain == number
        np.testing.assert_array_equal(table["draw"].to_numpy()[rows], np.arange(NUM_DRAWS))
        np.testing.assert_array_equal(table["loss"].to_numpy()[rows], data[number][2])
        np.testing.assert_array_equal(table["overall"].to_numpy()[rows], data[number][0][:, 1])
    # Of the first healthy chain: all chains start at w*.
    centers = [ledger.part().center_losses for ledger in shards.ledgers]
    assert [center.tolist() for center in centers] == [[0, 1, 2], [2, 3, 4, 2]]
    records = json.loads((tmp_path / "sampling" / UNIT / "chains.json").read_text())
    wanted = {"chain": 1, "healthy": True, "reason": "", "draws": 24, "steps": 101, "seconds": 1.5}
    assert records[1] == wanted | {
        "temperatures": [1.1, 0.1 + 0.2],
        "step_biases": [],
        "stiff_temperatures": [],
        "spectrum": [],
    }


def test_unhealthy_chains_are_left_out_with_their_reason(tmp_path):
    shards = Shards(tmp_path, 12)
    healthy = [chain for chain in range(12) if chain != 1]
    data = {chain: shards.send_all(chain, chain) for chain in healthy}
    shards.send(1, 0, block(draws(1), 0, 10))
    for chain in healthy:
        shards.close(ChainRecord(chain))
    # A chain may fail with pushes under way that never arrived.
    reason = "the loss became nan at step 7"
    assert shards.close(ChainRecord(1, healthy=False, reason=reason), sequence=3) is Verdict.APPLIED
    chains, excluded = shards.stored()
    assert [moments.chain for moments in chains] == healthy
    assert excluded == {1: reason}
    assert all(ledger.part().excluded == {1: reason} for ledger in shards.ledgers)
    # Chain 1 and chain 11 are distinguished, and what chain 1 had is on disk for whoever looks into it.
    np.testing.assert_allclose(chains[-1].total().comoment, covariance(data[11]), rtol=1e-10, atol=1e-10)
    folder = tmp_path / "sampling" / UNIT
    records = {r["chain"]: r for r in json.loads((folder / "chains.json").read_text())}
    assert records[1]["draws"] == 10
    assert (pq.read_table(folder / "traces.parquet")["chain"].to_numpy() == 1).sum() == 10


def test_a_chain_that_lacks_draws_is_left_out_whatever_its_record_says(tmp_path):
    shards = Shards(tmp_path, 2)
    shards.send_all(0, 1)
    shards.send_all(1, 2, sizes=(10,))
    for chain in (0, 1):
        assert shards.close(ChainRecord(chain, healthy=True)) is Verdict.APPLIED
    chains, excluded = shards.stored()
    assert [moments.chain for moments in chains] == [0]
    assert excluded == {1: "10 of 24 draws recorded"}
    assert all(ledger.part().excluded == excluded for ledger in shards.ledgers)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_shard_that_was_lost_goes_on_from_its_snapshot(tmp_path, kept):
    """Of one shard of two; the others' pushes are sent again, and the end is the same bit for bit."""
    undisturbed, shards = Shards(tmp_path / "a"), Shards(tmp_path / "b")
    data = undisturbed.send_all(0, 4)
    undisturbed.close(ChainRecord(0))
    blocks = [block(data, start, stop) for start, stop in ((0, 10), (10, 20), (20, 24))]
    for number, arrays in enumerate(blocks):
        shards.send(0, number, arrays)
        if number + 1 == kept:
            shards.ledgers[0].open(shards.id(0, 0), np.array([1.0, 2.0, 5.0]))
            shards.ledgers[0].snapshot(0)
            assert shards.ledgers[0].volatile() == []
    assert shards.ledgers[0].volatile() == ([] if kept == 3 else [0])
    known = shards.digests[0]
    reborn = shards.ledgers[0] = Ledger(shards.plan, 0, 2, LocalStorage(tmp_path / "b"), UNIT)
    answer, record = reborn.open(shards.id(0, 0))
    assert (answer.mark, answer.durable, record) == (kept, kept, None)
    assert reborn.push(shards.id(0, 0, attempt=0), START, known[1], *blocks[0]).verdict is Verdict.ZOMBIE
    for number in range(kept, 3):
        observables, losses, means = blocks[number]
        push = shards.id(0, number), known[number], known[number + 1]
        assert reborn.push(*push, observables, losses[:, reborn.columns], means).verdict is Verdict.APPLIED
    shards.close(ChainRecord(0))
    assert_equal_moments(shards.stored()[0], undisturbed.stored()[0])
    np.testing.assert_array_equal(reborn.traces(0), undisturbed.ledgers[0].traces(0))
    assert reborn.part().center_losses.tolist() == ([1, 2, 5] if kept else [0, 0, 0])
    # A closed chain is closed for whoever comes later, without a further snapshot.
    again = Ledger(shards.plan, 0, 2, LocalStorage(tmp_path / "b"), UNIT)
    assert again.open(shards.id(0, 0, attempt=2))[1] == ChainRecord(0, draws=NUM_DRAWS)


def test_snapshots_that_are_damaged_or_of_other_inputs_are_not_gone_on_with(tmp_path):
    shards = Shards(tmp_path, 2)
    for chain in (0, 1):
        shards.send_all(chain, chain)
        shards.close(ChainRecord(chain))
    (file,) = (tmp_path / "sampling" / UNIT / "shard-1").glob("chain-0.*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = []
    found = Shards(tmp_path, 2, damaged=told.append)
    assert [[record is None for record in ledger.records()] for ledger in found.ledgers] == [
        [False, False],
        [True, False],
    ]
    expected = f"sampling/{UNIT}/shard-1/{file.name} is damaged (its contents have another digest); it is not used"
    assert told == [expected]
    with pytest.raises(PatterningError, match=r"chains \[0\] are not through; run them first"):
        found.ledgers[1].part()
    with pytest.raises(PatterningError, match=r"shard-1: .* is damaged .*; delete the folder of this component and"):
        shards.stored()
    # What was made of other inputs goes: its numbers would outlive those of a shorter run.
    other = Shards(tmp_path, 2, run="other").ledgers[0]
    assert other.records() == [None, None]
    assert other.snapshots[0].numbers() == []
