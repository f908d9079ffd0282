"""Stage ``predict``: what every arm that goes on from a checkpoint will come to, before it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from patterning_dist.config import Config
from patterning_dist.config.window import without_window
from patterning_dist.progress import Progress
from patterning_dist.stages.rounds import Round
from patterning_dist.stages.train import round_weights
from patterning_dist.stages.windows import num_trained, plain_subject, predicted_change, walk_subjects, window_of
from patterning_dist.storage.files import write_json
from patterning_dist.storage.run import RunDirectory

RESULT = "predict/response.json"


def predict(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Walk the windows of all arms that have one; returns the files written.

    Raises:
        PatterningError: a table of weights is not there, or does not fit.
    """
    assert config.retrain is not None
    run.location.fetch("weights", "retrain")
    arms = config.retrain.arm_list
    reasons = {arm.name: without_window(config, arm) for arm in arms if arm.weights is not None}
    walked = [arm for arm in arms if reasons.get(arm.name, "") is None]
    subjects = dict(plain_subject(config, arm) for arm in walked)
    windows = {plain_subject(config, arm)[0]: window_of(config, arm) for arm in walked}
    for arm in walked:
        part = Round(arm, arm.seeds[0])
        round_weights(part, run)  # one of the user's own is copied into the run
        plain = plain_subject(config, arm)[1]
        windows[f"predict/{arm.name}"] = window_of(config, arm)
        subjects[f"predict/{arm.name}"] = replace(plain, weights=part.weights, strength=arm.strength)
    found: dict[str, Any] = {name: {"outside": reason} for name, reason in reasons.items() if reason is not None}
    if walked:
        here, walks = walk_subjects(config, run, subjects, windows, progress)
        for arm in walked:
            mine, base = walks[f"predict/{arm.name}"], walks[plain_subject(config, arm)[0]]
            found[arm.name] = predicted_change(
                here, windows[f"predict/{arm.name}"], mine, base, num_trained(config, arm)
            )
    for name, entry in found.items():
        if entry["outside"] is not None:
            progress.say(f"predict: {name} is outside the window, no prediction: {entry['outside']}")
    write_json(run.path / RESULT, {"arms": found})
    return [run.path / RESULT]
