"""A study, a run with stages sample and report: tables, diagnostics and the tree follow from the chains, and those from
the configuration alone; what is done is not done again, and what fails is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
import yaml
from arviz_stats.base import array_stats
from click.testing import Result
from interrupting import interrupted
from study_models import make_study, study_config
from typer.testing import CliRunner

from patterning_dist.aggregation.files import read_chains
from patterning_dist.cli import app
from patterning_dist.config import Config
from patterning_dist.driver import run_stages
from patterning_dist.measure.plans import subject_plans
from patterning_dist.measure.subjects import Subjects
from patterning_dist.response.llc import free_energy_response, llc_response
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.traces import trace_store
from patterning_dist.stages.sample import open_subjects
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SUBJECTS = [
    f"{checkpoint}/{component}" for checkpoint in ("early", "final") for component in ("layer.0.head.1", "layer.1.mlp")
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = make_study(tmp_path_factory.mktemp("study"))
    settings = yaml.safe_load(file.read_text())
    settings["sampling"]["observables"].append({"kind": "controlled", "name": "up_controlled", "of": "up"})
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(file: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    run_stages(study_config(file, "traces.thin=3"), None, directory)
    return directory


def open_here(config: Config) -> Subjects:
    """The subjects in this process."""
    return open_subjects(config, Location.at(Path()), "cpu")("cpu", Ranks())


def events(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def table(directory: Path, subject: str, suffix: str = "") -> dict[str, np.ndarray]:
    checkpoint, _, component = subject.partition("/")
    found = pq.read_table(directory / "response" / checkpoint / f"susceptibility-{component}{suffix}.parquet")
    return {name: found[name].to_numpy() for name in found.column_names}


def chains_by_hand(file: Path, subject: str) -> tuple[list[CoMoments], list[np.ndarray], np.ndarray, list[Any]]:
    """The chains of a subject in this process, without Ray: moments, losses [draw, column], losses at the checkpoint,
    and what became of the controlled observables.

    As in an aggregator shard, the mean loss L is the last column of the moments.
    """
    config = study_config(file)
    prepare_process(1)  # as in a worker
    study = open_here(config)
    chains, losses, results = [], [], []
    for number in range(config.sampling.num_chains):
        chain = study.chain(subject, number)
        draws = list(chain.draws())
        observables = np.stack([draw.observables for draw in draws])
        losses.append(np.stack([draw.losses for draw in draws]))
        mean_losses = np.array([[draw.mean_loss] for draw in draws])
        columns = np.concatenate([losses[-1].astype(np.float32), mean_losses], axis=1)
        moments = CoMoments.empty(number, len(draws), observables.shape[1], columns.shape[1], 4)
        for start in range(0, len(draws), 5):  # as the workers push them
            moments.update(observables[start : start + 5], columns[start : start + 5])
        chains.append(moments)
        results.append(chain.statistics["controlled"].result())
    return chains, losses, np.append(chain.center_losses, chain.center_mean_loss), results


def test_chains_on_ray_are_those_of_this_process_and_tables_follow_from_them(finished: Path, file: Path) -> None:
    """Also in another order of subjects, and after other chains on the same model: each begins at the checkpoint."""
    for subject in (SUBJECTS[3], SUBJECTS[0]):
        chains, losses, center_losses, results = chains_by_hand(file, subject)
        stored, excluded = read_chains(finished / "sampling" / subject)
        assert excluded == {}
        for a, b in zip(stored, chains, strict=True):
            np.testing.assert_array_equal(a.comoment, b.comoment[..., :-1])
            np.testing.assert_array_equal(a.mean_loss, b.mean_loss[..., :-1])
        entries = 5 * 7
        weights = np.append(np.zeros(entries + 5), 1)
        chi = susceptibility(chains, loss_weights=weights)
        found = table(finished, subject)
        for k, name in enumerate(("component", "up", "all", "norm")):
            np.testing.assert_array_equal(found[f"chi_{name}"], chi.chi[k, :entries].astype(np.float32))
            np.testing.assert_array_equal(found[f"se_{name}"], chi.standard_error[k, :entries].astype(np.float32))
        llc = llc_response(chains, 0, 200.0, loss_weights=weights)
        free_energy = free_energy_response(chains, center_losses, loss_weights=weights)
        for name, expected in (("llc", llc), ("free_energy", free_energy)):
            np.testing.assert_array_equal(found[f"chi_{name}"], expected.chi[0, :entries].astype(np.float32))
            np.testing.assert_array_equal(found[f"se_{name}"], expected.standard_error[0, :entries].astype(np.float32))
        controlled = susceptibility([CoMoments.from_state_dict(r) for r in results], loss_weights=weights)
        np.testing.assert_array_equal(found["chi_up_controlled"], controlled.chi[0, :entries].astype(np.float32))
        error = controlled.standard_error[0, :entries]
        np.testing.assert_array_equal(found["se_up_controlled"], error.astype(np.float32))
        np.testing.assert_array_equal(found["center_loss"], center_losses[:entries].astype(np.float32))
        # Per-token traces, every third draw, written by the workers.
        with xr.open_zarr(trace_store(finished, subject)) as traces:
            expected = np.stack([chain[::3, :entries] for chain in losses]).astype(np.float32)
            np.testing.assert_array_equal(traces["losses"].values, expected)


def test_weights_for_a_controlled_loss(file: Path, local_ray: None, tmp_path: Path) -> None:
    """By the linear control, which is held against the plain covariance; what responds in the check is the loss."""
    solve = {"component": "layer.0.head.1", "checkpoint": "final", "scores": "plain", "targets": {"up_controlled": -1}}
    solve |= {"effective_sample_share": 0.8, "min_reliability": -1}
    overrides = ["sampling.probe_sequences=40", "sampling.observables.6.control=linear", f"solve={json.dumps(solve)}"]
    run_stages(study_config(file, *overrides, "check.strengths=[-0.1, 0.1]"), None, tmp_path / "run")
    solution = json.loads((tmp_path / "run" / "weights" / "solution.json").read_text())
    assert set(solution["control_agreement"]["up_controlled"]) >= {"slope_samples", "slope_interval_entries"}
    checked = json.loads((tmp_path / "run" / "check" / "response.json").read_text())["strengths"]["+0.1"]
    assert checked["up_controlled"]["value"] == checked["up"]["value"] != 0
    predicted = solution["arms"]["plus"]["predicted_response"]["up_controlled"]["value"]
    assert checked["up_controlled"]["predicted"] == pytest.approx(0.1 * predicted)
    assert (
        checked["up"]["predicted"] != checked["up_controlled"]["predicted"]
    )  # chi of the probe, and what is solved for


def test_split_losses_are_means_over_the_domains(file: Path) -> None:
    """At w* itself: `overall` is the mean of the two domains, of equal size, and `up` that of its own samples."""
    study = open_here(study_config(file))
    target = study.target(SUBJECTS[0])
    _, up, everything, _ = target.measure().observables.tolist()
    assert study.held_out is not None and len(study.held_out.samples) == 6  # a third of nine sequences of each
    losses = {
        domain: study.task.losses(study.model("early"), study.task.held_out[domain][np.arange(9)]).detach()
        for domain in ("up", "down")
    }
    assert {len(part) for part in study.held_out.samples.parts} == {3}
    means = {
        domain: losses[domain][part.ids].double().mean().item()
        for domain, part in zip(("up", "down"), study.held_out.samples.parts, strict=True)
    }
    assert up == pytest.approx(means["up"], rel=1e-6)
    assert everything == pytest.approx((means["up"] + means["down"]) / 2, rel=1e-6)


def test_tables_say_what_they_hold(finished: Path, file: Path) -> None:
    study = open_here(study_config(file))
    for subject in SUBJECTS:
        found, samples = table(finished, subject), table(finished, subject, "-samples")
        assert len(found["sequence_id"]) == 5 * 7 and len(samples["sequence_id"]) == 5
        tokens = study.task.train.tokens(study.probe.ids)
        np.testing.assert_array_equal(found["token"].reshape(5, 7), tokens[:, 1:])
        np.testing.assert_array_equal(found["position"], np.tile(np.arange(1, 8), 5))
        np.testing.assert_array_equal(found["sequence_id"], np.repeat(study.probe.ids, 7))
        assert set(found["domain"]) == {"up", "down"}
        assert samples["domain"].tolist() == ["up" if i < 20 else "down" for i in study.probe.ids]
        for name in ("component", "up", "all", "norm", "llc", "free_energy", "up_controlled"):
            chi = found[f"chi_{name}"].astype(np.float64)
            if name == "norm" and subject.endswith("head.1"):  # of an MLP, which stands still
                assert not chi.any()
                continue
            assert abs(chi.sum()) < 1e-5 * np.abs(chi).sum()  # L is the mean over these very losses
            means = chi.reshape(5, 7).mean(axis=1)  # chi is linear in the loss
            np.testing.assert_allclose(samples[f"chi_{name}"], means, rtol=1e-4, atol=1e-5 * np.abs(chi).max())
            assert np.isfinite(found[f"se_{name}"]).all() and (found[f"se_{name}"] > 0).all()
        checkpoint, _, component = subject.partition("/")
        schema = pq.read_table(finished / "response" / checkpoint / f"susceptibility-{component}.parquet").schema
        header = json.loads(schema.metadata[b"patterning"])
        assert header["sign"].startswith("chi = -Cov(phi, l_i - L): negative means")
        assert (header["checkpoint"], header["component"]) == (checkpoint, component)
        assert (header["inverse_temperature"], header["num_training_losses"]) == (200, 40 * 7)
    assert not np.array_equal(
        table(finished, SUBJECTS[1])["chi_component"], table(finished, SUBJECTS[3])["chi_component"]
    )


def test_the_tree_holds_what_the_tables_and_diagnostics_say(finished: Path) -> None:
    diagnostics = json.loads((finished / "response" / "diagnostics.json").read_text())["subjects"]
    assert list(diagnostics) == SUBJECTS
    with xr.open_datatree(finished / "response.zarr", engine="zarr") as tree:
        for subject in SUBJECTS:
            node, found = tree[subject], diagnostics[subject]
            assert node.attrs["inverse_temperature"] == 200 and node.attrs["seed"] == 5
            assert (finished / node.attrs["traces"]).is_dir()
            assert list(node["posterior"].sizes.items()) == [("chain", 3), ("draw", 16)]
            assert set(found["observables"]) == {"loss", "component", "up", "all", "norm"}
            for name, entry in found["observables"].items():
                trace = node["posterior"][name].values
                assert entry["mean"] == pytest.approx(trace.mean(), abs=1e-12)
                if entry["rhat"] is not None:
                    assert entry["rhat"] == pytest.approx(array_stats.rhat(trace, method="rank"))
                    assert entry["ess_bulk"] == pytest.approx(array_stats.ess(trace, method="bulk"))
            assert (found["observables"]["norm"]["rhat"] is None) == subject.endswith("head.1")
            llc = found["llc"]
            assert llc["value"] == pytest.approx(200 * node["posterior"]["loss"].values.mean())
            assert llc["interval"][0] < llc["value"] - llc["standard_error"] < llc["value"]
            np.testing.assert_array_equal(
                node["susceptibility"]["chi"].sel(observable="up").values, table(finished, subject)["chi_up"]
            )
            assert node["susceptibility"]["domain"].values.tolist() == table(finished, subject)["domain"].tolist()
    coordinates = [diagnostics[subject]["num_coordinates"] for subject in SUBJECTS]
    assert coordinates == [3 * (8 * 4 + 4) + 4 * 8, 8 * 16 + 16 + 16 * 8 + 8] * 2


def test_what_is_done_is_kept(finished: Path, file: Path, tmp_path: Path, local_ray: None) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)  # keeps the times of the files

    def written(*names: str) -> dict[Path, int]:
        """Times of files of the subjects, of all or of those named."""
        files = [
            file for subject in SUBJECTS for file in (directory / "sampling" / subject).rglob("*") if file.is_file()
        ]
        return {file: file.stat().st_mtime_ns for file in files if not names or file.parent.name in names}

    before = written()
    run_stages(study_config(file, "traces.thin=3"), None, directory)
    assert events(directory)[-1]["kind"] == "kept"
    # Another component is added, on other processes that push otherwise.
    overrides = (
        "traces.thin=3",
        "sampling.components=[{name: layer.0.head.1}, {name: layer.1.mlp}, {name: 'gpt_neox.embed_in.*[0:3,:]'}]",
        "sampling.workers=1",
    )
    run_stages(study_config(file, *overrides, "sampling.draws_per_push=4"), None, directory)
    assert written() == before
    added = "final/gpt_neox.embed_in.*[0:3,:]"
    assert len(read_chains(directory / "sampling" / added)[0]) == 3
    # Other observables follow from the same chains: none is run again, and none takes as long as it did.
    chains = {subject: (directory / "sampling" / subject / "chains.json").read_bytes() for subject in SUBJECTS}
    kept = written("shard-0", "losses")
    assert len(kept) > 4 * 3
    run_stages(study_config(file, *overrides, "sampling.observables.4.name=lambda"), None, directory)
    assert written("shard-0", "losses") == kept
    assert chains == {subject: (directory / "sampling" / subject / "chains.json").read_bytes() for subject in SUBJECTS}
    found, former = table(directory, SUBJECTS[0]), table(finished, SUBJECTS[0])
    np.testing.assert_array_equal(found["chi_lambda"], former["chi_llc"])
    np.testing.assert_array_equal(found["se_up"], former["se_up"])
    assert "chi_lambda" in table(directory, added)


def test_what_chains_follow_from_and_what_not(file: Path, tmp_path: Path) -> None:

    folder = tmp_path / "copy"
    shutil.copytree(file.parent, folder)
    run = RunDirectory(tmp_path / "run")

    def fingerprints(*overrides: str) -> dict[str, str]:
        subjects = open_here(study_config(folder / "study.yaml", *overrides))
        return {name: subject.fingerprint for name, subject in subject_plans(subjects, run).items()}

    first = fingerprints()
    assert first == fingerprints("sampling.ranks_per_chain=2", "sampling.draws_per_push=3", "sampling.min_chains=3")
    assert not set(first.values()) & set(fingerprints("seed=6").values())
    assert not set(first.values()) & set(fingerprints("sampling.sampler={kind: sgnht}").values())
    twice = fingerprints("sampling.extrapolate=true")
    assert {subject: twice[subject] for subject in first} == first and len(set(twice.values())) == 2 * len(first)
    slower = fingerprints("sampling.components.1.step_size=1e-3")
    assert [first[subject] == slower[subject] for subject in SUBJECTS] == [True, False, True, False]
    weights = folder / "model" / "final" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second = fingerprints()
    assert [first[subject] == second[subject] for subject in SUBJECTS] == [True, True, False, False]
    table = pq.read_table(folder / "train.parquet")
    pq.write_table(table.slice(1), folder / "train.parquet")
    assert not set(second.values()) & set(fingerprints().values())


def test_a_failed_chain_is_left_out_and_reported(file: Path, tmp_path: Path, local_ray: None) -> None:
    overrides = (
        "model.checkpoints=[final]",
        "sampling.components=[{name: layer.1.mlp}]",
        "sampling.num_chains=5",
        "sampling.observables.3={kind: function, names: [edge], path: 'study_models:undefined_on_one_side'}",
    )
    run_stages(study_config(file, *overrides), None, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "response" / "diagnostics.json").read_text())["subjects"][SUBJECTS[3]]
    assert [entry["chain"] for entry in found["excluded"]] == [1, 2]
    assert found["num_chains"] == 3
    for entry in found["excluded"]:
        assert entry["reason"].startswith("a loss or observable is not finite at draw")
    told = [e for e in events(tmp_path / "run") if e["kind"] == "chain_excluded"]
    assert {e["chain"]: e["reason"] for e in told} == {e["chain"]: e["reason"] for e in found["excluded"]}
    assert found["findings"][0]["mode"] == "diverged"
    assert found["findings"][0]["chains"] == [entry["chain"] for entry in found["excluded"]]
    with xr.open_datatree(tmp_path / "run" / "response.zarr", engine="zarr") as tree:
        healthy = sorted({*range(5)} - {entry["chain"] for entry in found["excluded"]})
        assert tree[SUBJECTS[3]]["posterior"]["chain"].values.tolist() == healthy


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["sampling.components=[{name: layer.2.mlp}]"], "component 'layer.2.mlp' does not exist in this model; there"),
        (["model.checkpoints=[early, last]"], "has no folder 'last'; there are early, and final for the model itself"),
        (["model.path=../nowhere"], "model.path: there is no folder ../nowhere; give that of a model, or a name on"),
        (["data.train=nowhere.parquet"], "nowhere.parquet: no such file or folder"),
        (
            ["data.context_length=100"],
            "sequences of 100 tokens need 99 positions, and the model has 8; set",
        ),
        (["data.column=ids"], "no column 'ids'"),
        (["sampling.observables.3.path=nowhere:norm"], "observable function 'nowhere:norm' cannot be loaded"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    file: Path, tmp_path: Path, overrides: list[str], text: str
) -> None:
    for command in (["config", "check"], ["study", "--run-dir", str(tmp_path / "run")]):
        options = [argument for override in overrides for argument in ("--set", override)]
        result = CliRunner().invoke(app, [*command, str(file), *options])
        assert result.exit_code == 2
        assert text in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run" / "sampling").exists()


def test_tokens_that_the_model_does_not_know(file: Path, tmp_path: Path) -> None:
    wrong = pq.read_table(file.parent / "up.parquet").to_pylist()
    wrong[3]["input_ids"][2] = 24
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(wrong), tmp_path / "wrong.parquet")
    result = CliRunner().invoke(
        app, ["config", "check", str(file), "--set", f"data.held_out.up={tmp_path}/wrong.parquet"]
    )
    assert result.exit_code == 2
    assert "wrong.parquet row 3: token 24 in column 'input_ids', and the model's vocabulary ends at 23" in result.stderr


def places(directory: Path, subject: str) -> list[int | None]:
    """Pushes from which every chain of a subject is to go on; None: the chain is through (16 draws in 4 pushes)."""
    folder, found = directory / "sampling" / subject, []
    for chain in range(3):
        taken_in = max((int(path.name.split(".")[1]) for path in folder.glob(f"shard-0/chain-{chain}.*")), default=0)
        kept = [int(path.name.split(".")[1]) for path in folder.glob(f"checkpoints/chain-{chain}-rank-0.*")]
        found.append(None if taken_in == 4 else max((number for number in kept if number <= taken_in), default=0))
    return found


def wait_until_still(file: Path) -> None:
    """Until a file has not grown for two seconds."""
    size, since = -1, time.monotonic()
    while time.monotonic() < since + 2:
        if (now := file.stat().st_size) != size:
            size, since = now, time.monotonic()
        time.sleep(0.05)


def test_an_interrupted_study_goes_on_where_its_chains_were(
    finished: Path, file: Path, tmp_path: Path, local_ray: None
) -> None:
    """Stopped by Ctrl-C in the middle of a chain of the second subject; the result is that of the undisturbed study."""
    directory, word = tmp_path / "run", Path(os.environ["TESTS_FOLDER"])
    overrides = (
        "traces.thin=3",
        "sampling.workers=1",
        "sampling.snapshot_seconds=0",
        "sampling.observables.3={kind: function, names: [norm], path: 'study_models:watched_norm'}",
    )
    options = [argument for override in overrides for argument in ("--set", override)]

    def study() -> Result:
        return CliRunner().invoke(app, ["study", str(file), "--run-dir", str(directory), *options])

    done, begun = (
        directory / "sampling" / SUBJECTS[0] / "chains.json",
        directory / "sampling" / SUBJECTS[1] / "checkpoints",
    )
    (word / "slow").touch()
    first = interrupted(study, lambda: done.exists() and any(begun.glob("*")), signal.SIGINT)
    assert first.exit_code == 130, first.output
    assert not (directory / "sampling" / SUBJECTS[3] / "chains.json").exists()
    wait_until_still(word / "calls")  # the worker is killed when Ray has seen that its driver is gone
    before, left = done.stat().st_mtime_ns, [place for subject in SUBJECTS for place in places(directory, subject)]
    assert left[:3] == [None] * 3 and max(place for place in left if place is not None) > 0

    (word / "slow").unlink()
    (word / "calls").unlink()
    second = study()
    assert second.exit_code == 0, second.output
    assert "of 4 subjects were done before" in second.stdout
    assert done.stat().st_mtime_ns == before
    assert [event["subject"] for event in events(directory) if event["kind"] == "subject_resumed"][:1] == [SUBJECTS[1]]
    # Every chain that was not through measured its centre again, and then the draws that were left, 5 a push.
    assert (word / "calls").stat().st_size == sum(1 + 16 - 5 * place for place in left if place is not None)
    for subject in SUBJECTS:
        stored, expected = (read_chains(folder / "sampling" / subject) for folder in (directory, finished))
        assert stored[1] == expected[1] == {}
        for a, b in zip(stored[0], expected[0], strict=True):
            for name, value in b.state_dict().items():
                np.testing.assert_array_equal(a.state_dict()[name], value, err_msg=name)
        files = [pq.read_table(folder / "sampling" / subject / "traces.parquet") for folder in (directory, finished)]
        assert files[0].equals(files[1])
        for name, column in table(finished, subject).items():
            np.testing.assert_array_equal(table(directory, subject)[name], column, err_msg=name)
        with xr.open_zarr(trace_store(directory, subject)) as a, xr.open_zarr(trace_store(finished, subject)) as b:
            assert a.equals(b)
        # What the user sees at the end.
        assert subject.partition("/")[2] in second.stdout
    assert "LLC" in second.stdout and "±" in second.stdout


def test_two_ranks_a_chain_give_the_chains_of_one(finished: Path, file: Path, tmp_path: Path, local_ray: None) -> None:
    """To the rounding of float32: the model is cut over the ranks, noise and minibatches are the same."""
    overrides = (
        "model.checkpoints=[final]",
        "sampling.components=[{name: layer.0.head.1}]",
        "sampling.ranks_per_chain=2",
        "sampling.micro_batch_size=3",
        "traces.thin=3",
    )
    run_stages(study_config(file, *overrides), None, tmp_path / "run")
    subject = SUBJECTS[2]
    one, two = (read_chains(directory / "sampling" / subject)[0] for directory in (finished, tmp_path / "run"))
    for a, b in zip(one, two, strict=True):
        spread = np.sqrt(a.total().m2_loss / a.num_recorded)
        assert np.abs(a.total().mean_loss - b.total().mean_loss).max() < 1e-3 * spread.max()
        np.testing.assert_allclose(a.total().comoment, b.total().comoment, atol=1e-3 * np.abs(a.total().comoment).max())
    with xr.open_zarr(trace_store(finished, subject)) as a, xr.open_zarr(trace_store(tmp_path / "run", subject)) as b:
        np.testing.assert_allclose(a["losses"].values, b["losses"].values, atol=1e-3 * float(a["losses"].std()))
        assert float(np.abs(a["losses"]).max()) > 0.1


def test_the_full_baseline_is_that_of_the_same_checkpoint(file: Path, local_ray: None, tmp_path: Path) -> None:
    components = "sampling.components=[{name: layer.1.mlp}, {name: everything}]"
    config = study_config(file, "response.baseline=full", components)
    run_stages(config, ["sample"], tmp_path / "run")
    for checkpoint in ("early", "final"):
        component, full = (
            read_chains(tmp_path / "run" / "sampling" / checkpoint / name)[0] for name in ("layer.1.mlp", "everything")
        )
        expected = susceptibility(component, baseline="full", full=full)
        found = table(tmp_path / "run", f"{checkpoint}/layer.1.mlp")["chi_component"]
        np.testing.assert_allclose(found, expected.chi[0, : len(found)], rtol=1e-5, atol=1e-9)
