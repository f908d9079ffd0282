"""A model of the user's own: the example runs as it stands and says something true; a study takes it from a file."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist import PatterningError, Posterior, sample_chains

pytestmark = [pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_runs_and_says_something_true(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(ROOT / "examples" / "digits.py"), run_name="__main__")
    sampled, measured, digits = names["sampled"], names["measured"], names["digits"][:1400].numpy()
    assert sampled.excluded == {} and sampled.observable_names == ["component_loss", "eights"]
    assert measured.chi.shape == (2, 1400)
    assert np.isfinite(measured.standard_error).all() and (measured.standard_error > 0).all()
    assert np.abs(measured.chi.sum(axis=1)).max() < 1e-9 * np.abs(measured.chi).sum()
    # More weight on eights lowers the loss on eights, in every chain; more weight on the others raises it.
    per_chain = np.array([chi[1, digits == 8].mean() for chi in measured.chi_per_chain])
    assert per_chain.mean() < -4.5 * per_chain.std(ddof=1) / np.sqrt(len(per_chain))
    assert (per_chain < 0).all()
    assert (digits[names["most"].numpy()] == 8).mean() > 0.7  # one sample in ten is an eight
    said = capsys.readouterr().out
    assert "local learning coefficient: " in said and "lower the loss on eights most are [" in said
    code = (ROOT / "examples" / "digits.py").read_text().split('"""', 2)[2].splitlines()
    assert len([line for line in code if line.strip()]) <= 30


@pytest.mark.slow
def test_a_study_of_it_from_a_file(tmp_path: Path) -> None:
    overrides = [
        "num_draws=24",
        "burn_in=60",
        "num_chains=3",
        "probe_sequences=100",
        "num_batches=4",
        "extrapolate=true",
    ]
    options = [argument for override in overrides for argument in ("--set", f"sampling.{override}")]
    script = "from patterning_dist.cli import app_main; app_main()"
    command = [
        sys.executable,
        "-c",
        script,
        "study",
        "configs/study-own-model.yaml",
        "--run-dir",
        str(tmp_path),
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    diagnostics = json.loads((tmp_path / "response" / "diagnostics.json").read_text())["subjects"]
    digits = runpy.run_path(str(ROOT / "examples" / "digits.py"))["digits"][:1400].numpy()
    plain = [f"{c}/{p}" for c in ("early", "final") for p in ("everything", "0.weight+0.bias")]
    assert list(diagnostics) == [name for subject in plain for name in (subject, f"{subject}~half-step")]
    for subject, found in diagnostics.items():
        assert subject in done.stdout
        assert found["num_chains"] == 3 and found["excluded"] == []
        checkpoint, _, component = subject.partition("/")
        table = pq.read_table(tmp_path / "response" / checkpoint / f"susceptibility-{component}.parquet")
        assert table.num_rows == 100
        assert "position" not in table.column_names  # a sample has one loss
        for name in ("component", "held_out", "eights", "llc", "free_energy"):
            chi = table[f"chi_{name}"].to_numpy().astype(np.float64)
            assert abs(chi.sum()) < 1e-5 * np.abs(chi).sum()
        eights = digits[table["sample_id"].to_numpy()] == 8
        chi = table["chi_eights"].to_numpy()
        assert chi[eights].mean() < chi[~eights].mean()
    assert diagnostics["final/everything"]["num_coordinates"] == 64 * 32 + 32 + 32 * 10 + 10
    assert diagnostics["final/0.weight+0.bias"]["num_coordinates"] == 64 * 32 + 32
    for subject in plain:
        full, half = diagnostics[subject], diagnostics[f"{subject}~half-step"]
        at_0 = full["extrapolated"]["LLC"]
        assert at_0["value"] == pytest.approx(2 * half["llc"]["value"] - full["llc"]["value"])
        assert at_0["bias"]["value"] == pytest.approx(full["llc"]["value"] - half["llc"]["value"])
        checkpoint, _, component = subject.partition("/")
        names = (f"susceptibility-{component}{which}.parquet" for which in ("", "~half-step", "~extrapolated"))
        full, half, at_0 = (pq.read_table(tmp_path / "response" / checkpoint / name) for name in names)
        for name in ("held_out", "llc"):
            chi, halved, extrapolated = (table[f"chi_{name}"].to_numpy() for table in (full, half, at_0))
            np.testing.assert_allclose(extrapolated, 2 * halved - chi, rtol=1e-5, atol=1e-9)
    with xr.open_datatree(tmp_path / "response.zarr", engine="zarr") as tree:
        assert tree["early/0.weight+0.bias/posterior"]["eights"].shape == (3, 24)


LINE = TensorDataset(torch.linspace(-1, 1, 30)[:, None], torch.linspace(-2, 2, 30)[:, None])


def squared_error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum(dim=1)


def line(slope: float = 2.0) -> nn.Linear:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(slope)
        model.bias.fill_(0)
    return model


SETTINGS = {"posterior": Posterior(50.0, 5.0), "step_size": 0.02, "num_draws": 40, "num_batches": 4}


def test_the_model_is_left_as_it_was_and_chains_depend_on_seed_and_number_alone() -> None:
    model = line().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runs = [
        sample_chains(model, squared_error, LINE, LINE, num_chains=num, seed=seed, **SETTINGS)
        for num, seed in ((3, 0), (2, 0), (2, 1))
    ]
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert runs[0].losses.shape == (3, 40) and runs[0].traces.shape == (3, 40, 1)
    np.testing.assert_array_equal(runs[0].losses[:2], runs[1].losses)
    assert np.abs(runs[1].losses - runs[2].losses).max() > 1e-3
    np.testing.assert_allclose(runs[0].losses, runs[0].traces[:, :, 0], atol=1e-12)
    np.testing.assert_allclose(runs[0].center_losses, 0, atol=1e-12)
    for number, moments in enumerate(runs[0].chains):
        assert moments.chain == number and moments.num_recorded == 40
        assert moments.total().mean_loss.mean() == pytest.approx(runs[0].losses[number].mean())


def test_a_failed_chain_is_said_and_if_all_fail_it_is_an_error() -> None:
    def edge(model: nn.Module) -> torch.Tensor:
        slope = model.weight.sum()
        return torch.where(slope > 2.35, torch.nan, slope)

    sampled = sample_chains(line(), squared_error, LINE, LINE, num_chains=8, observables={"edge": edge}, **SETTINGS)
    assert 0 < len(sampled.excluded) < 8
    assert all(reason.startswith("a loss or observable is not finite at draw") for reason in sampled.excluded.values())
    healthy = [number for number in range(8) if number not in sampled.excluded]
    assert [moments.chain for moments in sampled.chains] == healthy
    assert sampled.traces.shape == (len(healthy), 40, 2) and np.isfinite(sampled.traces).all()
    with pytest.raises(PatterningError, match="none of 4 chains came through; chain 0: a loss or observable is not"):
        sample_chains(
            line(), squared_error, LINE, LINE, observables={"nan": lambda model: torch.tensor(torch.nan)}, **SETTINGS
        )


def test_only_the_component_moves() -> None:
    def weights(model: nn.Module) -> torch.Tensor:
        return model.weight.sum()

    sampled = sample_chains(
        line(), squared_error, LINE, LINE, component="bias", observables={"weights": weights}, **SETTINGS
    )
    assert np.abs(sampled.traces[:, :, 1]).max() == 0
    assert sampled.losses[:, 1:].min() > 0  # without burn-in the first draw is the checkpoint itself
    with pytest.raises(PatterningError, match=r"component 'bais' does not exist in this model; there are: everything"):
        sample_chains(line(), squared_error, LINE, LINE, component="bais", **SETTINGS)
