"""The loss traces of a calibration, one drawing a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from patterning_dist.report.blocks import Figure, Figures, Note, Section
from patterning_dist.report.figures import trace_lines
from patterning_dist.report.words import number
from patterning_dist.response.calibration import Assessment, Setting, Trial


def traces_section(ranked: Sequence[Assessment], trials: Mapping[Setting, Sequence[Trial]]) -> Section:
    """Small multiples of the loss, the settings of a posterior side by side; the best posterior is open.

    Args:
        ranked: best first.
        trials: setting -> one a chain.
    """
    section = Section("traces", "Loss traces")
    section.blocks.append(
        Note("One line a chain, from the checkpoint on; shaded: the burn-in that is left out.", "small")
    )
    posteriors = dict.fromkeys(one.setting.posterior for one in ranked)
    for place, posterior in enumerate(posteriors):
        mine = sorted((o for o in ranked if o.setting.posterior == posterior), key=lambda o: o.setting.step_size)
        words = f"inverse_temperature {posterior[0]:g}, localization {posterior[1]:g}"
        figures = [_figure(one, trials[one.setting]) for one in mine]
        if place == 0:
            section.blocks.append(Note(words))
        section.blocks.append(Figures(figures, folded=words if place else ""))
    return section


def _figure(one: Assessment, trials: Sequence[Trial]) -> Figure:
    steps = one.steps_between_draws
    lines = [(np.arange(len(trial.mean_loss)) * steps, np.asarray(trial.mean_loss)) for trial in trials]
    state = one.failure or f"{number(one.usable_per_second)} effective draws a second"
    title = f"step_size {one.setting.step_size:g}: {state}"
    description = f"Loss of {len(trials)} chains, {one.setting.words}: {state}"
    label = "loss − loss at the checkpoint (nats)"
    return Figure(title, trace_lines(lines, "sampler step", label, description, one.burn_in * steps), one.reason)
