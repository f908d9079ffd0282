"""The driver: stages of a run in their order, each run again only if its inputs changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patterning_dist.config import Config, dump_config
from patterning_dist.files import file_sha256
from patterning_dist.progress import Progress
from patterning_dist.rundir import STAGES, RunDirectory, stage_fingerprint
from patterning_dist.stages.prepare import prepare
from patterning_dist.stages.report import report
from patterning_dist.stages.sample import sample
from patterning_dist.stages.solve import solve
from patterning_dist.stages.train import retrain, train

Stage = Callable[[Config, RunDirectory, Progress], list[Path]]
_STAGES: dict[str, Stage] = dict(zip(STAGES, (prepare, train, sample, solve, retrain, report), strict=True))
# What a stage depends on besides the stages before it.
_SECTIONS = {
    "prepare": ("seed", "data"),
    "train": ("seed", "device", "model", "training"),
    "sample": ("sampling", "response"),
    "solve": ("response", "solve"),
    "retrain": ("retrain",),
    "report": ("name",),
}


def run_stages(config: Config, stages: list[str], directory: Path) -> None:
    """Run the named stages of a run, skipping those whose inputs have not changed since they finished.

    Args:
        config: of the run; it is stored in the run directory, which then replays itself.
        stages: names out of ``STAGES``, in order.
        directory: the run directory; made if missing, locked against other drivers while this runs.

    Raises:
        PatterningError: whatever the user can put right.
    """
    with RunDirectory(directory).locked() as run:
        run.store_config(dump_config(config))
        fingerprints = _fingerprints(config)
        with Progress() as progress:
            for stage in stages:
                if run.is_done(stage, fingerprints[stage]):
                    progress.say(f"{stage}: done before, inputs unchanged")
                    run.event(stage, "kept")
                    continue
                with run.stage(stage, fingerprints[stage]) as outputs:
                    outputs += _STAGES[stage](config, run, progress)
                progress.say(f"{stage}: {run.manifest['stages'][stage]['seconds']:.0f} s")


def _fingerprints(config: Config) -> dict[str, str]:
    """A hash a stage: its own sections of the configuration, and the hash of the stage before."""
    fingerprints: dict[str, str] = {}
    upstream: list[str] = [_corpus_hash(config)]
    dumped = config.model_dump(mode="json")
    for stage in STAGES:
        sections = {name: dumped[name] for name in _SECTIONS[stage]}
        fingerprints[stage] = stage_fingerprint(stage, sections, upstream)
        upstream = [fingerprints[stage]]
    return fingerprints


def _corpus_hash(config: Config) -> str:
    """Hash of the text itself, so that an edited corpus is noticed; of the paths alone where the text is gone."""
    files = [
        file
        for source in config.data.sources
        for file in (
            sorted(p for p in source.path.rglob("*") if p.is_file()) if source.path.is_dir() else [source.path]
        )
    ]
    return stage_fingerprint("corpus", {str(f): file_sha256(f) if f.is_file() else "" for f in files})
