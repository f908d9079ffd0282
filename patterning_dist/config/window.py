"""The window of the retrainings, as far as the experiment file says it: see ``sampling.window``."""

from __future__ import annotations

from typing import Any

from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.model import AttentionOnlyConfig
from patterning_dist.config.sampling import ComponentConfig
from patterning_dist.config.schema import Config
from patterning_dist.config.training import Arm, TrainingConfig

WINDOW: Any = "window"  # in place of a localization, which is a number once the file has been read


def window_length(config: Config) -> float:
    """Sum of the schedule's factors over the steps of a retraining."""
    assert config.retrain is not None
    return sum(_factors(config, config.retrain.num_steps))


def window_factors(config: Config, arm: Arm) -> tuple[float, ...]:
    """The schedule's factors in a retraining of an arm; a window of its own has neither warm-up nor another rate."""
    return _factors(config, arm_steps(config, arm)) if arm.window is None else (1.0,) * arm.window.num_steps


def _factors(config: Config, num_steps: int) -> tuple[float, ...]:
    """A linear warm-up, then 1, times ``rate_factor``."""
    assert config.training is not None and config.retrain is not None
    warmup, factor = max(config.training.warmup_steps, 1), config.retrain.rate_factor
    return tuple(factor * min(1.0, (step + 1) / warmup) for step in range(num_steps))


def arm_steps(config: Config, arm: Arm) -> int:
    """Optimizer steps of a retraining of an arm."""
    assert config.retrain is not None
    return config.retrain.num_steps if arm.window is None else arm.window.num_steps


def arm_training(config: Config, arm: Arm) -> TrainingConfig:
    """The section training, as an arm is trained by it."""
    assert config.training is not None
    return config.training if arm.window is None else arm.window.training(config.training)


def without_window(config: Config, arm: Arm) -> str | None:
    """Why nothing is predicted of an arm; None: it has a window."""
    if arm.start == INITIALISATION:
        return "it starts from initialisation, and no first order holds for a training from scratch"
    if arm_training(config, arm).optimizer == "muon":
        # Measured: benchmarks/muon_window.py.
        return "muon's steps are orthogonal matrices, which do not follow the gradient to first order"
    if arm.weighting == "draw":
        return "its samples are drawn by their weights instead of weighing in the loss"
    if arm.rounds > 1:
        return "its weights change on the way"
    if arm.weighted_share < 1:
        return "only a part of its steps is weighted"
    return None


def without_localization(config: Config) -> str | None:
    """Why no localization stands for the retrainings; None: one does."""
    training, retrain = config.training, config.retrain
    if training is None or retrain is None:
        return "there are no retrainings; add retrain and training, or give a number"
    if training.optimizer != "sgd":
        return (
            f"{training.optimizer} moves every weight at a rate of its own, and a localization is one number; give "
            "one, or set training.optimizer to sgd"
        )
    rates = training.learning_rate, training.matrix_learning_rate, training.bias_learning_rate_factor
    if isinstance(config.model, AttentionOnlyConfig) and (rates[0] != rates[1] or rates[2] != 1):
        return (
            "weights of this model have several rates, and a localization is one number; set "
            "training.matrix_learning_rate to training.learning_rate and training.bias_learning_rate_factor to 1"
        )
    if all(arm.weights is None or without_window(config, arm) for arm in retrain.arm_list):
        return "no weighted arm of retrain goes on from a checkpoint; set retrain.start, or give a number"
    return None


def window_localization(config: Config, inverse_temperature: float) -> float:
    """gamma = n_beta / tau: the mean of this posterior answers to weights as SGD over tau = rate * sum of factors does.

    With x = lambda tau, SGD moves by 1 to 1.298 times as much in a direction of curvature lambda >= 0,
    (1 - e^-x)(1 + x) / x. Where lambda <= -1 / tau there is no such posterior.
    """
    assert config.training is not None
    return inverse_temperature / (config.training.learning_rate * window_length(config))


def with_localizations(config: Config) -> Config:
    """Every ``localization: window`` replaced by its number, where one can be had; curvature is then looked at."""
    sampling = config.sampling
    windows = [sampling.localization == WINDOW, *(c.localization == WINDOW for c in sampling.components)]
    if not any(windows) or without_localization(config) is not None:
        return config
    update: dict[str, Any] = {"components": list[ComponentConfig](), "lanczos_steps": sampling.lanczos_steps or 10}
    if windows[0]:
        update["localization"] = window_localization(config, sampling.inverse_temperature)
    for component, is_window in zip(sampling.components, windows[1:], strict=True):
        temperature = component.inverse_temperature
        if is_window or (windows[0] and component.localization is None and temperature is not None):
            gamma = window_localization(config, temperature or sampling.inverse_temperature)
            component = component.model_copy(update={"localization": gamma})
        update["components"].append(component)
    return config.model_copy(update={"sampling": sampling.model_copy(update=update)})


def window_remarks(config: Config) -> list[str]:
    """The localization that stands for the retrainings, for those who check or plan."""
    if config.retrain is None or without_localization(config) is not None:
        return []
    assert config.training is not None
    gamma = window_localization(config, config.sampling.inverse_temperature)
    tau = config.training.learning_rate * window_length(config)
    return [
        f"the retrainings' window is tau = {tau:.4g}: localization n_beta / tau = {gamma:.4g} stands for it "
        f"(sampling.localization is {config.sampling.localization:.4g})"
    ]
