"""The page of `patterning calibrate`: which setting to sample with and why, how long that takes, and all the traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from patterning_dist.report.blocks import FLAG, Cards, Note, Section, Table
from patterning_dist.report.calibration_traces import traces_section
from patterning_dist.report.words import duration, listed, number
from patterning_dist.report.writing import write_page
from patterning_dist.response.calibration import Assessment, Setting, Trial
from patterning_dist.response.llc import TraceMean
from patterning_dist.response.run_length import MAX_BIAS, MIN_LLC_ERROR, Draws, RunPlan

WHAT_IS_WHAT = (
    "inverse_temperature and localization say what is estimated: another pair is another posterior, with other "
    "susceptibilities, so the choice between pairs is one of meaning first. step_size says how fast, up to a bias in "
    "proportion to it."
)
RULE = (
    "Order of the settings: those with a failure mode come last, diverged ones at the very end. Posteriors go by the "
    "reliability of chi at their fastest usable step size, and the step sizes of one posterior by usable effective "
    "draws a second. Step sizes come from the curvature of the loss at the checkpoint, unless calibration.step_sizes "
    "has some, and smaller ones are tried as long as all are biased: when what steps and minibatches add to the LLC or "
    f"to chi of the stiffest directions is more than {MAX_BIAS:g} standard errors of the planned run, taken to "
    f"be {MIN_LLC_ERROR:.0%} of the LLC at least."
)
LEGEND = (
    "Burn-in: in sampler steps. Effective draws: bulk ESS of the slowest observable, all chains together, after "
    "burn-in; usable a second: those of one worker. Reliability: correlation of chi between halves of the {chains} "
    "chains over the samples of the probe, mean over observables. Error / spread: standard error of chi from these "
    "trials (root mean square over the samples) over its spread across samples, of the worst observable whose chi is "
    "more than noise; a dash where none is. LLC and loss rise (nats): after burn-in. Temperature: virial, 1 for the "
    "posterior, and along the stiffest directions alone. LLC from steps: what it is too large by, at most. Bias: the "
    "largest over the largest that may be."
)
CAVEAT = (
    "Predicted from short trials: the error goes as one over the root of the draws, and the interval comes from the "
    "spread between {chains} chains alone. Each subject is taken to cost what {component} did, and no slow mode that "
    "the trials were too short to show is in it. Look at the R-hat of the full run."
)


@dataclass(frozen=True)
class Calibration:
    """What was tried, and what came of it.

    Attributes:
        ranked: best first; the first is chosen if it has no failure.
        refused: settings that were not tried -> why.
        trials: setting -> one a chain.
        plan: of a full run at the chosen setting; None if no setting is usable.
        standard_error: wanted, of chi over its spread.
        curvature: smallest and largest eigenvalue of the Hessian of the loss, nats/weight^2.
        num_subjects, num_workers: of the full run.
    """

    name: str
    component: str
    ranked: Sequence[Assessment]
    refused: Mapping[str, str]
    trials: Mapping[Setting, Sequence[Trial]]
    plan: RunPlan | None
    standard_error: float
    curvature: tuple[float, float]
    num_subjects: int
    num_workers: int


def write_calibration_report(path: Path, found: Calibration) -> None:
    """Write the page; it holds everything it shows."""
    sections = [_choice(found), _settings(found)]
    if found.plan is not None:
        sections.append(_length(found, found.plan))
    sections.append(traces_section(found.ranked, found.trials))
    write_page(
        path,
        kind="Calibration",
        name=found.name,
        created=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
        status=f"{found.component}, {len(found.ranked)} settings, {found.ranked[0].num_chains} chains each",
        warnings=[] if found.plan else ["No setting can be used; every one has a failure mode."],
        sections=sections,
    )


def predicted_length(found: Calibration, plan: RunPlan) -> str:
    """How long the full run will need, in a sentence."""
    if not plan.slowest:
        return (
            f"chi does not stand out of its noise in {found.ranked[0].num_chains} chains of "
            f"{found.ranked[0].num_draws} draws, so no length can be predicted; raise calibration.num_draws or "
            "calibration.num_chains"
        )
    unknown = [name for name, draws in plan.needed.items() if not math.isfinite(draws.value)]
    but = f" but {listed(unknown)}, nothing but noise so far," if unknown else ""
    return (
        f"for chi of every observable{but} to {found.standard_error:g} of its spread, {found.num_subjects} subject(s) "
        f"of {plan.num_chains} chains of {plan.num_draws:,} draws: {_between(plan.seconds, duration)} on "
        f"{found.num_workers} worker(s); {plan.slowest} needs the most"
    )


def _between(value: Draws, words: Callable[[float], str] = number) -> str:
    high = words(value.high) if math.isfinite(value.high) else "no upper end"
    return f"{words(value.value)} [{words(value.low)}, {high}]"


def _choice(found: Calibration) -> Section:
    section, best = Section("choice", "What to sample with"), found.ranked[0]
    section.blocks.append(Note(WHAT_IS_WHAT, "lead"))
    if found.plan is None:
        section.blocks.append(Note("No setting is usable, so none is chosen; under the traces stands what to turn."))
        return section
    eps, n_beta, gamma = best.setting
    speed = f"{number(best.effective_draws)} of {best.num_chains * best.num_draws} draws count"
    section.blocks += [
        Cards(
            [
                ("Step size", f"{eps:g}", "weight²", f"fastest usable one of its posterior; {speed}"),
                ("Inverse temperature", f"{n_beta:g}", "1/nats", "n_beta"),
                ("Localization", f"{gamma:g}", "1/weight²", "gamma"),
                ("Full run", duration(found.plan.seconds.value) if found.plan.slowest else "unknown", "",
                 "wall time to the wanted standard error"),
            ]
        ),
        Note(f"How long: {predicted_length(found, found.plan)}."),
    ]  # fmt: skip
    for note in best.notes:
        section.blocks.append(Note(FLAG + note))
    return section


def _settings(found: Calibration) -> Section:
    headers = ["", "n_beta", "gamma", "step size", "state", "burn-in", "effective draws", "usable a second"]
    headers += ["R-hat", "reliability", "error / spread", "LLC", "loss rise"]
    headers += ["temperature", "stiff", "LLC from steps", "bias"]
    rows = []
    for place, one in enumerate(found.ranked, start=1):
        eps, n_beta, gamma = one.setting
        rows.append(
            [
                str(place),
                f"{n_beta:g}",
                f"{gamma:g}",
                f"{eps:g}",
                f"{FLAG}{one.failure}" if one.failure else "usable",
                number(one.burn_in * one.steps_between_draws, decimals=0) if one.num_draws else "–",
                number(one.effective_draws),
                number(one.usable_per_second),
                number(one.rhat, decimals=3),
                number(one.reliability, decimals=2),
                number(_worst_error(one), decimals=2),
                _measured(one.llc),
                number(one.loss_rise),
                *map(_measured, (one.temperature, one.temperature_stiff, one.step_bias)),
                number(one.bias_ratio, decimals=2),
            ]
        )
    legend = LEGEND.format(chains=found.ranked[0].num_chains)
    section = Section("settings", "The settings, best first", [Table(headers, rows), Note(legend), Note(RULE)])
    section.blocks.append(Note("What was seen of a failure, and the knob to turn, stands under the setting's traces."))
    smallest, largest = map(number, found.curvature)
    words = f"Curvature of the loss at the checkpoint (Lanczos): from {smallest} to {largest} nats/weight²."
    section.blocks.append(Note(words))
    section.blocks += [Note(f"Not tried: {what}, since {reason}.") for what, reason in found.refused.items()]
    return section


def _measured(mean: TraceMean) -> str:
    return f"{number(mean.value)} ± {number(mean.standard_error, 2)}" if math.isfinite(mean.value) else "–"


def _worst_error(one: Assessment) -> float:
    errors = [signal.relative_error(one.num_chains) for signal in one.signals.values()]
    return max((error for error in errors if math.isfinite(error)), default=math.nan)


def _length(found: Calibration, plan: RunPlan) -> Section:
    best = found.ranked[0]
    rows = [
        [
            name,
            number(signal.spread) if math.isfinite(signal.spread) else f"{FLAG}nothing but noise",
            number(signal.relative_error(best.num_chains), decimals=2),
            number(signal.median_error(best.num_chains), decimals=2),
            number(best.reliabilities[name], decimals=2),
            _between(plan.needed[name]) if math.isfinite(plan.needed[name].value) else "–",
        ]
        for name, signal in best.signals.items()
    ]
    headers = ["observable", "spread of chi", "error / spread", "median sample's", "reliability", "draws needed [95 %]"]
    words = (
        f"Wanted: a standard error of chi, root mean square over the samples, of {found.standard_error:g} times its "
        "spread across them (a reliability of 1 / (1 + that squared)). The table has the trials' own. Draws of the "
        f"full run are {plan.steps_between_draws} steps apart, burn-in {plan.burn_in} steps. "
        f"Timed: {number(best.step_seconds * 1e3)} ms a step, {number(best.draw_seconds * 1e3)} ms a measurement."
    )
    caveat = CAVEAT.format(chains=best.num_chains, component=found.component)
    return Section("length", "How long a full run takes", [Note(words), Table(headers, rows), Note(caveat, "small")])
