"""The ledger takes every draw once, whatever the pushes, and says which chains are left out."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patterning_dist.response.ledger import ChainRecord, Ledger, read_chains

NAMES, NUM_COLUMNS, NUM_DRAWS = ["induction", "overall"], 5, 24


def draws(seed=0, num=NUM_DRAWS):
    rng = np.random.default_rng(seed)
    observables = rng.normal(size=(num, 2)) + 3
    losses = rng.normal(size=(num, NUM_COLUMNS)) + observables[:, :1]
    return observables, losses, losses.mean(axis=1)


def make_ledger(*chains):
    ledger = Ledger(NAMES, NUM_COLUMNS, NUM_DRAWS, 4)
    for chain in chains:
        ledger.open(chain)
    return ledger


def push_all(ledger, chain, seed, sizes=(10, 10, 4)):
    data, start = draws(seed), 0
    for number, size in enumerate(sizes):
        assert ledger.push(chain, number, *(part[start : start + size] for part in data)) == "applied"
        start += size
    return data


def stored(ledger, folder):
    ledger.write(folder)
    return read_chains(folder)


def covariance(data):
    observables, losses = data[0] - data[0].mean(axis=0), data[1] - data[1].mean(axis=0)
    return observables.T @ losses


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, NUM_DRAWS - 1)), seed=st.integers(0, 20))
def test_pushes_of_any_size_give_the_two_pass_covariance(tmp_path_factory, cuts, seed):
    edges = [0, *sorted(cuts), NUM_DRAWS]
    ledger = make_ledger(3)
    data = push_all(ledger, 3, seed, np.diff(edges).tolist())
    (moments,), excluded = stored(ledger, tmp_path_factory.mktemp("ledger"))
    total = moments.total()
    assert (moments.chain, total.count, excluded) == (3, NUM_DRAWS, {})
    np.testing.assert_allclose(total.comoment, covariance(data), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(total.mean_loss, data[1].mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(total.m2_phi, ((data[0] - data[0].mean(axis=0)) ** 2).sum(axis=0), rtol=1e-10)


def test_a_second_push_of_the_same_draws_changes_nothing(tmp_path):
    once, twice = make_ledger(0), make_ledger(0)
    data = push_all(once, 0, 1)
    for number, start in enumerate((0, 10, 20)):
        block = [part[start : start + 10] for part in data]
        assert twice.push(0, number, *block) == "applied"
        assert twice.push(0, number, *block) == "duplicate"
        assert twice.push(0, 0, *(part[:10] + 5 for part in data)) == "duplicate"
    assert once.num_recorded == twice.num_recorded == NUM_DRAWS
    a, b = stored(once, tmp_path / "a")[0][0], stored(twice, tmp_path / "b")[0][0]
    for name, value in a.state_dict().items():
        np.testing.assert_array_equal(value, b.state_dict()[name])
    assert pq.read_table(tmp_path / "a" / "traces.parquet").equals(pq.read_table(tmp_path / "b" / "traces.parquet"))


def test_a_gap_is_refused_and_leaves_no_trace():
    ledger = make_ledger(7)
    block = [part[:10] for part in draws()]
    ledger.push(7, 0, *block)
    with pytest.raises(ValueError, match="chain 7: push 2 came before push 1"):
        ledger.push(7, 2, *block)
    assert ledger.num_recorded == 10
    assert ledger.push(7, 1, *block) == "applied"


def test_opening_again_drops_the_earlier_attempt(tmp_path):
    ledger = make_ledger(0, 1)
    other = push_all(ledger, 1, 5)
    ledger.push(0, 0, *(part[:10] for part in draws(9)))
    ledger.open(0)
    assert ledger.num_recorded == NUM_DRAWS
    data = push_all(ledger, 0, 2)
    chains, _ = stored(ledger, tmp_path)
    assert [moments.chain for moments in chains] == [0, 1]
    for moments, wanted in zip(chains, (data, other), strict=True):
        np.testing.assert_allclose(moments.total().comoment, covariance(wanted), rtol=1e-10, atol=1e-10)


def test_chains_do_not_mix_and_traces_are_those_of_the_draws(tmp_path):
    ledger = make_ledger(4, 2)
    data = {4: draws(4), 2: draws(2)}
    for number, start in enumerate(range(0, NUM_DRAWS, 6)):
        for chain in (2, 4):  # in turns, as two workers push
            ledger.push(chain, number, *(part[start : start + 6] for part in data[chain]))
    for chain in (4, 2):
        ledger.close(ChainRecord(chain, steps=100 + chain, seconds=1.5), {"center_losses": np.arange(5.0) + chain})
    chains, _ = stored(ledger, tmp_path)
    assert [moments.chain for moments in chains] == [2, 4]
    table = pq.read_table(tmp_path / "traces.parquet")
    assert table.column_names == ["chain", "draw", "loss", *NAMES]
    chain = table["chain"].to_numpy()
    for number in (2, 4):
        rows = chain == number
        np.testing.assert_array_equal(table["draw"].to_numpy()[rows], np.arange(NUM_DRAWS))
        np.testing.assert_array_equal(table["loss"].to_numpy()[rows], data[number][2])
        np.testing.assert_array_equal(table["overall"].to_numpy()[rows], data[number][0][:, 1])
    with np.load(tmp_path / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["4/center_losses"], np.arange(5.0) + 4)
    records = json.loads((tmp_path / "chains.json").read_text())
    assert records[0] == {"chain": 2, "healthy": True, "reason": "", "draws": 24, "steps": 102, "seconds": 1.5}


def test_unhealthy_chains_are_left_out_with_their_reason(tmp_path):
    ledger = make_ledger(0, 1, 11)
    push_all(ledger, 0, 0)
    push_all(ledger, 11, 3)
    ledger.push(1, 0, *(part[:10] for part in draws(1)))
    ledger.close(ChainRecord(0), {})
    ledger.close(ChainRecord(1, healthy=False, reason="the loss became nan at step 7"), {})
    ledger.close(ChainRecord(11), {})
    chains, excluded = stored(ledger, tmp_path)
    assert [moments.chain for moments in chains] == [0, 11]
    assert excluded == {1: "the loss became nan at step 7"}
    # Chain 1 and chain 11 are told apart, and what chain 1 had is on disk for whoever looks into it.
    np.testing.assert_allclose(chains[1].total().comoment, covariance(draws(3)), rtol=1e-10, atol=1e-10)
    records = {r["chain"]: r for r in json.loads((tmp_path / "chains.json").read_text())}
    assert records[1]["draws"] == 10
    traces = pq.read_table(tmp_path / "traces.parquet")
    assert (traces["chain"].to_numpy() == 1).sum() == 10


def test_a_chain_that_lacks_draws_is_left_out_whatever_its_record_says(tmp_path):
    ledger = make_ledger(0, 1)
    push_all(ledger, 0, 1)
    push_all(ledger, 1, 2, sizes=(10,))
    ledger.close(ChainRecord(1, healthy=True), {})
    chains, excluded = stored(ledger, tmp_path)
    assert [moments.chain for moments in chains] == [0]
    assert excluded == {1: "10 of 24 draws recorded"}
