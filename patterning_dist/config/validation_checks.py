"""What section validation asks of the others: rules that yield `key: what is wrong; remedy`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from patterning_dist.config.data import TextConfig, TokensConfig
from patterning_dist.config.faults import listed, repeated
from patterning_dist.config.schema import Config
from patterning_dist.config.validation import RANDOM, Method, ValidationConfig

# Of retrainings, which are there already where a bank is given.
_OF_RETRAININGS = ("num_steps", "removed_share", "removed_token_share")


def check_validation(config: Config) -> Iterator[str]:
    """Faults of the section."""
    settings = config.validation
    if settings is None:
        return
    yield from _names(settings)
    if "bm25" in settings.methods and not isinstance(config.data, TextConfig | TokensConfig):
        yield "validation.methods: bm25 is of tokens, and this experiment has none; remove it"
    if settings.start is None and len(config.checkpoints) > 1:
        yield f"validation.start: there are several checkpoints; name one of {listed(config.checkpoints)}"
    elif settings.start not in (None, *config.checkpoints):
        yield (f"validation.start: '{settings.start}' is no checkpoint; expected one of {listed(config.checkpoints)}")
    if settings.bank is not None:
        for key in _OF_RETRAININGS:
            if getattr(settings, key) is not None:
                yield f"validation.{key}: is of retrainings of this run, and a bank is given; remove one of the two"
        return
    if settings.num_steps is None:
        yield "validation.num_steps: is missing; add it, or a bank of retrained models"
    if config.training is None:
        yield "validation: retrainings take the optimizer of section training; add it"
    if any(seed < 0 for seed in settings.seeds):
        yield f"validation.seeds: expected numbers from 0 up, got {min(settings.seeds)}"
    for seed in repeated(settings.seeds):
        yield f"validation.seeds: {seed} is listed twice; remove one"


def _names(settings: ValidationConfig) -> Iterator[str]:
    for name in repeated(settings.methods):
        yield f"validation.methods: {name} is listed twice; remove one"
    for name in settings.scores:
        if name in (RANDOM, "bank", *get_args(Method), "passes", "weights"):
            yield f"validation.scores: '{name}' is the name of a method or of a folder here; rename it"
