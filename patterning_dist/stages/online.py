"""Online rounds of an arm: measured where a round has led to, and trained on under the weights found there.

Round r + 1 starts from the checkpoint of round r. The chains around it are on L_rho, the loss of round r: that is what
the checkpoint is a minimum of, and not of L. Its scores are those of the plain losses l_i, so that the weights are
again rho = 1 + h with (n_beta / n) chi h as wanted, chi being that of the posterior there; they replace those before.

First moments need no chains. They are of the plain loss, around a copy of the checkpoint that was annealed on plain
weights, and of the component that the rule of stage solve finds there.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from patterning_dist.config import Config
from patterning_dist.measure.measure import measure
from patterning_dist.measure.plans import subject_plans
from patterning_dist.measure.subject import Subject
from patterning_dist.progress import Progress
from patterning_dist.runtime.environment import resolve_device
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.moments import choose_subject
from patterning_dist.stages.rounds import Round, joined_metrics, rounds_of
from patterning_dist.stages.sample import open_subjects, solved_subjects, subject_name
from patterning_dist.stages.scores import Pool
from patterning_dist.stages.solve import described, refuse_noise, scored, solve_arm, write_weights
from patterning_dist.storage.files import (
    atomic_path,
    changed_files,
    digests_of,
    file_sha256,
    read_object,
    write_json,
    write_parquet,
)
from patterning_dist.storage.run import RunDirectory, stage_fingerprint
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import JOB_FILES, REPORT, checkpoint_files, job_files

STAGE = "retrain"


def weigh_again(config: Config, run: RunDirectory, progress: Progress, number: int) -> list[Path]:
    """Measure where the rounds before have ended, and solve for the weights of round ``number``; the files written.

    Chains that are done, scores and weights are kept, as in the stages that these are of.

    Raises:
        PatterningError: too few healthy chains, scores that are noise, or an infeasible strength.
    """
    assert config.solve is not None
    rounds = rounds_of(config, number)
    most = max(part.arm.rounds for part in rounds)
    run.event(STAGE, "round", number=number, of=most, jobs=[part.name for part in rounds])
    progress.say(f"{STAGE}: round {number} of {most}, measured at {len(rounds)} checkpoints of round {number - 1}")
    by_scores = _by_moments if config.solve.scores == "first_moment" else _by_chains
    return by_scores(config, run, rounds, progress)


def _by_moments(config: Config, run: RunDirectory, rounds: Sequence[Round], progress: Progress) -> list[Path]:
    assert config.solve is not None
    device, found = resolve_device(config.device), open_subjects(config, run.location, "cpu")
    components = list(dict.fromkeys(found.by_name[name].component for name in solved_subjects(config, found.by_name)))
    of_round = [[subject_name(part.before.annealed, component) for component in components] for part in rounds]
    subjects = {
        name: Subject(part.before.annealed, component, name)
        for part, names in zip(rounds, of_round, strict=True)
        for name, component in zip(names, components, strict=True)
    }
    files = [file for part in rounds for file in checkpoint_files(part.before.annealed)]
    run.location.fetch(*files, *(part.folder for part in rounds))
    opener = replace(found, by_name=subjects, files=(*found.files, *files), gradients_of=frozenset(), thin=None)
    plans = subject_plans(opener(device, Ranks()), run)
    inputs, written = {name: plan.fingerprint for name, plan in plans.items()}, []
    for part, names in zip(rounds, of_round, strict=True):
        subject, rises = choose_subject(Pool(config, run, opener, names[0], device, inputs), names, progress)
        written += _solve(part, Pool(config, run, opener, subject, device, inputs), rises, progress)
    return written


def _by_chains(config: Config, run: RunDirectory, rounds: Sequence[Round], progress: Progress) -> list[Path]:
    assert config.solve is not None
    device = resolve_device(config.device)
    subjects, files = {}, []
    for part in rounds:
        checkpoint, table = part.before.folder, part.before.weights
        assert table is not None  # checked with the file
        name = subject_name(checkpoint, config.solve.component)
        subjects[name] = Subject(checkpoint, config.solve.component, name, table, part.arm.strength)
        files += [*checkpoint_files(checkpoint), table]
    run.location.fetch(*files, *(part.folder for part in rounds))
    opener = open_subjects(config, run.location, device).weighted(subjects, *files, gradients_of=frozenset(subjects))
    written = list(measure(run, config.name, STAGE, opener, device, progress).files)
    for part, name in zip(rounds, subjects, strict=True):
        written += _solve(part, Pool(config, run, opener, name, device), {}, progress)
    return written


def _solve(part: Round, pool: Pool, rises: dict[str, float], progress: Progress) -> list[Path]:
    """The weights of a round in its folder, with what is predicted of them; kept where they are of these inputs."""
    config, run = pool.config, pool.run
    assert config.solve is not None and part.weights is not None
    table, solution = run.path / part.weights, run.path / part.solution
    direction = config.response.direction and config.response.direction.model_dump()
    sections = {"solve": config.solve.model_dump(), "direction": direction}
    fingerprint = stage_fingerprint(
        "round", sections | {"chains": pool.inputs(pool.subject), "weights": part.arm.weights}
    )
    stored = read_object(solution)
    if stored.get("fingerprint") == fingerprint and not changed_files(
        table.parent, {table.name: str(stored.get("table_sha256"))}
    ):
        run.event(STAGE, "weights_kept", job=part.name)
        return [table, solution]
    with scored(pool, progress) as scores:
        about = described(pool, scores)
        refuse_noise(part.name, about["reliability"], config.solve)
        progress.start(f"solving for the weights of {part.name}", None)
        weights, entry = solve_arm(pool, scores, str(part.arm.weights))
        write_weights(pool, table, part.arm.name, weights)
        report = {"subject": pool.subject, "mean_rises": rises, **about, **entry}
    write_json(solution, report | {"fingerprint": fingerprint, "table_sha256": file_sha256(table)})
    run.publish(table, solution)
    run.event(STAGE, "weights_solved", job=part.name, effective_sample_share=entry["effective_sample_share"])
    return [table, solution]


def join_rounds(config: Config, run: RunDirectory) -> list[Path]:
    """What every arm has, for those in rounds: last weights and report, and the metrics of all rounds as one table.

    Returns the files of these arms' own folders.
    """
    written: list[Path] = []
    for last in (replace(part, number=part.arm.rounds) for part in rounds_of(config, 2)):
        run.location.fetch(last.arm_folder)
        folder = run.path / last.arm_folder
        parts = [run.path / replace(last, number=number).folder for number in range(1, last.number + 1)]
        initial, model, metrics, held_out, report = (folder / name for name in JOB_FILES)
        ended, joined = read_object(parts[-1] / REPORT), read_object(report)
        is_joined = joined == ended | {"sha256": joined.get("sha256")}
        if not is_joined or changed_files(folder, joined["sha256"]):
            _copy(parts[0] / initial.name, initial)
            _copy(parts[-1] / model.name, model)
            _copy(parts[-1] / held_out.name, held_out)
            write_parquet(metrics, joined_metrics([pq.read_table(part / metrics.name) for part in parts]))
            open_task(config, run.path, "cpu").describe(folder)
            names = [file.name for file in job_files(folder) if file != report]
            # The last, for it says that the others are there.
            write_json(report, ended | {"sha256": digests_of(folder, names)})
            run.publish(folder)
        written += job_files(folder)
    return written


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
