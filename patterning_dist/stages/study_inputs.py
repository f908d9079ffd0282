"""What the chains of a study follow from: hashes of its models, its data and the user's own code."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from patterning_dist.config import FunctionConfig, HuggingFaceModelConfig, StudyConfig, TokensConfig
from patterning_dist.config.sampling import LAYOUT_KEYS, PosteriorQuantityConfig
from patterning_dist.sampling.model_study import ModelStudy, model_location
from patterning_dist.sampling.observables import load_function
from patterning_dist.storage.files import file_sha256
from patterning_dist.storage.run import RunDirectory, stage_fingerprint

_MODEL_FILES = ("*.safetensors", "*.json")


def unit_fingerprints(study: ModelStudy, run: RunDirectory) -> dict[str, str]:
    """Unit, "<checkpoint>/<component>" -> hash of all that its chains follow from.

    Code of the user's own counts by the file that it is in; a model on the hub by its name and revision. The manifest
    keeps the hashes of weights, so that large files are read once.
    """
    config, known = study.config, run.manifest.get("weights", {})
    hidden = ("components", "observables", "probe", "min_chains")
    sampling = config.sampling.model_dump(mode="json", exclude={*LAYOUT_KEYS, *hidden})
    measured = [o for o in config.sampling.observables if not isinstance(o, PosteriorQuantityConfig)]
    shared = {
        "seed": config.seed,
        "sampling": sampling,
        "observables": [o.model_dump() for o in measured],
        "functions": [_code(o.path, "observable function") for o in measured if isinstance(o, FunctionConfig)],
        "data": _data(study),
        "traces": config.traces and config.traces.thin,
    }
    fingerprints, weights = {}, {}
    for checkpoint in config.model.checkpoints:
        model = _model(config, checkpoint, known, weights)
        for component in config.sampling.components:
            unit = f"{checkpoint}/{component.name}"
            resolved = config.sampling.resolve(component.name).model_dump()
            fingerprints[unit] = stage_fingerprint(unit, shared | {"model": model, "component": resolved})
    run.update_manifest(weights=weights)
    return fingerprints


def _data(study: ModelStudy) -> Any:
    data = study.config.data
    if not isinstance(data, TokensConfig):
        return _code(data.load, "data.load")
    held_out = {domain: blocks.sha256 for domain, blocks in study.held_out_sets.items()}
    return [study.train.sha256, held_out, study.probe_source.sha256]


def _model(config: StudyConfig, checkpoint: str, known: dict[str, list[Any]], weights: dict[str, list[Any]]) -> Any:
    model = config.model
    if not isinstance(model, HuggingFaceModelConfig):
        return [checkpoint, _code(model.build, "model.build"), _code(model.per_sample_loss, "model.per_sample_loss")]
    path, revision = model_location(model, checkpoint)
    if not Path(path).is_dir():
        return [path, revision]
    hashes = {}
    for file in sorted(entry for pattern in _MODEL_FILES for entry in Path(path).glob(pattern)):
        stamp = [file.stat().st_size, file.stat().st_mtime_ns]
        before = known.get(str(file), [])
        weights[str(file)] = before if before[:2] == stamp else [*stamp, file_sha256(file)]
        hashes[file.name] = weights[str(file)][2]
    return hashes


def _code(path: str, what: str) -> list[Any]:
    load_function(path, what)
    source = inspect.getsourcefile(importlib.import_module(path.partition(":")[0]))
    return [path, file_sha256(Path(source)) if source else None]
