"""One tiny run of each kind by the command, and the arrays that its golden numbers are of.

Names of files and columns of a run directory are looked up here and nowhere else in this folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from study_models import make_study
from typer.testing import CliRunner

from patterning_dist.cli import app

Arrays = dict[str, np.ndarray]

OWN_MODEL = {
    "name": "golden-own-model",
    "seed": 11,
    "device": "cpu",
    "model": {
        "kind": "module",
        "build": "golden.own_model:build",
        "per_sample_loss": "golden.own_model:per_sample_loss",
        "checkpoints": ["early", "final"],
    },
    "data": {"kind": "function", "load": "golden.own_model:load"},
    "sampling": {
        "components": [{"name": "everything"}, {"name": "0.weight+0.bias"}],
        "observables": [
            {"kind": "component_loss", "name": "component"},
            {"kind": "split_loss", "name": "near", "split": "domain:near"},
            {"kind": "function", "names": ["origin"], "path": "golden.own_model:logit_of_the_origin"},
            {"kind": "llc", "name": "llc"},
            {"kind": "free_energy", "name": "free_energy"},
        ],
        "num_chains": 3,
        "num_draws": 12,
        "burn_in": 3,
        "steps_between_draws": 2,
        "inverse_temperature": 80,
        "localization": 10,
        "step_size": 2e-3,
        "batch_size": 16,
        "micro_batch_size": 32,
        "probe_sequences": 40,
        "evaluation_sequences": 20,
        "num_batches": 4,
    },
}
BRACKETS = {
    "experiment": "parentheses",
    "name": "golden-brackets",
    "seed": 7,
    "device": "cpu",
    "task": {
        "min_length": 8,
        "length_trials": 2,
        "num_balanced": 30,
        "num_unequal": 60,
        "unequal": "stratified",
        "num_test": 40,
        "num_out_of_distribution": 50,
    },
    "model": {"num_layers": 1, "num_heads": 2, "width": 8, "feedforward": 8},
    "training": {
        "num_steps": 16,
        "warmup_steps": 4,
        "batch_size": 24,
        "learning_rate": 5e-3,
        "weight_decay": 1.2,
        "seeds_per_task": 16,
    },
    "references": {
        "num_seeds": 16,
        "per_rule": 2,
        "nested_above": 0.5,
        "equal_count_below": 0.49,
        "train_accuracy": 0.1,
    },
    "sampling": {
        "components": [{"name": "everything"}],
        "observables": [
            {"kind": "component_loss", "name": "training_loss"},
            {"kind": "llc", "name": "llc"},
            {"kind": "free_energy", "name": "free_energy"},
        ],
        "num_chains": 2,
        "num_draws": 8,
        "burn_in": 4,
        "steps_between_draws": 2,
        "inverse_temperature": 100,
        "localization": 100,
        "sampler": {"kind": "rmsprop_sgld", "stability": 0.05},
        "step_size": 1e-4,
        "batch_size": 30,
        "micro_batch_size": 100,
        "num_batches": 4,
    },
    "weights": {"effective_share": 0.6, "min_weight": 0.1},
    "online": {"num_seeds": 8, "per_rule": 2},
    "arms": {"num_seeds": 8, "num_control_seeds": 2, "num_shuffles": 1},
    "check": {"strengths": [-1.0, 1.0], "per_rule": 2},
}


def loop(directory: Path) -> Arrays:
    """All tables of chi, the scores of the pool, the weights, and what the trainings of a finished run measured."""
    found: Arrays = {}
    for file in sorted((directory / "response").glob("susceptibility-*.parquet")):
        found |= susceptibilities(file, file.stem.partition("-")[2])
    found |= susceptibilities(directory / "response" / "pool.parquet", "pool")
    for file in sorted((directory / "weights").glob("*.parquet")):
        found[f"weights/{file.stem}"] = pq.read_table(file)["weight"].to_numpy()
    for file in sorted(directory.rglob("metrics.parquet")):
        table, place = pq.read_table(file), file.parent.relative_to(directory).as_posix()
        for name in (name for name in table.column_names if name != "seconds"):
            found[f"metrics/{place}/{name}"] = table[name].to_numpy()
    return found


def causal_lm(folder: Path, *changes: str) -> Arrays:
    """A study of two checkpoints of a GPT-NeoX of Hugging Face."""
    file, directory = make_study(folder), folder / "golden"
    patterning("study", file, directory, *changes)
    return study_arrays(directory, ("early", "final"), ("layer.0.head.1", "layer.1.mlp"))


def own_model(folder: Path, *changes: str) -> Arrays:
    """A study of two checkpoints of a model of the user's own."""
    file, directory = folder / "study.yaml", folder / "golden"
    file.write_text(yaml.safe_dump(OWN_MODEL, sort_keys=False))
    patterning("study", file, directory, *changes)
    return study_arrays(directory, ("early", "final"), ("everything", "0.weight+0.bias"))


def brackets(directory: Path) -> Arrays:
    """Of the parentheses experiment: references, an online round, arms, predictions checked."""
    found: Arrays = {}
    for reference in ("nested-0", "nested-1", "equal_count-2", "equal_count-3"):
        found |= susceptibilities(directory / "response" / f"susceptibility-{reference}.parquet", reference)
    for arm in ("nested", "equal_count", "online_nested", "online_equal_count", "permuted", "llc_nested"):
        table = pq.read_table(directory / "weights" / f"{arm}.parquet")
        found[f"weights/{arm}"] = table["weight"].to_numpy()
    for place in ("baseline", "rounds/toward_nested_1", "retrain/base", "retrain/nested", "retrain/one_phase_nested"):
        table = pq.read_table(directory / place / "networks.parquet")
        for metric in ("train", "test", "rejected"):
            found[f"metrics/{place}/{metric}"] = table[metric].to_numpy()
    summary = json.loads((directory / "summary.json").read_text())
    for entry in ("predicted", "measured"):
        found[f"metrics/check/{entry}"] = np.array([row[entry]["value"] for row in summary["check"]])
    return found


def study_arrays(directory: Path, checkpoints: tuple[str, ...], components: tuple[str, ...]) -> Arrays:
    found: Arrays = {}
    for checkpoint in checkpoints:
        for component in components:
            file = directory / "response" / checkpoint / f"susceptibility-{component}.parquet"
            found |= susceptibilities(file, f"{checkpoint}/{component}")
    units = json.loads((directory / "response" / "diagnostics.json").read_text())["subjects"]
    found["metrics/llc"] = np.array([unit["llc"]["value"] for unit in units.values()])
    return found


def susceptibilities(file: Path, subject: str) -> Arrays:
    """chi and its standard errors for every observable, the losses at the checkpoint, and the samples they are of."""
    table = pq.read_table(file)
    kept = [name for name in table.column_names if name.startswith(("chi_", "se_", "center_loss"))]
    ids = next(name for name in ("sample_id", "sequence_id") if name in table.column_names)
    return {f"chi/{subject}/{name}": table[name].to_numpy() for name in kept} | {
        f"chi/{subject}/ids": table[ids].to_numpy()
    }


def patterning(command: str, file: Path, directory: Path, *changes: str) -> None:
    """The command, in this process and on the Ray that runs."""
    options = [argument for change in changes for argument in ("--set", change)]
    result = CliRunner().invoke(app, [command, str(file), "--run-dir", str(directory), *options])
    assert result.exit_code == 0, result.output
