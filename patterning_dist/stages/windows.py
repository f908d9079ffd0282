"""Windows of an experiment's retrainings, walked on held-out samples that no weights were solved for.

The window of a subject (see ``training.walk``) is walked under its weights and under equal ones; the prediction is the
difference of each split loss, and of each metric of the task, where the two walks end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy

from patterning_dist.config import Config, HuggingFaceConfig
from patterning_dist.config.checkpoints import FINAL
from patterning_dist.config.deepspeed import read_deepspeed
from patterning_dist.config.training import Arm
from patterning_dist.config.window import arm_steps, arm_training, window_factors
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.adapter import read_adapter
from patterning_dist.models.huggingface import model_location
from patterning_dist.progress import Progress
from patterning_dist.response.contrast import split_contrast
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.runtime.window import walk_windows
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.sample import open_subjects
from patterning_dist.storage.files import FileHashes
from patterning_dist.storage.run import RunDirectory
from patterning_dist.training.walk import DEFAULT_CLIPPING, LARGEST_GROWTH, Window

Walk = Mapping[str, Any]
_MODEL_ERROR = 0.1  # of a prediction, besides what sampling, data orders and halving say: from benchmarks/windows.py


def trained_component(config: Config) -> str:
    """What a training moves: of a model with an adapter that alone."""
    model = config.model
    if not isinstance(model, HuggingFaceConfig) or model.path is None:
        return "everything"
    return "everything" if read_adapter(model_location(model, FINAL)[0]) is None else "adapter"


def plain_subject(config: Config, arm: Arm) -> tuple[str, Subject]:
    """The walk under equal weights from the checkpoint of an arm through its window, and its name."""
    own = "" if arm.window is None else "/{optimizer}-{learning_rate:g}-{num_steps}".format(**arm.window.model_dump())
    return f"predict/from/{arm.start}{own}", Subject(arm.start, trained_component(config), stream="predict")


def window_of(config: Config, arm: Arm) -> Window:
    """The window of the retrainings of an arm."""
    assert config.retrain is not None and config.predict is not None
    clipping = float(read_deepspeed(config.retrain.deepspeed).get("gradient_clipping", DEFAULT_CLIPPING))
    return Window(arm_training(config, arm), window_factors(config, arm), clipping, config.predict)


def walk_subjects(
    config: Config,
    run: RunDirectory,
    subjects: Mapping[str, Subject],
    windows: Mapping[str, Window],
    progress: Progress,
) -> tuple[Subjects, Mapping[str, Walk]]:
    """Walk from every subject through the window of its name; a walk that is stored is not walked again.

    Returns:
        The subjects opened in this process, and name -> its walk.
    """
    device = resolve_device(config.device)
    plain = open_subjects(config, run.location, device)
    tables = [subject.weights for subject in subjects.values() if subject.weights is not None]
    opener = plain.weighted(dict(subjects), *dict.fromkeys(tables), gradients_of=frozenset(), part="predicted")
    here = opener("cpu", Ranks())
    inputs = _inputs(run, here)
    return here, walk_windows(opener, here.sampling, device, run, windows, inputs, progress)


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


def num_trained(config: Config, arm: Arm) -> int:
    """Training samples, counted as often as they come, of all retrainings of an arm."""
    assert config.training is not None
    return arm_steps(config, arm) * config.training.batch_size * len(arm.seeds)


def predicted_change(subjects: Subjects, window: Window, arm: Walk, base: Walk, num_seen: int) -> dict[str, Any]:
    """What one arm comes to against equal weights, or why that cannot be said.

    Minibatches spread the end of a training, of n_T samples, with the variance v that the walks' draws say; result and
    prediction, of n_seen and n samples, then differ by v n_T (1 / n_seen + 1 / n) in variance.

    Args:
        subjects: with the held-out samples of both walks.
        window: that was walked.
        arm: the walk under the arm's weights.
        base: under equal weights.
        num_seen: n_seen, of the trainings that the result is a mean of.
    """
    held_out = subjects.held_out
    assert held_out is not None
    growth = max(float(walk["growth"].max()) for walk in (arm, base))
    entry: dict[str, Any] = {"outside": None, "tau": window.tau, "growth": growth}
    if growth > LARGEST_GROWTH:
        words = f"along its most negative curvature a segment grows by e^{growth:.2g}, beyond e^{LARGEST_GROWTH:g}"
        return entry | {"outside": f"{words}; fewer steps, a lower rate or more predict.segments would stay inside"}
    if not all(np.isfinite(walk["parts"]).all() for walk in (arm, base)):
        return entry | {"outside": "the losses where the window leads are not finite; take fewer steps or a lower rate"}
    coefficients = held_out.coefficients.numpy()
    signed = np.stack([coefficients.clip(0), coefficients.clip(max=0)], axis=-1)
    shares = signed.reshape(*signed.shape[:2], -1, 2).sum(axis=2)
    coarse, fine = (split_contrast(arm["parts"][k] - base["parts"][k], shares, held_out.groups) for k in range(2))
    seen = len(window.factors) * window.training.batch_size * (1 / num_seen + 1 / window.num_samples)

    def order(spread: str) -> np.ndarray:
        return np.sqrt(seen * np.square(arm[spread] - base[spread]).mean(axis=0))

    observables = _estimates(held_out.names, fine.value, coarse.value, order("spread"), fine.standard_error)
    if not all(np.isfinite(found["standard_error"]) for found in observables.values()):
        return entry | {"outside": "there are too few held-out samples for an error; give two or more of every split"}
    changes = arm["metrics"] - base["metrics"]
    # Of the very samples that trainings report metrics of, so that no choice of samples is in between.
    metrics = _estimates(arm["names"], changes[1], changes[0], order("metric_spread"), np.zeros(len(arm["names"])))
    return entry | {"observables": observables, "metrics": metrics}


def _estimates(
    names: Sequence[str], fine: np.ndarray, coarse: np.ndarray, order: np.ndarray, sampling: np.ndarray
) -> dict[str, dict[str, float | list[float]]]:
    """Name -> a prediction with its 95 % interval, of errors that are added in squares; all arrays [name]."""
    # The samples of the result are others: their sampling error is as large again.
    total = np.sqrt(2 * sampling**2 + order**2 + (fine - coarse) ** 2 + (_MODEL_ERROR * fine) ** 2)
    width = scipy.special.ndtri(0.975) * total
    return {
        name: {
            "value": fine[k],
            "standard_error": total[k],
            "interval": [fine[k] - width[k], fine[k] + width[k]],
            "in_half_the_segments": coarse[k],
            "sampling_error": sampling[k],
            "order_error": order[k],
        }
        for k, name in enumerate(names)
    }
