"""A run directory small enough for tests: a few KB of text in three domains, and a fresh model as its checkpoint."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from patterning_dist.config import Config, load_config
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.progress import Progress
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.prepare import prepare
from patterning_dist.stages.sample import open_subjects
from patterning_dist.stages.scores import Pool
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import RunDirectory

SETTINGS = {
    "name": "tiny",
    "seed": 3,
    "device": "cpu",
    "data": {"vocabulary_size": 300, "context_length": 16, "validation_fraction": 0.3},
    "model": {"num_layers": 2, "num_heads": 2, "d_model": 8, "d_head": 4, "position_bias_init": 2},
    "training": {"num_steps": 6, "batch_size": 8, "evaluate_every": 5, "evaluation_sequences": 8},
    "sampling": {
        "components": [{"name": "layer.0.head.1"}, {"name": "everything"}],
        "observables": [
            {"kind": "component_loss", "name": "component"},
            {"kind": "split_loss", "name": "induction", "split": "induction_minus_rest"},
            {"kind": "split_loss", "name": "fables", "split": "domain:fables"},
        ],
        "num_chains": 3,
        "num_draws": 12,
        "burn_in": 3,
        "steps_between_draws": 2,
        "inverse_temperature": 50,
        "localization": 20,
        "step_size": 1e-3,
        "batch_size": 4,
        "probe_sequences": 6,
        "evaluation_sequences": 12,
        "draws_per_push": 5,
        "num_batches": 4,
    },
    "response": {"direction": {"component": "everything", "hessian_sequences": 8}},
    "solve": {"component": "everything", "targets": {"induction": -1}, "effective_sample_share": 0.7},
    "retrain": {"seeds": [0], "num_steps": 6, "evaluate_every": 5},
}
WORDS = {
    "fables": "fox crow lion mouse grapes cheese river shadow wolf lamb",
    "recipes": "flour butter sugar salt oven bowl stir bake cool serve",
    "logs": "start stop error retry node link open close read write",
}


def quiet() -> Progress:
    """A progress display that shows nothing."""
    return Progress(Console(quiet=True))


def write_corpus(folder: Path) -> Path:
    """A few KB of text in three domains; returns its folder."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for domain, words in WORDS.items():
        rng, lines = random.Random(domain), []
        while sum(map(len, lines)) < 5000:
            phrase = " ".join(rng.choices(words.split(), k=4))
            lines.append(f"{phrase}, {phrase}.")
        documents = ["\n".join(lines[start : start + 8]) for start in range(0, len(lines), 8)]
        for number, text in enumerate(documents):
            file = corpus / domain / f"{number:02}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    return corpus


def make_tiny_run(folder: Path) -> Path:
    """Write corpus, config.yaml, data and checkpoint; returns the run directory."""
    corpus = write_corpus(folder)
    run = RunDirectory(folder / "run")
    settings = SETTINGS | {"data": SETTINGS["data"] | {"sources": [{"path": str(corpus)}]}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    config = tiny_config(run.path)
    prepare(config, run, quiet())
    weights = checkpoint(config, run.path).state_dict()
    (run.path / "baseline").mkdir()
    save_file(weights, run.path / "baseline" / "model.safetensors")
    return run.path


def tiny_config(directory: Path, *overrides: str) -> Config:
    """The configuration of a tiny run, with overrides as on the command line."""
    return load_config(directory / "config.yaml", overrides)


def checkpoint(config: Config, directory: Path) -> AttentionOnlyTransformer:
    """What stands in for the trained baseline: the initialisation, with one weight at a known place."""
    from patterning_dist.data.tokens import TokenDataset

    pool = TokenDataset(directory / "data" / "train.parquet")
    model = AttentionOnlyTransformer(config.model, pool.vocabulary_size, pool.context_length, seed=config.seed)
    with torch.no_grad():
        model.unembedding[0, 0] = 0.0
    return model


def subjects_of(config: Config, directory: Path, device: str = "cpu") -> Subjects:
    """All sets of chains of a run, opened in this process."""
    return open_subjects(config, Location.at(directory), device)(device, Ranks())


def copy_run(source: Path, target: Path) -> RunDirectory:
    """The inputs of a tiny run, without what stages wrote."""
    for name in ("data", "baseline"):
        shutil.copytree(source / name, target / name)
    shutil.copy(source / "config.yaml", target)
    return RunDirectory(target)


class InProcess(Pool):
    """Passes over the pool in this process, without Ray and without files of results."""

    def tasks(self, progress):
        def run_calls(label, calls):
            study = self.opener("cpu", self.subjects.ranks)
            return [call.function(SimpleNamespace(study=study), *call.arguments) for call in calls]

        return contextlib.nullcontext(run_calls)


def undefined_on_one_side(model: torch.nn.Module) -> torch.Tensor:
    """An observable that is NaN wherever one weight, zero in the checkpoint, lies above a threshold."""
    weight = model.unembedding[0, 0]
    return torch.where(weight > 0.15, torch.nan, weight)[None]


def edge(model: torch.nn.Module) -> torch.Tensor:
    """An observable: a weight that is zero in the checkpoint."""
    return model.unembedding[0, 0][None]


def raise_or_hang_at_the_edge(model: torch.nn.Module) -> torch.Tensor:
    """The same, where it lies between two thresholds."""
    if edge(model) > 0.15:
        raise ValueError("too far")
    while edge(model) < -0.09:
        time.sleep(1)
    return edge(model)


def kill_the_worker(model: torch.nn.Module) -> torch.Tensor:
    """An observable whose process is killed as by the kernel, for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(1)


def finish_inputs(config: Config, run: RunDirectory) -> None:
    """Stages prepare and train are done, with what a copied run has of them."""
    from patterning_dist.driver import _fingerprints, experiment_of

    experiment = experiment_of(config)
    inputs = experiment.inputs(config, run.manifest)
    run.update_manifest(inputs=inputs)
    fingerprints = _fingerprints(experiment, config, inputs)
    for stage, folder in (("prepare", "data"), ("train", "baseline")):
        with run.stage(stage, fingerprints[stage]) as outputs:
            outputs += sorted((run.path / folder).iterdir())
