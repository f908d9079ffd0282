"""Rules on solve.controls, weights to compare with; see ``checks``."""

from __future__ import annotations

from collections.abc import Iterator

from patterning_dist.config.checkpoints import INITIALISATION
from patterning_dist.config.controls import (
    AblationControlConfig,
    FirstMomentControlConfig,
    GradientControlConfig,
    HeldOutControlConfig,
    InfluenceControlConfig,
    LossContrastControlConfig,
    MassKey,
    MinimumNormControlConfig,
    PermutedControlConfig,
    SplitControlConfig,
)
from patterning_dist.config.data import (
    DataConfig,
    LabelledConfig,
    PairsConfig,
    TextConfig,
    TokensConfig,
    held_out_domains,
)
from patterning_dist.config.faults import listed, repeated
from patterning_dist.config.response import SolveConfig
from patterning_dist.config.schema import Config
from patterning_dist.config.training import SOLVED

_SPLITS = ("induction", "rest", "induction_minus_rest")  # of the losses of text
_HELD_OUT_SPLITS = (*_SPLITS, "overall", "repeated_sequence")  # and of held-out ones
# Data whose losses have a token, a domain or a label.
_KNOWN: dict[MassKey, tuple[type, ...]] = {
    "token": (TextConfig, TokensConfig),
    "domain": (TextConfig, TokensConfig, PairsConfig, LabelledConfig),
    "label": (LabelledConfig,),
}


def check(config: Config) -> Iterator[str]:
    """Controls that make no sense beside the other sections."""
    solve = config.solve
    if solve is None:
        return
    for name in map(str, repeated([*SOLVED, *(control.name for control in solve.controls)])):
        yield f"solve.controls: '{name}' is the name of other weights too; rename it"
    for index, control in enumerate(solve.controls):
        match control:
            case AblationControlConfig():
                if solve.scores != "first_moment":
                    yield (
                        "solve.controls: an ablation is compared with solve.scores: first_moment; choose them, or "
                        "remove it"
                    )
            case FirstMomentControlConfig():
                yield from _first_moment(control, solve)
            case GradientControlConfig() | InfluenceControlConfig():
                yield from _splits(config, control.split, _HELD_OUT_SPLITS)
                yield from _held_out(config, control)
            case LossContrastControlConfig():
                yield from _contrast(config, control, solve)
            case PermutedControlConfig():
                yield from without_key(config.data, f"solve.controls.{index}.within", control.within)
                if control.within == solve.keep_mass:
                    yield (
                        f"solve.controls: solve.keep_mass makes the arm permuted within each {control.within} already; "
                        f"remove {control.name}"
                    )
            case MinimumNormControlConfig():
                yield from _swaps(config, control)
            case SplitControlConfig():
                yield from _splits(config, control.split, _SPLITS)
                if solve.keep_mass == "domain" and control.split.startswith("domain:"):
                    yield (
                        f"solve.controls: {control.name} weighs a whole domain, and solve.keep_mass keeps what each "
                        "weighs; remove one of the two"
                    )


def without_key(data: DataConfig | None, where: str, key: MassKey) -> Iterator[str]:
    """That data has nothing of this name by which its losses could be grouped.

    Args:
        data: section of the experiment; None: a task of the user's own has it, and is not asked here.
        where: the setting stands.
        key: that it names.
    """
    if data is None or isinstance(data, _KNOWN[key]):
        return
    keys = [known for known, kinds in _KNOWN.items() if isinstance(data, kinds)]
    yield f"{where}: data.kind '{data.kind}' has no {key}; " + (
        f"expected {' or '.join(keys)}" if keys else "remove it"
    )


def _splits(config: Config, split: str, known: tuple[str, ...]) -> Iterator[str]:
    """A split that text does not have; other data is asked once it is read."""
    if isinstance(config.data, TextConfig) and not (split in known or ":" in split):
        yield (
            f"solve.controls: there is no split '{split}'; expected domain:NAME, package.module:function or one of "
            f"{listed(known)}"
        )


def _first_moment(control: FirstMomentControlConfig, solve: SolveConfig) -> Iterator[str]:
    if solve.scores != "first_moment":
        yield (
            f"solve.controls: {control.name} is compared with solve.scores: first_moment from other draws; choose "
            "them, or remove it"
        )
    elif control.draws == solve.draws:
        yield (
            f"solve.controls: {control.name} has the draws of plus itself, solve.draws: {solve.draws}; choose the "
            "other kind, or remove it"
        )


def _swaps(config: Config, control: MinimumNormControlConfig) -> Iterator[str]:
    """Labels that samples do not have, or that cannot be swapped."""
    if config.data is not None and not isinstance(config.data, PairsConfig):
        yield (
            f"solve.controls: {control.name} swaps the labels of pairs where weights fall below 0, and data.kind "
            f"'{config.data.kind}' has none; remove it"
        )
    if config.retrain is not None and config.retrain.engine == "stacked":
        yield (
            f"solve.controls: {control.name} swaps labels, and networks of a stack share their samples; remove it, or "
            "set retrain.engine to deepspeed"
        )


def _held_out(config: Config, control: HeldOutControlConfig) -> Iterator[str]:
    """Held-out losses that a gradient is taken of, and that are not there."""
    domains = held_out_domains(config.data)
    if domains is None:
        return
    if not domains:
        yield (
            f"solve.controls: {control.name} is the gradient of a held-out loss, and there is no held-out data; add "
            "data.held_out, or remove it"
        )
    elif control.split.startswith("domain:") and control.split.removeprefix("domain:") not in domains:
        yield (
            f"solve.controls: no held-out data has the domain of '{control.split}'; the domains are "
            f"{listed(sorted(domains))}"
        )


def _contrast(config: Config, control: LossContrastControlConfig, solve: SolveConfig) -> Iterator[str]:
    there = config.model.given_checkpoints or [INITIALISATION, *config.checkpoints]
    others = [name for name in there if name != (solve.checkpoint or config.checkpoints[0])]
    if control.checkpoint in others:
        return
    if control.checkpoint in there:
        fault = "is the checkpoint that the weights are of"
    elif control.checkpoint == INITIALISATION:
        fault = "is known of a model that this run trains, and this one was there before"
    else:
        fault = "is no checkpoint of this run"
    remedy = f"expected one of {listed(others)}" if others else "add another to model.checkpoints, or remove it"
    yield f"solve.controls: '{control.checkpoint}' of {control.name} {fault}; {remedy}"
