"""The window of the retrainings in the experiment file: its length, the localization that stands for it, a cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from patterning_dist.config import dump_config, load_config
from patterning_dist.config.training import WindowConfig
from patterning_dist.config.window import arm_steps, arm_training, window_length, window_remarks
from patterning_dist.errors import PatterningError
from patterning_dist.stages.windows import num_trained, plain_subject, window_of
from patterning_dist.tasks.optimizers import learning_rate_factor
from patterning_dist.training.job import TrainingJob

FILE = {
    "name": "window",
    "seed": 1,
    "data": {"kind": "function", "load": "mine:load"},
    "model": {"kind": "module", "initialise": "mine:fresh", "per_sample_loss": "mine:loss"},
    "training": {"num_steps": 9, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05, "warmup_steps": 4},
    "sampling": {
        "components": [
            {"name": "everything"},
            {"name": "warm", "inverse_temperature": 60},
            {"name": "own", "localization": 7, "inverse_temperature": 60},
        ],
        "observables": [{"kind": "split_loss", "name": "all", "split": "overall"}],
        "num_draws": 100,
        "burn_in": 0,
        "inverse_temperature": 30,
        "localization": "window",
        "step_size": 1e-4,
    },
    "response": {"direction": {"component": "everything"}},
    "solve": {"component": "everything", "targets": {"all": -1}, "strength": 0.5, "max_cost": 0.05},
    "predict": {},
    "retrain": {"start": "baseline", "seeds": [0], "num_steps": 10, "rate_factor": 0.6},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(FILE))
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(PatterningError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 4), (3, 4), (4, 4), (10, 0), (1, 7)])
def test_the_length_is_the_sum_of_the_schedule(path: Path, steps: int, warmup: int) -> None:
    config = load_config(path, [f"retrain.num_steps={steps}", f"training.warmup_steps={warmup}"])
    factors = [learning_rate_factor(step, steps, warmup, 0) for step in range(steps)]
    assert window_length(config) == pytest.approx(0.6 * sum(factors), rel=1e-12)


def test_a_training_that_only_anneals_warms_up_below_the_falling_rate() -> None:
    factors = [learning_rate_factor(step, 0, 4, 9) for step in range(9)]
    assert factors == pytest.approx([0.25, 0.5, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_the_localization_of_the_window_is_a_number_from_then_on(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    tau = 0.05 * 0.6 * (0.25 + 0.5 + 0.75 + 7)
    gammas = [config.sampling.resolve(name).localization for name in ("everything", "warm", "own")]
    assert gammas == pytest.approx([30 / tau, 60 / tau, 7], rel=1e-12)
    assert config.sampling.lanczos_steps == 10  # where curvature is below - 1 / tau there is no such posterior
    assert load_config(path, ["sampling.lanczos_steps=5"]).sampling.lanczos_steps == 5
    assert window_remarks(config) == [
        f"the retrainings' window is tau = {tau:.4g}: localization n_beta / tau = {30 / tau:.4g} stands for it "
        f"(sampling.localization is {30 / tau:.4g})"
    ]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    own = load_config(path, ["sampling.localization=3", "sampling.components.0.localization=window"])
    gammas = [own.sampling.resolve(name).localization for name in ("everything", "warm", "own")]
    assert gammas == pytest.approx([30 / tau, 3, 7], rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.optimizer=adamw"], "adamw moves every weight at a rate of its own"),
        (["retrain.start=initialisation", "solve.max_cost=null"], "no weighted arm of retrain goes on from a"),
        (["retrain=null", "predict=null", "solve.max_cost=null"], "there are no retrainings; add retrain"),
    ],
)
def test_where_no_localization_stands_for_a_training_that_is_said(path: Path, overrides: list[str], words: str) -> None:
    lines = refusal(path, *overrides).splitlines()
    assert lines == [line for line in lines if "sampling.localization: " in line] and words in lines[0]


def test_weights_of_several_rates_have_no_localization(path: Path) -> None:
    overrides = ["data={sources: [{path: corpus, domain: text}]}", "model={}"]
    assert "several rates" in refusal(path, *overrides)
    same = ["training.matrix_learning_rate=0.05", "training.bias_learning_rate_factor=1"]
    load_config(path, [*overrides, *same])


def test_other_words_than_window_are_no_localization(path: Path) -> None:
    assert "sampling.localization: expected a valid number" in refusal(path, "sampling.localization=windows")
    assert "sampling.localization: expected a number greater than 0" in refusal(path, "sampling.localization=-2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["predict=null"], "add predict and retrain"),
        (["sampling.observables.0.split=domain:a"], "in nats of the overall loss; add {kind: split_loss"),
        (["retrain.start=initialisation"], "arm plus has no window, for it starts from initialisation"),
        (["training.optimizer=adamw", "retrain.arms=[base]"], "arms with solved weights of one start and one window"),
        (["retrain.arms=[{name: x, weights: plus, rounds: 2}]"], "arm x has no window, for its weights change"),
    ],
)
def test_a_cost_is_held_by_a_prediction(path: Path, overrides: list[str], words: str) -> None:
    faults = refusal(path, "sampling.localization=4", *overrides).splitlines()
    assert any("solve.max_cost: " in line and words in line for line in faults), faults
    load_config(path, ["sampling.localization=4", *overrides, "solve.max_cost=null"])


OWN = "{name: mine, weights: plus, start: %s, window: {optimizer: adamw, learning_rate: 0.002, num_steps: 20}}"


def test_an_arm_with_a_window_is_trained_by_it_and_others_as_before(path: Path) -> None:
    arms = f"retrain.arms=[base, {OWN % 'baseline'}]"
    config = load_config(path, [arms, "training.bias_learning_rate_factor=5", "solve.max_cost=null"])
    assert config.training is not None and config.retrain is not None
    plain, own = config.retrain.arm_list
    assert arm_training(config, plain) == config.training and arm_steps(config, plain) == 10
    rates = {"learning_rate": 0.002, "matrix_learning_rate": 0.002, "bias_learning_rate_factor": 1.0}
    changes = {"optimizer": "adamw", "warmup_steps": 0, **rates}
    assert arm_training(config, own).model_dump() == config.training.model_dump() | changes
    window = window_of(config, own)
    # One rate from the first step on: retrain.rate_factor and the warm-up are the section's.
    assert (len(window.factors), window.tau, num_trained(config, own)) == (20, 20.0, 20 * 8)
    assert window_of(config, plain).tau == pytest.approx(window_length(config))
    assert plain_subject(config, plain)[0] != plain_subject(config, own)[0]


def test_the_fingerprint_of_a_job_knows_its_window(path: Path) -> None:
    config = load_config(path)
    job = TrainingJob(name="x", folder=path.parent, inputs=None, seed=0, num_steps=20)
    window = WindowConfig(optimizer="adamw", learning_rate=0.002, num_steps=20)
    own = replace(job, window=window)
    assert config.training is not None
    assert own.fingerprint(config) != job.fingerprint(config)
    by_section = config.model_copy(update={"training": window.training(config.training)})
    assert own.fingerprint(config) == job.fingerprint(by_section)


@pytest.mark.parametrize(
    ("arm", "fault"),
    [
        (OWN % "initialisation", "mine has a window and no checkpoint to go on from; set its start to one"),
        (OWN.replace("name: mine", "name: mine, rounds: 2") % "baseline", "mine has a window and rounds"),
    ],
)
def test_a_window_that_cannot_be_is_refused(path: Path, arm: str, fault: str) -> None:
    assert fault in refusal(path, f"retrain.arms=[base, {arm}]")
