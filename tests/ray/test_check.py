"""What stage check measures of a linear regression, against the Gaussian posterior of every strength in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import regression_task
import yaml

from patterning_dist.config import load_config
from patterning_dist.driver import run_stages
from patterning_dist.errors import PatterningError
from patterning_dist.response.coupled import integrated
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.open import open_task

pytestmark = pytest.mark.usefixtures("local_ray")
N_BETA, GAMMA, STEP_SIZE, STRENGTHS = 30.0, 9.0, 6e-3, (-0.3, 0.3, 1.0)
SETTINGS: dict[str, Any] = {
    "name": "regression",
    "seed": 1,
    "device": "cpu",
    "data": {"kind": "function", "load": "regression_task:load"},
    "model": {
        "kind": "module",
        "build": "regression_task:build",
        "per_sample_loss": "regression_task:per_sample_loss",
    },
    "sampling": {
        "components": [{"name": "everything"}],
        "observables": [
            {"kind": "split_loss", "name": "other", "split": "domain:other"},
            {"kind": "free_energy", "name": "F"},
            {"kind": "llc", "name": "lambda"},
            {"kind": "component_loss", "name": "L"},
        ],
        "num_chains": 6,
        "num_draws": 80,
        "burn_in": 50,
        "steps_between_draws": 3,
        "inverse_temperature": N_BETA,
        "localization": GAMMA,
        "step_size": STEP_SIZE,
        "gradient": "full",
        "micro_batch_size": 64,
        "probe_sequences": 40,
    },
    "solve": {
        "component": "everything",
        "scores": "plain",
        "targets": {"other": -1},
        "effective_sample_share": 0.7,
        "weight_max": 3,
    },
    "check": {"strengths": list(STRENGTHS)},
}


def expected(rho: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Means under rho at the step size that the chains have."""
    (x, y), (u, v) = (
        [part.double().numpy() for part in samples.tensors] for samples in (
            regression_task.load()[0], regression_task.load()[1]["other"]
        )
    )  # fmt: skip
    x, u = (np.c_[inputs, np.ones(len(inputs))] for inputs in (x, u[other]))
    center = np.array([0.5, -1.0, 0.3, 0.0])
    precision = N_BETA * (rho[:, None] * x).T @ x / len(x) + GAMMA * np.eye(4)
    mean = np.linalg.solve(precision, N_BETA * x.T @ (rho * y) / len(x) + GAMMA * center)
    covariance = np.linalg.inv(precision) @ np.linalg.inv(np.eye(4) - STEP_SIZE / 4 * precision)

    def losses(inputs: np.ndarray, targets: np.ndarray, at_center: bool = False) -> np.ndarray:
        if at_center:
            return 0.5 * (inputs @ center - targets) ** 2
        return 0.5 * ((inputs @ mean - targets) ** 2 + np.einsum("id,de,ie->i", inputs, covariance, inputs))

    away = losses(x, y) - losses(x, y, at_center=True)
    return {
        "other": losses(u, v[other]).mean() - losses(u, v[other], at_center=True).mean(),
        "L": away.mean(),
        "lambda": N_BETA * (rho * away).mean(),
        "losses": losses(x, y),
        "away": away,
    }


# Of first moments the free energy is that of the landscape around w*: less n_beta L_rho(w*).
FIRST_MOMENT = {"scores": "first_moment", "draws": "chains", "num_draws": 40, "targets": {"F": 1}}


@pytest.mark.parametrize(("solve", "losses"), [({}, "losses"), (FIRST_MOMENT, "away")], ids=["plain", "first_moment"])
def test_every_row_is_that_of_the_closed_form(tmp_path: Path, solve: dict[str, Any], losses: str) -> None:
    file, run = tmp_path / "experiment.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(SETTINGS | {"solve": SETTINGS["solve"] | solve}))
    config = load_config(file)
    run_stages(config, None, run)
    checked = json.loads((run / "check" / "response.json").read_text())
    h = pq.read_table(run / "weights" / "plus.parquet")["weight"].to_numpy().astype(float) - 1
    assert np.abs(h).max() > 0.5 and abs(h.mean()) < 1e-6
    other = held_out_ids(open_task(config, run, "cpu"), 1, 256, "predicted")["other"]
    exact = {s: expected(1 + s * h, other) for s in (0.0, *STRENGTHS)}
    slopes = {s: np.array([[N_BETA * (h * exact[s][losses]).mean()]]) for s in STRENGTHS}
    for s in STRENGTHS:
        exact[s]["F"] = integrated(slopes, s).item()
    exact[0.0]["F"] = 0.0
    for name in ("other", "L", "lambda", "F"):
        wanted = {s: exact[s][name] - exact[0.0][name] for s in STRENGTHS}
        for s, change in wanted.items():
            found = checked["strengths"][f"{s:+g}"][name]
            # Student's t of 5 degrees: 6.9 is what 4.5 is of a normal number with a one in a thousand chance over all.
            assert abs(found["value"] - change) < 6.9 * found["standard_error"], (name, s)
        slope = checked["slopes"][name]
        assert abs(slope["value"] - (wanted[0.3] - wanted[-0.3]) / 0.6) < 6.9 * slope["standard_error"]
        assert slope["predicted"] == pytest.approx(checked["strengths"]["+1"][name]["predicted"])
        low, high = slope["predicted_interval"]
        assert low < slope["predicted"] < high
    # Errors are small against what is measured.
    assert checked["slopes"]["other"]["standard_error"] < 0.1 * abs(checked["slopes"]["other"]["value"])
    assert checked["slopes"]["other"]["verdict"] == "agrees"
    # Weights for the free energy hardly move L.
    assert checked["slopes"]["L"]["verdict"] == ("agrees" if losses == "losses" else "not resolved")
    # Of the free energy's slope, measured and predicted share what noise they have, if they are of the same draws.
    slope = checked["slopes"]["F"]
    errors = np.hypot(slope["standard_error"], slope["predicted_standard_error"])
    assert abs(slope["value"] - slope["predicted"]) < (0.1 if losses == "losses" else 6.9 * errors)
    assert abs(slope["value"]) > 3 * slope["standard_error"]


def test_a_strength_that_takes_a_weight_below_zero_is_refused_before_any_chain(tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match=r"check.strengths: -0.6 takes weights below 0 .* expected at least -0.5"):
        load(tmp_path, [-0.6, 0.6])
    with pytest.raises(PatterningError, match=r"check.strengths: 1.2 takes weights below 0 .* expected at most 1"):
        load(tmp_path, [1.2])


def load(folder: Path, strengths: list[float]) -> None:
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"check": {"strengths": strengths}}))
    load_config(file)
