"""Subjects at half the step size, what is made of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from patterning_dist import PatterningError
from patterning_dist.config.checks import chains
from patterning_dist.config.sampling import SamplingConfig
from patterning_dist.measure.results import SubjectResponse, table_name
from patterning_dist.measure.step_sizes import EXTRAPOLATED, extrapolate_steps
from patterning_dist.measure.subject import HALF_STEP, Subject
from patterning_dist.measure.warnings import _chains
from patterning_dist.report.blocks import FLAG
from patterning_dist.report.chains import _extrapolated
from patterning_dist.response.llc import TraceMean
from patterning_dist.response.moments import CoMoments
from patterning_dist.response.step_extrapolation import step_extrapolated
from patterning_dist.response.susceptibility import susceptibility
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.stages.sample import solved_subjects
from patterning_dist.storage.files import read_parquet, write_parquet

SAMPLING = {
    "components": [{"name": "everything", "burn_in": 7}],
    "observables": [{"kind": "component_loss", "name": "component"}],
    "num_draws": 40,
    "burn_in": 10,
    "steps_between_draws": 3,
    "inverse_temperature": 50,
    "localization": 20,
    "step_size": 1e-3,
    "extrapolate": True,
}


def test_half_the_step_size_takes_twice_the_steps():
    sampling = SamplingConfig.model_validate(SAMPLING)
    full, half = (sampling.resolve("everything", half_step=h) for h in (False, True))
    assert (full.step_size, full.burn_in, full.steps_between_draws) == (1e-3, 7, 3)
    assert half == full.model_copy(update={"step_size": 5e-4, "burn_in": 14, "steps_between_draws": 6})


def test_a_sampler_whose_bias_is_not_linear_is_refused():
    assert list(chains(SamplingConfig.model_validate(SAMPLING))) == []
    (fault,) = chains(SamplingConfig.model_validate(SAMPLING | {"sampler": {"kind": "rmsprop_sgld"}}))
    assert fault.startswith("sampling.extrapolate: the bias of rmsprop_sgld") and "remove the key" in fault


def test_weights_are_solved_from_the_full_step():
    config = SimpleNamespace(solve=SimpleNamespace(checkpoint=None, component="layer.*"), checkpoints=["baseline"])
    plain = Subject("baseline", "layer.0", stream="layer.0")
    by_name = {"layer.0": plain, "layer.0" + HALF_STEP: Subject("baseline", "layer.0", "twin", half_step=True)}
    assert solved_subjects(config, by_name) == ["layer.0"]


def measured(num_chains, num_columns=5):
    """chi of independent draws."""
    rng, found = np.random.default_rng(num_chains), []
    for chain in range(num_chains):
        found.append(CoMoments.empty(chain, 32, 1, num_columns, 4))
        found[-1].update(rng.normal(size=(32, 1)), rng.normal(size=(32, num_columns)))
    return susceptibility(found)


def test_chi_at_step_size_0_is_a_measured_chi_like_any_other():
    coarse, fine = measured(4), measured(3)
    found = step_extrapolated(coarse, fine)
    np.testing.assert_allclose(found.extrapolated.chi, 2 * fine.chi - coarse.chi)
    np.testing.assert_allclose(
        found.extrapolated.standard_error**2, 4 * fine.standard_error**2 + coarse.standard_error**2
    )
    assert found.extrapolated.chi_per_chain.shape == (3, 1, 5) and found.extrapolated.chains == (0, 1, 2)
    # An answer of no error leaves the interval of the other.
    exact = replace(coarse, standard_error=np.zeros((1, 5)), chi=np.zeros((1, 5)))
    for ours, theirs in zip(step_extrapolated(exact, fine).extrapolated.interval(), fine.interval(), strict=True):
        np.testing.assert_allclose(ours, 2 * theirs)
    for other in (measured(3, 4), replace(fine, baseline="full")):
        with pytest.raises(PatterningError, match=r"^fine: shape and baseline .*expected .* as at eps"):
            step_extrapolated(coarse, other)


def test_bias_is_judged_against_the_error_and_against_chance():
    still = step_extrapolated(TraceMean(2.0, 0.0, 9.0), TraceMean(2.0, 0.0, 9.0))
    assert still.extrapolated[:2] == (2.0, 0.0) and np.isnan(still.bias_ratio) and not still.is_biased
    sure, unsure = (step_extrapolated(TraceMean(3.0, se, 60.0), TraceMean(2.0, se, 60.0)) for se in (0.1, 0.5))
    assert sure.extrapolated.value == 1.0 and sure.bias.value == 1.0
    assert sure.extrapolated.standard_error == pytest.approx(0.1 * np.sqrt(5))
    assert sure.bias_ratio == pytest.approx(20) and sure.is_biased
    assert unsure.bias_ratio == pytest.approx(4) and not unsure.is_biased  # 1 +- .7: chance


def response(run, name, chi, error, level):
    """A subject whose table is on the disk."""
    rng = np.random.default_rng(len(name))
    columns = {"sample_id": np.arange(4), "center_loss": np.ones(4), "rhat": np.linspace(1, level, 4)}
    columns |= {"chi_component": chi, "se_component": np.full(4, error)}
    write_parquet(run.path / table_name(name) / "part-00000.parquet", pa.table(columns), {"step_size": 0.5})
    traces = {"loss": level + 0.1 * rng.normal(size=(3, 60)), "component": 5 + rng.normal(size=(3, 60))}
    found = {"diagnostics": {}, "traces": traces, "chains": (0, 1, 2), "rows": ["component"]}
    errors = {"standard_error": np.full((1, 4), error), "rhat": columns["rhat"], "center_losses": np.ones(4)}
    return SubjectResponse(name=name, chi=chi[None], **found, **errors)


def test_a_run_says_what_its_answers_are_at_step_size_0(tmp_path: Path):
    run, name = SimpleNamespace(path=tmp_path), "early/layer.0"
    half = np.array([-1.0, 0.0, 1.0, 2.0])
    responses = [
        response(run, name, 1.5 * half, 0.3, 3.0),
        response(run, name + HALF_STEP, half, 0.4, 2.0),
        response(run, "early/alone", half, 0.4, 2.0),
    ]
    subjects = SimpleNamespace(posterior=lambda name: Posterior(10.0, 1.0))
    found, files = extrapolate_steps(run, subjects, responses)
    assert list(found) == [name] and files == [tmp_path / table_name(name + EXTRAPOLATED)]
    table, header = read_parquet(files[0], [])
    assert header == {"step_size": 0.0, "extrapolated_from": [0.5, 0.25]}
    np.testing.assert_allclose(table["chi_component"], 0.5 * half)
    np.testing.assert_allclose(table["bias_component"], 0.5 * half)
    np.testing.assert_allclose(table["se_component"], np.sqrt(4 * 0.4**2 + 0.3**2))
    np.testing.assert_allclose(table["se_bias_component"], 0.5)
    np.testing.assert_allclose(table["rhat"], np.linspace(1, 3, 4))
    entry = found[name]["extrapolated"]
    assert entry["chi of component"]["bias"]["value"] == pytest.approx(np.sqrt(0.25 * 1.5 - 0.25))
    assert entry["chi of component"]["bias_ratio"] == pytest.approx(2 * np.sqrt(0.25 * 1.5 - 0.25) / 0.3)
    means = [responses[k].traces["loss"].mean() for k in (0, 1)]
    assert entry["LLC"]["value"] == pytest.approx(10 * (2 * means[1] - means[0]))
    assert entry["LLC"]["is_biased"] and not entry["component"]["is_biased"]
    (line,) = _chains(name, {"excluded": [], "findings": [], "observables": {}} | found[name])
    assert line.startswith(f"{name}: the step size puts off LLC by 2") and "component" not in line
    (on_page,) = _extrapolated({name: found[name], "early/alone": {}})
    assert [row[1] for row in on_page.rows if row[-1].startswith(FLAG)] == ["LLC"]
    assert [len(row) for row in on_page.rows] == 3 * [len(on_page.headers)]
    assert _extrapolated({"early/alone": {}}) == []
