"""The tree of all subjects: xarray and ArviZ read out of it what was put in; traces are kept block by block."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from arviz_stats.base import array_stats

from patterning_dist.errors import PatterningError
from patterning_dist.measure.datatree import response_tree, write_tree
from patterning_dist.measure.results import SubjectResponse
from patterning_dist.response.diagnostics import observable_diagnostics
from patterning_dist.sampling.chain import Draw
from patterning_dist.sampling.traces import TraceRecorder, create_traces, trace_store

SUBJECTS = ["early/h.*.c_fc.weight[0:16,:]+everything", "final/everything"]
INDEX = {
    "sequence_id": np.array([3, 3, 8, 8]),
    "position": np.array([1, 2, 1, 2], np.int32),
    "domain": np.array(["law", "law", "código", "código"], dtype=object),
}


def response(subject: str) -> SubjectResponse:
    """A subject whose chain 1 is left out, with two samples of two losses each."""
    rng = np.random.default_rng(len(subject))
    traces = {name: rng.normal(size=(3, 40)).cumsum(axis=1) for name in ("loss", "component", "prose")}
    return SubjectResponse(
        name=subject,
        rows=["component", "prose", "llc"],
        chi=rng.normal(size=(3, 4)).astype(np.float32),
        standard_error=rng.uniform(size=(3, 4)).astype(np.float32),
        rhat=np.array([1.0, 1.1, np.nan, 1.2], np.float32),
        center_losses=rng.uniform(size=4).astype(np.float32),
        traces=traces,
        chains=(0, 2, 3),
        diagnostics={"observables": observable_diagnostics(traces)},
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    nodes = [
        (response(subject), {"step_size": 0.1, "sampler": {"kind": "sgld"}, "probe": None}) for subject in SUBJECTS
    ]
    tree = response_tree(nodes, INDEX, {"name": "x", "seed": 7, "versions": {"torch": "2", "transformers": None}})
    write_tree(tree, tmp_path / "response.zarr")
    return tmp_path / "response.zarr"


def test_xarray_reads_what_was_written(store: Path) -> None:
    with xr.open_datatree(store, engine="zarr") as tree:
        assert (tree.attrs["name"], tree.attrs["seed"]) == ("x", 7)
        assert json.loads(tree.attrs["versions"]) == {"torch": "2", "transformers": None}
        for subject in SUBJECTS:
            node, expected = tree[subject], response(subject)
            assert json.loads(node.attrs["sampler"]) == {"kind": "sgld"}
            assert node.attrs["step_size"] == 0.1 and "probe" not in node.attrs
            posterior = node["posterior"]
            assert posterior.sizes == {"chain": 3, "draw": 40}
            assert posterior["chain"].values.tolist() == [0, 2, 3]
            for name, trace in expected.traces.items():
                np.testing.assert_array_equal(posterior[name].values, trace)
            chi = node["susceptibility"]
            assert chi["observable"].values.tolist() == ["component", "prose", "llc"]
            np.testing.assert_array_equal(chi["chi"].values, expected.chi)
            np.testing.assert_array_equal(chi["standard_error"].values, expected.standard_error)
            np.testing.assert_array_equal(chi["rhat"].values, expected.rhat)
            np.testing.assert_array_equal(chi["center_loss"].values, expected.center_losses)
            assert chi["domain"].values.tolist() == ["law", "law", "código", "código"]
            law = chi["chi"].sel(observable="prose").where(chi["domain"] == "law", drop=True)
            np.testing.assert_array_equal(law.values, expected.chi[1, :2])


def test_arviz_finds_the_diagnostics_of_the_posterior_group(store: Path) -> None:
    with xr.open_datatree(store, engine="zarr") as tree:
        for subject in SUBJECTS:
            expected = response(subject).diagnostics["observables"]
            for name, trace in tree[subject]["posterior"].data_vars.items():
                assert array_stats.rhat(trace.values, method="rank") == pytest.approx(expected[name]["rhat"], abs=1e-12)
                assert array_stats.ess(trace.values, method="bulk") == pytest.approx(expected[name]["ess_bulk"])


def test_writing_again_leaves_nothing_of_what_was_there(store: Path) -> None:
    write_tree(response_tree([(response(SUBJECTS[1]), {})], INDEX, {}), store)
    with xr.open_datatree(store, engine="zarr") as tree:
        assert list(tree.children) == ["final"]


@pytest.mark.parametrize(("thin", "kept"), [(1, 37), (3, 13), (40, 1)])
def test_traces_hold_every_thin_th_draw_of_every_chain(tmp_path: Path, thin: int, kept: int) -> None:
    """Columns after the probe entries, the means of samples, are left out; a chain that stopped leaves NaN behind."""
    losses = np.random.default_rng(0).normal(size=(3, 37, 7))
    store = trace_store(tmp_path, SUBJECTS[0])
    create_traces(store, 3, 37, 5, thin)
    # Chains are written at once, each by its own recorder, as by different processes.
    recorders = [TraceRecorder(store, chain, thin, 37) for chain in range(3)]
    for number in range(37):
        for chain, recorder in enumerate(recorders):
            if chain < 2 or number < 20:
                recorder.update(Draw(number, np.zeros(1), losses[chain, number], 0.0), None)
    with xr.open_zarr(store) as found:
        assert found["losses"].dims == ("chain", "draw", "sample")
        assert found["losses"].dtype == np.float32
        assert found["draw"].values.tolist() == list(range(0, 37, thin))
        assert found.attrs["units"] == "nats"
        values = found["losses"].values
    assert values.shape == (3, kept, 5)
    np.testing.assert_array_equal(values[:2], losses[:2, ::thin, :5].astype(np.float32))
    whole = zarr.open_group(store, mode="r")["losses"].chunks[1]
    written = len(range(0, 20, thin)) // whole * whole
    np.testing.assert_array_equal(values[2, :written], losses[2, ::thin, :5][:written].astype(np.float32))
    assert np.isnan(values[2, written:]).all()


@pytest.mark.parametrize("thin", [1, 3])
def test_traces_of_a_chain_taken_up_again_in_another_process_have_no_hole(tmp_path: Path, thin: int) -> None:
    """At its checkpoint, draw 21, the chain wrote what it held; what it did after that is done again."""
    losses = np.random.default_rng(0).normal(size=(60, 4))
    create_traces(tmp_path / "t", 1, 60, 4, thin)
    first = TraceRecorder(tmp_path / "t", 0, thin, 60)
    for number in range(37):
        if number == 21:
            first.flush()
        first.update(Draw(number, np.zeros(1), losses[number], 0.0), None)
    second = TraceRecorder(tmp_path / "t", 0, thin, 60)
    for number in range(21, 60):
        second.update(Draw(number, np.zeros(1), losses[number], 0.0), None)
    stored = zarr.open_group(tmp_path / "t", mode="r")["losses"][0]
    np.testing.assert_array_equal(stored, losses[::thin].astype(np.float32))


def test_a_recorder_holds_one_block_however_many_draws(tmp_path: Path) -> None:
    create_traces(tmp_path / "t", 1, 500, 3, 1)
    recorder = TraceRecorder(tmp_path / "t", 0, 1, 500)
    held = []
    for number in range(500):
        recorder.update(Draw(number, np.zeros(1), np.full(3, float(number)), 0.0), None)
        held.append(len(recorder._block))
    assert max(held) == 15 and held[-1] == 0
    assert zarr.open_group(tmp_path / "t", mode="r")["losses"][0, :, 0].tolist() == list(range(500))


def test_arviz_summarises_the_subtree_of_a_unit(store: Path) -> None:
    """ArviZ itself, where it is installed: it takes the node as it is."""
    pytest.importorskip("xarray_einstats")
    pytest.importorskip("arviz_base")
    import arviz_stats

    with xr.open_datatree(store, engine="zarr") as tree:
        for subject in SUBJECTS:
            summary = arviz_stats.summary(tree[subject], round_to=8)
            expected = response(subject).diagnostics["observables"]
            assert set(summary.index) == {"loss", "component", "prose"}
            for name, entry in expected.items():
                assert float(summary.loc[name, "r_hat"]) == pytest.approx(entry["rhat"], abs=1e-6)
                assert float(summary.loc[name, "ess_bulk"]) == pytest.approx(entry["ess_bulk"], rel=1e-4)


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_traces(tmp_path / "t", 1, 4, 3, 1)
    recorder = TraceRecorder(tmp_path / "t", 0, 1, 4)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(PatterningError, match=r"t: cannot be written \(No space left on device\); free some disk"):
        for number in range(4):
            recorder.update(Draw(number, np.zeros(1), np.zeros(3), 0.0), None)
    monkeypatch.setattr(xr.DataTree, "to_zarr", full)
    with pytest.raises(PatterningError, match=r"response\.zarr: cannot be written"):
        write_tree(xr.DataTree(), tmp_path / "response.zarr")
