"""What a plan by probes asks of them, stage by stage; every time that they measure is a second here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from patterning_dist.config import load_config
from patterning_dist.driver import experiment_of
from patterning_dist.response.cost import Seconds
from patterning_dist.runtime.probe.chains import ChainProbe, ChainTimes
from patterning_dist.runtime.probe.training import JobTimes, StepTimes
from patterning_dist.stages.plan import measured, plan
from patterning_dist.stages.plan.training import Trainings, Trial

CONFIG = Path(__file__).parents[2] / "configs" / "attribution.yaml"
SECOND = Seconds.about(1.0, 0.0)


def test_every_stage_of_an_experiment_with_validation_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trials: list[Trial] = []

    def chains(opener: Any, sampling: Any, device: str, subjects: dict[str, bool], *_: Any) -> ChainProbe:
        times = ChainTimes(SECOND, SECOND, SECOND, SECOND, 10, 1, 1, 1, 1)
        return ChainProbe(2, SECOND, dict.fromkeys(subjects, times), None, None, 100)

    def trainings(config: Any, workspace: Any, device: str, trial: Trial) -> Trainings:
        trials.append(trial)
        steps = StepTimes(2, SECOND, SECOND, 16, 20, 30, 200)
        return Trainings(config, steps, JobTimes(SECOND, SECOND, SECOND, SECOND, SECOND, SECOND))

    monkeypatch.setattr(plan, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(measured, "nodes", list)
    monkeypatch.setattr(measured, "probe_chains", chains)
    monkeypatch.setattr(measured, "probe_trainings", trainings)
    config = load_config(CONFIG, ["data.max_train_sequences=60"])
    found = plan.plan_run(config, list(experiment_of(config).stages(config)), tmp_path / "run", [], lambda _: None)
    assert [stage.name for stage in found.stages] == ["start", "prepare", "train", "sample", "validate", "report"]
    assert all(stage.seconds.value > 0 for stage in found.stages[1:]) and not (tmp_path / "run").exists()
    baseline, bank = trials
    assert (len(baseline.jobs), baseline.number, baseline.jobs[0].start) == (1, 1, None)
    # 41 retrainings with 2 seeds; 2 kinds of QLD, 5 methods with random scores, 16 queries, 2 seeds: stacks of sixteen.
    assert (len(bank.jobs), bank.number, bank.jobs[0].start) == (16, -(-(82 + 320) // 16), "baseline")
    assert {job.num_steps for job in bank.jobs} == {96} and bank.concurrent is None
    validate = found.stages[4]
    assert "82 trainings on subsets and all, 320 without what scores single out" in validate.what
    assert validate.process_bytes == 200
