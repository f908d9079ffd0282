"""However the probe columns are cut up, the parts write the tables that all columns together give."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from patterning_dist.aggregation.ledger import ChainRecord, Ledger, LedgerPlan
from patterning_dist.aggregation.protocol import START, Incarnation, PushId, Verdict, block_digest
from patterning_dist.errors import PatterningError
from patterning_dist.measure.analysis import Analysis, TablePlan
from patterning_dist.response.diagnostics import split_rhat
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.reliability import reliability_from_sums, split_half_reliability
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.storage.snapshots import Snapshots, pack
from patterning_dist.storage.store import LocalStorage

NUM_CHAINS, NUM_DRAWS, NUM_BATCHES, LOST = 5, 32, 4, 1
NUM_SAMPLES, NUM_POSITIONS = 3, 4
ENTRIES = NUM_SAMPLES * NUM_POSITIONS  # then a column of means for every sample: 15 altogether
NAMES, INVERSE_TEMPERATURE = ("component", "other"), 20.0
CENTER = np.random.default_rng(8).uniform(1, 4, ENTRIES)
# Five parts: the first four hold no sample's mean, the last holds nothing else. Of twenty parts five hold no column.
PARTS = [1, 2, 5, 20]


def with_means(losses):
    means = losses.reshape(*losses.shape[:-1], NUM_SAMPLES, NUM_POSITIONS).mean(axis=-1)
    return np.concatenate([losses, means], axis=-1)


def make_draws(chain, seed=0):
    """Observables, losses as they are sent, and mean losses; of neighbouring draws that are not independent."""
    rng = np.random.default_rng((seed, chain))
    common = np.cumsum(rng.normal(size=(NUM_DRAWS, 3)), axis=0) * 0.3
    losses = rng.normal(size=(NUM_DRAWS, ENTRIES)) + common @ np.random.default_rng(9).normal(size=(3, ENTRIES)) + 0.5
    mean = losses.mean(axis=1)
    return np.stack([mean, common[:, 0] - 0.3], axis=1), with_means(losses).astype(np.float32), mean


def plan(run):
    return LedgerPlan(run, NAMES, ENTRIES + NUM_SAMPLES, NUM_DRAWS, NUM_BATCHES, NUM_CHAINS)


def make_parts(storage, subject, num_parts, seed=0):
    """What every shard holds of a subject of which one chain was lost."""
    ledgers = [Ledger(plan(subject), part, num_parts, storage, subject) for part in range(num_parts)]
    for chain in range(NUM_CHAINS):
        observables, losses, means = make_draws(chain, seed)
        digest = block_digest(START, (observables, losses, means))
        first, end = (PushId(subject, chain, Incarnation(1, 1), sequence) for sequence in (0, 1))
        record = ChainRecord(chain) if chain != LOST else ChainRecord(chain, False, "its node went away")
        for ledger in ledgers:
            ledger.open(first, np.append(with_means(CENTER)[ledger.columns], CENTER.mean()))
            answer = ledger.push(first, START, digest, observables, losses[:, ledger.columns], means)
            assert answer.verdict is Verdict.APPLIED
            assert ledger.close(end, digest, record).verdict is Verdict.APPLIED
    return [ledger.part() for ledger in ledgers]


def whole(seed=0):
    """Co-moments of the healthy chains over all columns."""
    chains = []
    for chain in range(NUM_CHAINS):
        if chain != LOST:
            observables, losses, _ = make_draws(chain, seed)
            chains.append(CoMoments.empty(chain, NUM_DRAWS, len(NAMES), ENTRIES + NUM_SAMPLES, NUM_BATCHES))
            chains[-1].update(observables, losses)
    return chains


def make_analysis(storage, **changes):
    index = {
        "sequence_id": np.repeat(np.array([3, 5, 8]), NUM_POSITIONS),
        "position": np.tile(np.arange(1, NUM_POSITIONS + 1, dtype=np.int16), NUM_SAMPLES),
    }
    tables = [
        TablePlan("response/chi.parquet", 0, index),
        TablePlan("response/chi-samples.parquet", ENTRIES, {"sequence_id": np.array([3, 5, 8])}),
    ]
    settings = {
        "storage": storage,
        "subject": "x",
        "observables": NAMES,
        "tables": tables,
        "metadata": {"component": "x"},
        "min_chains": 2,
        "inverse_temperature": INVERSE_TEMPERATURE,
        "llc": ["lambda"],
        "free_energy": ["F"],
    }
    return Analysis(**settings | changes)


WEIGHTS = np.concatenate([np.ones(ENTRIES), np.zeros(NUM_SAMPLES)])


def tolerance(seed=0):
    """How far a row of chi may be off [nats times the unit of the observable], but for its own rounding to float32.

    Shards have L in float64, and all columns together have it as a mean of losses rounded to float32: it is off by
    up to 2^-24 of the largest loss. In a covariance that comes times the largest observable, at most twice (once by
    deviations from a mean); standard errors are the spread of such covariances.
    """
    draws = [make_draws(chain, seed) for chain in range(NUM_CHAINS)]
    return (
        2 * 2.0**-24 * max(np.abs(losses).max() for _, losses, _ in draws) * max(np.abs(o).max() for o, _, _ in draws)
    )


def assert_tables(tmp_path, expected, scale=1.0):
    """Rows of both tables against name -> Susceptibility row, chi and standard error [column]."""
    chains = whole()
    rhat = split_rhat(chains)
    tables = [pq.read_table(tmp_path / "response" / name) for name in ("chi.parquet", "chi-samples.parquet")]
    assert [len(table) for table in tables] == [ENTRIES, NUM_SAMPLES]
    assert tables[0]["sequence_id"].to_pylist() == [3] * 4 + [5] * 4 + [8] * 4
    assert tables[0]["position"].to_pylist() == [1, 2, 3, 4] * 3
    assert tables[1]["sequence_id"].to_pylist() == [3, 5, 8]
    for table, columns in zip(tables, (slice(0, ENTRIES), slice(ENTRIES, None)), strict=True):
        np.testing.assert_array_equal(table["center_loss"], with_means(CENTER)[columns].astype(np.float32))
        np.testing.assert_allclose(table["rhat"], rhat[columns], rtol=2.0**-23)
        for name, (chi, error) in expected.items():
            atol = scale * tolerance() * (INVERSE_TEMPERATURE if name == "lambda" else 1)
            assert np.abs(chi[columns]).max() > 1e4 * atol
            np.testing.assert_allclose(table[f"chi_{name}"], chi[columns], rtol=2.0**-23, atol=atol, err_msg=name)
            np.testing.assert_allclose(table[f"se_{name}"], error[columns], rtol=2.0**-23, atol=atol, err_msg=name)


def rows_of(measured):
    return dict(zip(NAMES, zip(measured.chi, measured.standard_error, strict=True), strict=True))


def write_controlled(storage):
    """Products of another observable, as the chains of subject x leave them; chi and its errors of the columns."""
    chains = []
    for chain in (0, 2, 3, 4):
        observables, losses, means = make_draws(chain)
        chains.append(CoMoments.empty(chain, NUM_DRAWS, 1, ENTRIES + NUM_SAMPLES + 1, NUM_BATCHES))
        chains[-1].update(observables[:, 1:] - observables[:, :1], np.column_stack([losses, means]))
        content = pack(chains[-1].state_dict())
        Snapshots(storage, "sampling/x/controlled", f"chain-{chain}").write(1, content)
    measured = susceptibility(chains, loss_weights=np.append(0 * WEIGHTS, 1))
    return measured.chi[0, :-1], measured.standard_error[0, :-1]


@pytest.mark.parametrize("num_parts", PARTS)
def test_parts_write_the_tables_of_the_whole(tmp_path, num_parts):
    storage = LocalStorage(tmp_path)
    parts = make_parts(storage, "x", num_parts)
    controlled = write_controlled(storage)
    found = [make_analysis(storage, controlled=["controlled"])(part) for part in parts]
    chains = whole()
    measured = susceptibility(chains, loss_weights=WEIGHTS)
    llc = llc_response(chains, 0, INVERSE_TEMPERATURE, loss_weights=WEIGHTS)
    free_energy = free_energy_response(chains, with_means(CENTER), loss_weights=WEIGHTS)
    extra = {name: (row.chi[0], row.standard_error[0]) for name, row in (("lambda", llc), ("F", free_energy))}
    assert_tables(tmp_path, rows_of(measured) | extra | {"controlled": controlled})
    for summary in found:
        assert summary.chains == (0, 2, 3, 4)
        assert summary.excluded == {LOST: "its node went away"}
    written = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "response").rglob("*.parquet/*"))
    assert sorted(file for summary in found for file in summary.files) == written
    assert len(written) == {1: 2, 2: 3, 5: 5, 20: 15}[num_parts]
    header = json.loads(pq.read_schema(tmp_path / written[0]).metadata[b"patterning"])
    assert header == {"component": "x", "baseline": "restricted", "num_chains": 4, "num_draws": NUM_DRAWS}


@pytest.mark.parametrize("num_parts", PARTS)
def test_sums_of_the_parts_are_the_reliability_of_the_whole(tmp_path, num_parts):
    storage = LocalStorage(tmp_path)
    found = [make_analysis(storage)(part) for part in make_parts(storage, "x", num_parts)]
    chi = susceptibility(whole(), loss_weights=WEIGHTS).chi_per_chain
    for table, columns in enumerate((slice(0, ENTRIES), slice(ENTRIES, None))):
        got = reliability_from_sums(sum(summary.reliability[table] for summary in found))
        wanted = split_half_reliability(chi[:, :, columns])
        # L, known to more digits in the parts, moves a row as a whole, and a correlation does not see that.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9)
        assert (np.abs(wanted) < 0.999).all()


@pytest.mark.parametrize("num_parts", PARTS)
def test_the_posterior_of_the_whole_model_as_baseline(tmp_path, num_parts):
    """Of another subject, from its snapshots, and of the subject itself."""
    storage = LocalStorage(tmp_path)
    everything = make_parts(storage, "everything", num_parts, seed=1)
    parts = make_parts(storage, "x", num_parts)
    changes = {"baseline": "full", "llc": (), "free_energy": ()}
    analysis = make_analysis(storage, **changes, full=plan("everything"))
    for part in parts:
        analysis(part)
    chains, full = whole(), whole(seed=1)
    measured = susceptibility(chains, loss_weights=WEIGHTS, baseline="full", full=full)
    both = (tolerance() + tolerance(seed=1)) / tolerance()
    assert_tables(tmp_path, rows_of(measured), scale=both)
    restricted = susceptibility(chains, loss_weights=WEIGHTS)
    assert np.abs(restricted.chi - measured.chi).max() > 1e4 * tolerance()
    file = next((tmp_path / "response" / "chi.parquet").iterdir())
    assert json.loads(pq.read_schema(file).metadata[b"patterning"])["baseline"] == "full"

    itself = make_analysis(LocalStorage(tmp_path / "self"), **changes)
    for part in parts:
        itself(part)
    assert_tables(
        tmp_path / "self", rows_of(susceptibility(chains, loss_weights=WEIGHTS, baseline="full", full=chains))
    )
    # Of other inputs than those that were sampled there is nothing.
    other = make_analysis(storage, **changes, full=replace(plan("everything"), run="other inputs"))
    with pytest.raises(PatterningError, match=r"chains \[0, 1, 2, 3, 4\] are not through"):
        other(everything[0])


def test_too_few_healthy_chains_are_an_error_in_every_part(tmp_path):
    storage = LocalStorage(tmp_path)
    for part in make_parts(storage, "x", 5):
        with pytest.raises(PatterningError) as caught:
            make_analysis(storage, min_chains=5)(part)
        assert str(caught.value) == (
            "4 healthy chains, expected at least 5 (min_chains): chain 1 excluded: its node went away; "
            "mend what stopped them or lower min_chains"
        )
    assert not (tmp_path / "response").exists()
