"""`patterning calibrate`: short chains over a grid -> calibration/{report.html, settings.json, calibrated.yaml}."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patterning_dist.config import Config, dump_config, load_config
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.report.calibration import WHAT_IS_WHAT, Calibration, foretold, write_calibration_report
from patterning_dist.response.calibration import Assessment, Setting, assess, grid, must_diverge
from patterning_dist.response.ranking import rank
from patterning_dist.response.run_length import RunPlan, plan_run
from patterning_dist.runtime.chains.trials import TrialPlan, run_trials
from patterning_dist.stages.calibration_subject import Calibrated, calibrated_subject
from patterning_dist.storage.files import write_json, write_text
from patterning_dist.storage.mirror import Place
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

# Of the value that the sampling section has, where the grid names none.
_MULTIPLES = (0.1, 0.3, 1.0, 3.0)


def calibrate(config: Config, run: RunDirectory, progress: Progress) -> None:
    """Try every setting of the grid that has not been tried, and write what came of all of them.

    Raises:
        PatterningError: every setting must diverge, or none can be used; the page is written all the same.
    """
    subject, wanted = calibrated_subject(config, run), config.calibration
    settings, refused = _grid(config, subject.component)
    resolved = config.sampling.resolve(subject.component)
    plan = TrialPlan(
        unit=subject.name,
        num_draws=wanted.num_draws,
        steps_between_draws=wanted.steps_between_draws or resolved.steps_between_draws,
        num_samples=len(subject.subjects.probe.ids),
        takes_gradients=subject.takes_gradients,
    )
    run.event("calibrate", "started", settings=len(settings), refused=len(refused))
    tasks = [(setting, chain) for setting in settings for chain in range(wanted.num_chains)]
    folder = run.place.fetch("calibration") / "calibration"
    inputs = stage_fingerprint("trial", asdict(plan) | {"device": subject.subjects.device}, [subject.inputs])
    done = run_trials(
        subject.opener,
        config.sampling,
        subject.subjects.device,
        plan,
        tasks,
        run,
        "calibration/trials",
        inputs,
        progress,
    )
    trials = {setting: [t for (s, _), t in zip(tasks, done, strict=True) if s == setting] for setting in settings}
    names = subject.subjects.observable_names
    ranked = rank([assess(setting, mine, names, plan.steps_between_draws) for setting, mine in trials.items()])
    num_workers = max(trial.num_workers for trial in done)
    found = Calibration(
        name=config.name,
        component=subject.component,
        ranked=ranked,
        refused=refused,
        trials=trials,
        plan=None if ranked[0].failure else _plan(subject, ranked[0], num_workers),
        standard_error=wanted.standard_error,
        num_units=subject.num_sets,
        num_workers=num_workers,
    )
    write_json(folder / "settings.json", [_row(one) for one in ranked])
    write_calibration_report(folder / "report.html", found)
    run.event("calibrate", "finished", chosen=ranked[0].setting._asdict() if found.plan else None)
    _conclude(subject, found, folder, run.place, progress)


def _grid(config: Config, component: str) -> tuple[list[Setting], list[Setting]]:
    """(settings to try, settings that must diverge)."""
    wanted, now = config.calibration, config.sampling.resolve(component)
    values = [
        given or [multiple * value for multiple in _MULTIPLES]
        for given, value in (
            (wanted.step_sizes, now.step_size),
            (wanted.inverse_temperatures, now.inverse_temperature),
            (wanted.localizations, now.localization),
        )
    ]
    settings = grid(*([float(f"{value:.6g}") for value in axis] for axis in values))
    # A preconditioner or a momentum has another limit.
    refused = [s for s in settings if must_diverge(s)] if config.sampling.sampler.kind == "sgld" else []
    if len(refused) == len(settings):
        raise PatterningError(
            f"calibration.step_sizes: all of {min(values[0]):g} and more diverge with localization {min(values[2]):g} "
            "and more; expected some below 4 / localization"
        )
    return [s for s in settings if s not in refused], refused


def _plan(subject: Calibrated, best: Assessment, num_workers: int) -> RunPlan:
    sampling = subject.config.sampling
    return plan_run(
        best,
        standard_error=subject.config.calibration.standard_error,
        num_chains=sampling.resolve(subject.component).num_chains,
        min_draws=2 * sampling.num_batches,
        num_units=subject.num_sets,
        num_workers=num_workers,
    )


def _row(one: Assessment) -> dict[str, Any]:
    numbers = asdict(one) | {"setting": one.setting._asdict(), "llc": one.llc._asdict()}
    numbers |= {"signals": {name: signal._asdict() for name, signal in one.signals.items()}}
    return numbers | {"usable_per_second": one.usable_per_second, "loss_rise": one.loss_rise}


def _conclude(subject: Calibrated, found: Calibration, folder: Path, place: Place, progress: Progress) -> None:
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
    write_text(target, _comments(subject, found, plan, changes) + dump_config(_changed(subject, changes, place)))
    load_config(target)  # what another section asks of the new values is said now
    usable = sum(not one.failure for one in found.ranked)
    progress.say(f"calibrate: {usable} of {len(found.ranked)} settings are usable; see {folder / 'report.html'}")
    progress.say(f"calibrate: best: {best.setting.words}")
    progress.say(f"calibrate: {foretold(found, plan)}")
    progress.say(f"calibrate: to sample with it, use {target}")


def _changed(subject: Calibrated, changes: dict[str, Any], place: Place) -> Config:
    """The user's configuration with the new values, also for the calibrated component's own."""
    config = subject.config
    components = [
        entry.model_copy(update=dict.fromkeys(changes)) if entry.name == subject.component else entry
        for entry in config.sampling.components
    ]
    sampling = config.sampling.model_copy(update=changes | {"components": components})
    run_dir = config.run_dir if Place.at(config.run_directory) == place else place.url or place.path
    return config.model_copy(update={"sampling": sampling, "run_dir": run_dir})


def _comments(subject: Calibrated, found: Calibration, plan: RunPlan, changes: dict[str, Any]) -> str:
    best, before = found.ranked[0], subject.config.sampling.resolve(subject.component)
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
        f"Foretold: {foretold(found, plan)}.",
        *(f"sampling.{key}: {getattr(before, key):g} -> {value:g}" for key, value in changes.items()),
        *([f"Components that keep settings of their own: {', '.join(others)}."] if others else []),
    ]
    return "".join(f"# {line}\n" for line in lines)
