"""The DeepSpeed JSON of a training: what of it the experiment decides.

Files made for the trainer of ``transformers`` say "auto" where it fills something in. Here batch sizes follow from the
experiment, bucket sizes of ZeRO from the model, and all else that is "auto" is DeepSpeed's default. Whether DeepSpeed
knows the keys is asked of DeepSpeed itself, in ``runtime.training.deepspeed_check``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patterning_dist.config.training import TrainingConfig
from patterning_dist.errors import PatterningError

AUTO = "auto"
# Of section zero_optimization, which the width of the model decides: see ``runtime.training.engine.initialize``.
BY_WIDTH = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
# Top-level keys that are taken out, and what stands in their place.
WITHOUT_EFFECT = {
    "optimizer": "training.optimizer and its rates are taken",
    "scheduler": "rates follow from training.warmup_steps and anneal_steps",
    "activation_checkpointing": "it is for models that call DeepSpeed's own checkpointing",
}


def read_deepspeed(path: Path | None) -> dict[str, Any]:
    """What a file sets, without what is "auto"; None: ZeRO stage 0.

    Raises:
        PatterningError: it cannot be read, or is not a JSON object with objects for sections.
    """
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PatterningError(
            f"cannot read {path} ({error.strerror}); give the path of a DeepSpeed JSON file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PatterningError(f"{path} is not a DeepSpeed JSON file ({error})") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise PatterningError(f"{path} is not a DeepSpeed JSON file (expected an object, with objects for sections)")
    return _without_auto(settings)


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != AUTO or key in BY_WIDTH
    }


def deepspeed_config(path: Path | None, batch_size: int, num_ranks: int) -> dict[str, Any]:
    """The user's DeepSpeed JSON with what the run fixes; bf16 and fp16 have float32 masters, of ZeRO stage 1 at least.

    Args:
        path: DeepSpeed JSON; None: ZeRO stage 0.
        batch_size: global batch, samples. Ranks and accumulation steps share it out.
        num_ranks: data-parallel ranks.

    Raises:
        PatterningError: the file cannot be read, or its batch sizes are not those of the experiment.
    """
    settings = read_deepspeed(path)
    given = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}
    zero = given.get("zero_optimization", {})
    if any(isinstance(given.get(kind), dict) and given[kind].get("enabled") for kind in ("bf16", "fp16")):
        # Without ZeRO there would be other optimizers around ours, less exact, and masters on every rank.
        zero = {**zero, "stage": zero.get("stage", 0) or 1}
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **given,
        "zero_optimization": zero,
        **_batch_sizes(f"{path}", settings, batch_size, num_ranks),
    }


def _batch_sizes(where: str, settings: dict[str, Any], batch_size: int, num_ranks: int) -> dict[str, int]:
    """Global batch, that of one backward pass of a rank, and how many of those a step is made of."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for key in keys:
        if key in settings and (type(settings[key]) is not int or settings[key] < 1):
            raise PatterningError(f'{where}: {key}: expected a number from 1 up or "auto", got {settings[key]!r}')
    total, micro, steps = (settings.get(key) for key in keys)
    if total not in (None, batch_size):
        raise PatterningError(
            f'{where}: train_batch_size {total} is not the global batch of the experiment, {batch_size}; write "auto"'
        )
    mine = batch_size // num_ranks
    for key, value in ((keys[1], micro), (keys[2], steps)):
        if value is not None and mine % value:
            raise PatterningError(
                f"{where}: {key} {value} does not divide the {mine} samples of a rank (a batch of {batch_size} on "
                f'{num_ranks}); change it, or write "auto"'
            )
    if micro is not None and steps is not None and micro * steps != mine:
        raise PatterningError(
            f"{where}: {keys[1]} {micro} times {keys[2]} {steps} is {micro * steps}, and a rank has {mine} samples (a "
            f'batch of {batch_size} on {num_ranks}); write "auto" for one of the two'
        )
    steps = steps or (1 if micro is None else mine // micro)
    return dict(zip(keys, (batch_size, mine // steps, steps), strict=True))


def deepspeed_faults(key: str, path: Path | None, training: TrainingConfig, num_ranks: int) -> Iterator[str]:
    """What is wrong with a file beside its experiment; what DeepSpeed itself refuses comes later."""
    if training.batch_size % num_ranks:  # which is said elsewhere
        return
    try:
        settings = deepspeed_config(path, training.batch_size, num_ranks)
    except PatterningError as error:
        yield f"{key}: {error}"
        return
    stage, steps = settings["zero_optimization"].get("stage", 0), settings["gradient_accumulation_steps"]
    if training.optimizer == "muon" and stage in (1, 2, 3):
        yield (
            f"{key}: {path} asks for ZeRO stage {stage}, which splits the matrices that muon needs; "
            "set training.optimizer to adamw or zero_optimization.stage to 0, without bf16 or fp16"
        )
    if training.anneal_steps and training.anneal_batch_size // num_ranks < steps:
        yield (
            f"{key}: {path} makes {steps} backward passes a step, and of training.anneal_batch_size = "
            f"{training.anneal_batch_size} a rank has {training.anneal_batch_size // num_ranks} samples; raise it"
        )
