"""`patterning calibrate`: settings from the curvature of the loss, confirmed by short chains.

It writes calibration/{report.html, settings.json, calibrated.yaml}.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patterning_dist.config import Config, dump_config, load_config
from patterning_dist.config.sampling import RmspropSgldConfig
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.report.calibration import WHAT_IS_WHAT, Calibration, predicted_length, write_calibration_report
from patterning_dist.response.calibration import Assessment, Setting, Trial, assess
from patterning_dist.response.proposal import Curvature, Proposal, precisions, propose, search, spacing
from patterning_dist.response.run_length import RunPlan, judge_bias, plan_run
from patterning_dist.runtime.chains.trials import TrialPlan, Trials
from patterning_dist.stages.calibration_subject import Calibrated, calibrated_subject
from patterning_dist.storage.files import write_json, write_text
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

SETTINGS = "calibration/settings.json"
# What a calibrated run looks at its stiffest directions with, unless it does already.
_LANCZOS_STEPS = 10


def calibrate(config: Config, run: RunDirectory, progress: Progress) -> None:
    """Measure the curvature, try the settings that it leads to and have not been tried, and write what came of all.

    Raises:
        PatterningError: every setting is refused, or none can be used; then the page is written all the same.
    """
    subject, wanted = calibrated_subject(config, run), config.calibration
    plan = TrialPlan(
        subject=subject.name,
        num_chains=wanted.num_chains,
        num_draws=wanted.num_draws,
        num_samples=len(subject.subjects.probe.ids),
        takes_gradients=subject.takes_gradients,
    )
    folder, device = run.location.fetch("calibration") / "calibration", subject.subjects.device
    inputs = stage_fingerprint("trial", asdict(plan) | {"device": device}, [subject.inputs])
    names, num_workers = subject.subjects.observable_names, 1
    with Trials(subject.opener, config.sampling, device, plan, run, inputs, progress) as trials:
        ends = trials.curvature()
        curvature = (ends.smallest, ends.largest)
        progress.say(f"calibrate: the loss has curvatures from {ends.smallest:.3g} to {ends.largest:.3g} nats/weight^2")
        settings, refused = _proposal(subject, curvature)
        run.event("calibrate", "started", settings=len(settings), refused=len(refused))

        def judge(setting: Setting, tried: Sequence[Trial], steps: int) -> Assessment:
            nonlocal num_workers
            num_workers = max(num_workers, *(trial.num_workers for trial in tried))
            found = assess(setting, tried, names, steps)
            stiffness = setting.step_size * precisions(curvature, *setting.posterior)[1]
            stiffness *= config.sampling.sampler.kind != "rmsprop_sgld"  # whose steps are scaled in every direction
            if found.failure:
                return found
            return judge_bias(found, _plan(subject, found, num_workers), wanted.standard_error, stiffness)

        def space(setting: Setting) -> int:
            return wanted.steps_between_draws or spacing(setting, curvature, wanted.num_draws)

        ranked, done = search(settings, trials.run, judge, space, is_fixed=wanted.step_sizes is not None)
    found = Calibration(
        name=config.name,
        component=subject.component,
        ranked=ranked,
        refused=refused,
        trials=done,
        plan=None if ranked[0].failure else _plan(subject, ranked[0], num_workers),
        standard_error=wanted.standard_error,
        curvature=curvature,
        num_subjects=subject.num_sets,
        num_workers=num_workers,
    )
    write_json(run.path / SETTINGS, [_row(one) for one in ranked])
    write_calibration_report(folder / "report.html", found)
    run.event("calibrate", "finished", chosen=ranked[0].setting._asdict() if found.plan else None)
    _conclude(subject, found, folder, run.location, progress)


def _proposal(subject: Calibrated, curvature: Curvature) -> Proposal:
    """What to try; an error if all of it is refused."""
    # The opener's section names every component; the user's may have patterns of names.
    wanted, sampling = subject.config.calibration, subject.opener.sampling
    now, sampler = sampling.resolve(subject.component), sampling.sampler
    is_scaled = isinstance(sampler, RmspropSgldConfig)
    found = propose(
        curvature,
        wanted.inverse_temperatures or [now.inverse_temperature],
        wanted.localizations or [now.localization],
        wanted.step_sizes,
        standard_error=wanted.standard_error,
        # The preconditioner of a coordinate without gradient, larger than any other: such steps may be too careful.
        largest_scale=1 / sampler.stability if isinstance(sampler, RmspropSgldConfig) else 1.0,
        limit=math.inf if is_scaled else 4.0,
        is_raised=wanted.localizations is None,
    )
    if not found.settings:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in found.refused.items())
        raise PatterningError(f"calibration.step_sizes, calibration.localizations: nothing is left to try ({reasons})")
    return found


def _plan(subject: Calibrated, best: Assessment, num_workers: int) -> RunPlan:
    sampling = subject.opener.sampling
    return plan_run(
        best,
        standard_error=subject.config.calibration.standard_error,
        num_chains=sampling.resolve(subject.component).num_chains,
        min_draws=2 * sampling.num_batches,
        num_subjects=subject.num_sets,
        num_workers=num_workers,
    )


def _row(one: Assessment) -> dict[str, Any]:
    numbers = asdict(one) | {"setting": one.setting._asdict()}
    for name in ("llc", "temperature", "temperature_stiff", "step_bias"):
        numbers[name] = getattr(one, name)._asdict()
    numbers |= {"signals": {name: signal._asdict() for name, signal in one.signals.items()}}
    return numbers | {"usable_per_second": one.usable_per_second, "loss_rise": one.loss_rise}


def _conclude(subject: Calibrated, found: Calibration, folder: Path, location: Location, progress: Progress) -> None:
    """Write calibrated.yaml and say what was found; an error if there is nothing to choose."""
    target = folder / "calibrated.yaml"
    if found.plan is None:
        target.unlink(missing_ok=True)
        counts = ", ".join(f"{n} {mode}" for mode, n in Counter(one.failure for one in found.ranked).items())
        raise PatterningError(
            f"{folder / 'report.html'}: none of {len(found.ranked)} settings can be used ({counts}); "
            "what to turn stands under the traces"
        )
    best, plan = found.ranked[0], found.plan
    changes = {
        "step_size": best.setting.step_size,
        "inverse_temperature": best.setting.inverse_temperature,
        "localization": best.setting.localization,
        "burn_in": plan.burn_in,
        "steps_between_draws": plan.steps_between_draws,
        "num_draws": plan.num_draws,
        "num_chains": plan.num_chains,
    }
    write_text(target, _comments(subject, found, plan, changes) + dump_config(_changed(subject, changes, location)))
    load_config(target)  # what another section asks of the new values is said now
    usable = sum(not one.failure for one in found.ranked)
    progress.say(f"calibrate: {usable} of {len(found.ranked)} settings are usable; see {folder / 'report.html'}")
    progress.say(f"calibrate: best: {best.setting.words}")
    progress.say(f"calibrate: {predicted_length(found, plan)}")
    progress.say(f"calibrate: to sample with it, use {target}")


def _changed(subject: Calibrated, changes: dict[str, Any], location: Location) -> Config:
    """The user's configuration with the new values, also for the calibrated component's own."""
    config = subject.config
    lanczos_steps = config.sampling.lanczos_steps or _LANCZOS_STEPS
    components = [
        entry.model_copy(update=dict.fromkeys(changes)) if entry.name == subject.component else entry
        for entry in config.sampling.components
    ]
    sampling = config.sampling.model_copy(update=changes | {"components": components, "lanczos_steps": lanczos_steps})
    run_dir = config.run_dir if Location.at(config.run_directory) == location else location.url or location.path
    return config.model_copy(update={"sampling": sampling, "run_dir": run_dir})


def _comments(subject: Calibrated, found: Calibration, plan: RunPlan, changes: dict[str, Any]) -> str:
    best, before = found.ranked[0], subject.opener.sampling.resolve(subject.component)
    others = [
        entry.name
        for entry in subject.config.sampling.components
        if entry.name != subject.component and any(getattr(entry, key) is not None for key in changes)
    ]
    lines = [
        f"Written by `patterning calibrate`, from {len(found.ranked)} settings of {best.num_chains} chains of "
        f"{len(found.trials[best.setting][0].mean_loss)} draws on {subject.name}.",
        WHAT_IS_WHAT,
        f"Chosen: {best.effective_draws:.0f} effective draws of {best.num_chains * best.num_draws}, "
        f"reliability of chi {best.reliability:.2f}, R-hat up to {best.rhat:.3f}, "
        f"LLC {best.llc.value:.3g} +- {best.llc.standard_error:.2g}.",
        f"Predicted: {predicted_length(found, plan)}.",
        *(f"sampling.{key}: {getattr(before, key):g} -> {value:g}" for key, value in changes.items()),
        *([f"Components that keep settings of their own: {', '.join(others)}."] if others else []),
    ]
    return "".join(f"# {line}\n" for line in lines)
