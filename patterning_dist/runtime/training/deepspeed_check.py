"""What DeepSpeed itself says of a DeepSpeed JSON, before anything runs."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from patterning_dist.config import Config
from patterning_dist.config.deepspeed import WITHOUT_EFFECT, deepspeed_config, read_deepspeed
from patterning_dist.errors import PatterningError, first_line


def check_deepspeed(config: Config) -> list[str]:
    """Have DeepSpeed's own class read the files that the experiment names.

    Returns:
        What the batch sizes come to and which keys have no effect, a line each.

    Raises:
        PatterningError: a key that DeepSpeed does not know, or a value that it refuses.
    """
    remarks: list[str] = []
    for name, section in (("training", config.training), ("retrain", config.retrain)):
        if section is None or section.deepspeed is None or config.training is None:
            continue
        path, key = section.deepspeed, f"{name}.deepspeed"
        try:
            settings = deepspeed_config(path, config.training.batch_size, section.num_workers)
            _check(path, read_deepspeed(path) | settings)
        except PatterningError as error:
            raise PatterningError(f"{key}: {error}") from None
        micro, steps = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
        remarks.append(
            f"{key}: a batch of {config.training.batch_size} is {section.num_workers} ranks x {steps} backward passes "
            f"x {micro} samples"
        )
        ignored = [what for what in WITHOUT_EFFECT if what in read_deepspeed(path)]
        remarks += [f"{key}: {what} of {path} has no effect: {WITHOUT_EFFECT[what]}" for what in ignored]
    return remarks


class _Asked(dict):
    """Settings that know which of their keys somebody has asked for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__({key: _Asked(value) if isinstance(value, dict) else value for key, value in settings.items()})
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # so that ** goes by the methods above
        return super().__iter__()


def _check(path: Path, settings: dict[str, Any]) -> None:
    # There is one rank here.
    batch = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    asked = _Asked(settings | {"train_batch_size": batch})
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it had to guess
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.utils.logging import set_log_level_from_string

        set_log_level_from_string("error")
        try:
            DeepSpeedConfig(asked)
        except ValidationError as error:
            raise PatterningError(f"{path}: {_first_fault(error, settings)}") from None
        except Exception as error:  # assertions, and errors of its own
            raise PatterningError(f"{path}: DeepSpeed refuses it ({first_line(error)}); correct it") from None
    for where, section in (("", asked), *((f"{key}.", value) for key, value in asked.items())):
        if isinstance(section, _Asked):
            for key in section.keys() - section.asked:
                raise PatterningError(f"{path}: DeepSpeed knows no {where}{key}{_like(key, section.asked)}")


def _first_fault(error: ValidationError, settings: dict[str, Any]) -> str:
    """Of a section that DeepSpeed reads into a model of its own."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    fault = error.errors()[0]
    name = str(fault["loc"][0])
    section = next((f"{key}." for key, value in settings.items() if isinstance(value, dict) and name in value), "")
    where = section + ".".join(map(str, fault["loc"]))
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']}, got {fault['input']!r}"
    model = next((m for m in DeepSpeedConfigModel.__subclasses__() if m.__name__ == error.title), None)
    return f"DeepSpeed knows no {where}{_like(name, set() if model is None else set(model.model_fields))}"


def _like(key: str, known: set[str]) -> str:
    similar = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {similar[0]}?" if similar else "; remove it"
