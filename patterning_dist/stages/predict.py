"""Stage ``predict``: what every arm that goes on from a checkpoint will come to, before it is trained.

The window of an arm (see ``sampling.window``) is walked under its weights and under equal ones, on held-out samples
that no weights were solved for, in one step and in two halves with fresh gradients. The prediction is the difference of
each split loss where the two walks in halves end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from patterning_dist.config import Config
from patterning_dist.config.training import Arm
from patterning_dist.measure.subjects import Subject, Subjects
from patterning_dist.progress import Progress
from patterning_dist.response.contrast import split_contrast
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.runtime.window import DEFAULT_CLIPPING, LARGEST_GROWTH, Window, walk_windows
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.rounds import Round
from patterning_dist.stages.sample import open_subjects
from patterning_dist.stages.train import round_weights
from patterning_dist.storage.files import FileHashes, write_json
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.optimizers import learning_rate_factor

RESULT = "predict/response.json"
# Of a prediction, besides what sampling and halving say: gradients and curvature are of a part of the training samples.
# The target of the classifier of tests/ray/test_predict.py came out 1.05 to 1.17 times as predicted.
_MODEL_ERROR = 0.1


def predict(config: Config, run: RunDirectory, progress: Progress) -> list[Path]:
    """Walk the windows of all arms that have one; returns the files written.

    Raises:
        PatterningError: a table of weights is not there, or does not fit.
    """
    assert config.retrain is not None and config.training is not None and config.predict is not None
    run.place.fetch("weights", "retrain")
    device, arms = resolve_device(config.device), config.retrain.arm_list
    reasons = {arm.name: without_window(config, arm) for arm in arms if arm.weights is not None}
    walked = [arm for arm in arms if reasons.get(arm.name, "") is None]
    plain = open_subjects(config, run.place, device)
    subjects = {_base(arm): Subject(arm.start, "everything", stream="predict") for arm in walked}
    for arm in walked:
        part = Round(arm, arm.seeds[0])
        round_weights(part, run)  # one of the user's own is copied into the run
        subjects[_name(arm)] = replace(subjects[_base(arm)], weights=part.weights, strength=arm.strength)
    tables = [subject.weights for subject in subjects.values() if subject.weights is not None]
    files = (*plain.files, *dict.fromkeys(tables))
    opener = replace(plain, by_name=subjects, files=files, gradients_of=frozenset(), thin=None, part="predicted")
    window = Window(config.training, _tau(config), _clipping(config), config.predict)
    found = {"arms": {name: {"outside": reason} for name, reason in reasons.items() if reason is not None}}
    if walked:
        here = opener("cpu", Ranks())
        walks = walk_windows(opener, here.sampling, device, run, window, _inputs(run, here), progress)
        for arm in walked:
            found["arms"][arm.name] = _prediction(here, window, walks[_name(arm)], walks[_base(arm)])
    for name, entry in found["arms"].items():
        if entry["outside"] is not None:
            progress.say(f"predict: {name} is outside the window, no prediction: {entry['outside']}")
    write_json(run.path / RESULT, found)
    return [run.path / RESULT]


def without_window(config: Config, arm: Arm) -> str | None:
    """Why nothing is predicted of an arm; None: it has a window."""
    assert config.training is not None
    if arm.start == "initialisation":
        return "it starts from initialisation, and no first order holds for a training from scratch"
    if config.training.optimizer == "muon":
        return "muon's steps are orthogonal matrices, which do not follow the gradient to first order"
    if arm.weighting == "draw":
        return "its samples are drawn by their weights instead of weighing in the loss"
    if arm.rounds > 1:
        return "its weights change on the way"
    if arm.weighted_share < 1:
        return "only a part of its steps is weighted"
    return None


def _base(arm: Arm) -> str:
    return f"predict/from/{arm.start}"


def _name(arm: Arm) -> str:
    return f"predict/{arm.name}"


def _tau(config: Config) -> float:
    assert config.training is not None and config.retrain is not None
    steps, warmup = config.retrain.num_steps, config.training.warmup_steps
    return config.retrain.rate_factor * sum(learning_rate_factor(step, steps, warmup, 0) for step in range(steps))


def _clipping(config: Config) -> float:
    """Norm that DeepSpeed clips gradients to: what the JSON says, else its own default."""
    assert config.retrain is not None
    path = config.retrain.deepspeed
    settings = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return float(settings.get("gradient_clipping", DEFAULT_CLIPPING))


def _inputs(run: RunDirectory, subjects: Subjects) -> dict[str, Any]:
    """What the walk of every subject follows from besides its settings."""
    hashes = FileHashes(run.manifest.get("hashes", {}))
    sampling = subjects.sampling
    shared = [
        subjects.seed,
        [o.model_dump() for o in sampling.observables if o.kind == "split_loss"],
        [sampling.evaluation_sequences, sampling.compute_dtype, sampling.ranks_per_chain],
    ]
    found = {}
    for name, subject in subjects.by_name.items():
        weights = None if subject.weights is None else hashes(run.path / subject.weights)
        found[name] = [shared, subjects.task.fingerprint(subject.checkpoint, hashes), weights, subject.strength]
    run.update_manifest(hashes=hashes.known)
    return found


def _prediction(subjects: Subjects, window: Window, arm: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What one arm comes to against equal weights, or why that cannot be said."""
    held_out = subjects.held_out
    assert held_out is not None
    growth = max(float(walk["growth"]) for walk in (arm, base))
    entry: dict[str, Any] = {"outside": None, "tau": window.tau, "growth": growth}
    if growth > LARGEST_GROWTH:
        words = f"along its most negative curvature the window grows by e^{growth:.2g}, beyond e^{LARGEST_GROWTH:g}"
        return entry | {"outside": f"{words}; fewer steps or a lower rate would stay inside"}
    if not all(np.isfinite(walk["parts"]).all() for walk in (arm, base)):
        return entry | {"outside": "the losses where the window leads are not finite; take fewer steps or a lower rate"}
    coefficients = held_out.coefficients.numpy()
    signed = np.stack([coefficients.clip(0), coefficients.clip(max=0)], axis=-1)
    shares = signed.reshape(*signed.shape[:2], -1, 2).sum(axis=2)
    once, halves = (split_contrast(arm["parts"][k] - base["parts"][k], shares, held_out.groups) for k in range(2))
    # The samples of the result are others: their sampling error is as large again.
    errors = (2**0.5 * halves.standard_error, halves.value - once.value, _MODEL_ERROR * halves.value)
    total = np.sqrt(sum(error**2 for error in errors))
    if not np.isfinite(total).all():
        return entry | {"outside": "there are too few held-out samples for an error; give two or more of every split"}
    width = norm.ppf(0.975) * total
    entry["observables"] = {
        name: {
            "value": halves.value[k],
            "standard_error": total[k],
            "interval": [halves.value[k] - width[k], halves.value[k] + width[k]],
            "in_one_step": once.value[k],
            "sampling_error": halves.standard_error[k],
        }
        for k, name in enumerate(held_out.names)
    }
    return entry
