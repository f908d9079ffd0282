"""Trials of a study are its chains from the checkpoint on, whether a worker runs them or a group of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from study_models import make_study, study_config
from tiny_run import quiet, subjects_of

from patterning_dist.config import load_config
from patterning_dist.runtime.environment import prepare_process
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.stages.calibrate import calibrate
from patterning_dist.storage.run import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SUBJECT, NUM_DRAWS, STEPS = "early/layer.1.mlp", 12, 6
GRID = (
    "calibration.checkpoint=early",
    "calibration.component=layer.1.mlp",
    "calibration.step_sizes=[2e-2]",
    "calibration.inverse_temperatures=[1]",
    "calibration.localizations=[20]",
    "calibration.num_chains=2",
    f"calibration.num_draws={NUM_DRAWS}",
    f"calibration.steps_between_draws={STEPS}",
    "calibration.standard_error=5",  # of so few draws no bias shows
    # The norm of a layer is a sum over ranks, which an observable must do itself.
    "sampling.observables=[{kind: component_loss, name: component}, {kind: split_loss, name: up, split: domain:up}]",
)
# Losses of a few nats lie 2.4e-7 apart in float32; sums over ranks round otherwise, and seventy steps carry it on.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


def trials(directory: Path) -> list[np.ndarray]:
    """Losses [draw, sample] of every chain."""
    files = sorted((directory / "calibration" / "trials").glob("eps*.npz"))
    assert [file.name for file in files] == [
        f"eps-0.02_n-beta-1_gamma-20_chain-{c}_{STEPS}-steps.npz" for c in range(2)
    ]
    found = []
    for file in files:
        with np.load(file) as stored:
            found.append(stored["losses"])
    return found


def test_a_worker_and_a_group_of_ranks_run_the_chains_of_the_study(file: Path, tmp_path: Path, local_ray: None) -> None:
    config = study_config(file, *GRID)
    prepare_process(1)  # as in a worker
    study = subjects_of(config, tmp_path)
    expected = []
    for number in range(2):
        settings = {"posterior": Posterior(1, 20), "step_size": 2e-2, "burn_in": 0}
        chain = study.chain(SUBJECT, number, num_draws=NUM_DRAWS, steps_between_draws=STEPS, **settings)
        expected.append(np.stack([draw.losses[-5:] for draw in chain.draws()]))
    calibrate(config, RunDirectory(tmp_path / "worker"), quiet())
    for found, losses in zip(trials(tmp_path / "worker"), expected, strict=True):
        assert np.ptp(losses) > 0.01
        np.testing.assert_array_equal(found, losses.astype(np.float32))

    calibrate(study_config(file, *GRID, "sampling.ranks_per_chain=2"), RunDirectory(tmp_path / "group"), quiet())
    for found, losses in zip(trials(tmp_path / "group"), expected, strict=True):
        np.testing.assert_allclose(found, losses, rtol=0, atol=TOLERANCE)

    calibrated = load_config(tmp_path / "worker" / "calibration" / "calibrated.yaml")
    assert calibrated.sampling.step_size == 2e-2 and calibrated.sampling.localization == 20
    assert calibrated.sampling.lanczos_steps == 10
    curvatures = []
    for layout in ("worker", "group"):
        with np.load(tmp_path / layout / "calibration" / "trials" / "curvature.npz") as stored:
            curvatures.append(json.loads(str(stored["header"]))["ends"])
    # Exact products, and differences of gradients.
    assert curvatures[1][:2] == pytest.approx(curvatures[0][:2], rel=0.02) and curvatures[0][1] > 0
    assert calibrated.model == config.model and calibrated.data == config.data
