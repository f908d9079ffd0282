"""The loop, for every task: checkpoint -> chains -> chi -> weights -> check -> weighted retraining -> report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patterning_dist.config import Config, HuggingFaceConfig, TableConfig, TextConfig, ValidationConfig
from patterning_dist.config.checkpoints import expand_globs
from patterning_dist.config.checks import check
from patterning_dist.config.controls import ScoresControlConfig
from patterning_dist.config.load import find_local, find_path
from patterning_dist.config.window import window_remarks, with_localizations
from patterning_dist.data.bergson import SUBSETS
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.experiment import Stage
from patterning_dist.storage.files import file_sha256
from patterning_dist.storage.run import stage_fingerprint
from patterning_dist.training.job import WEIGHTED_LOSS


class Loop:
    """An ``Experiment``; see there. Stages whose section is missing are left out, and train where checkpoints exist."""

    schema = Config

    def locate(self, config: Config, folder: Path) -> Config:
        """See ``Experiment``."""
        data, model = config.data, config.model
        if isinstance(data, TextConfig):
            sources = [s.model_copy(update={"path": find_path(s.path, folder)}) for s in data.sources]
            data = data.model_copy(update={"sources": sources})
        elif isinstance(data, TableConfig):
            held_out = {domain: find_local(path, folder) for domain, path in data.held_out.items()}
            data = data.model_copy(update={"train": find_local(data.train, folder), "held_out": held_out})
        if isinstance(model, HuggingFaceConfig):
            found = find_local(model.path, folder)
            names = expand_globs(found, model.checkpoints) if found is not None else model.checkpoints
            model = model.model_copy(update={"path": found, "checkpoints": names})
            if isinstance(data, TextConfig | TableConfig):
                data = data.model_copy(update={"tokenizer": find_local(data.tokenizer, folder) or found})
        update: dict[str, Any] = {"data": data, "model": model}
        for section, key in (("training", "deepspeed"), ("sampling", "probe"), ("retrain", "deepspeed")):
            if (found := getattr(config, section)) is not None:
                update[section] = found.model_copy(update={key: find_path(getattr(found, key), folder)})
        if config.solve is not None:
            controls = [
                c.model_copy(update={"path": find_path(c.path, folder)}) if isinstance(c, ScoresControlConfig) else c
                for c in config.solve.controls
            ]
            update["solve"] = config.solve.model_copy(update={"controls": controls})
        if config.retrain is not None:
            arms = [
                arm
                if isinstance(arm, str) or not isinstance(arm.weights, Path)
                else arm.model_copy(update={"weights": find_path(arm.weights, folder)})
                for arm in config.retrain.arms
            ]
            update["retrain"] = update["retrain"].model_copy(update={"arms": arms})
        if (validation := config.validation) is not None:
            scores = {name: find_path(path, folder) for name, path in validation.scores.items()}
            bank = find_path(validation.bank, folder)
            update["validation"] = validation.model_copy(update={"scores": scores, "bank": bank})
        return with_localizations(config.model_copy(update=update))

    def check(self, config: Config) -> list[str]:
        """See ``Experiment``."""
        return check(config)

    def stages(self, config: Config) -> dict[str, Stage]:
        """See ``Experiment``."""
        room, found = "patterning_dist.stages", {}
        if isinstance(config.data, TextConfig):
            found["prepare"] = Stage(f"{room}.prepare:prepare", ("seed", "data"), on_ray=False)
        if not config.model.given_checkpoints:
            found["train"] = Stage(f"{room}.train:train", ("seed", "device", "data", "model", "training"))
        found["sample"] = Stage(
            f"{room}.sample:sample", ("seed", "device", "data", "model", "sampling", "response", "traces")
        )
        if config.solve is not None:
            windows = ("training", "predict", "retrain") if config.solve.max_cost is not None else ()
            found["solve"] = Stage(f"{room}.solve:solve", ("response", "solve", *windows))
        if config.check is not None:
            found["check"] = Stage(f"{room}.check:check", ("check",))
        if config.predict is not None:
            found["predict"] = Stage(f"{room}.predict:predict", ("training", "predict", "retrain"))
        if config.retrain is not None:
            found["retrain"] = Stage(f"{room}.train:retrain", ("training", "retrain"))
        if config.validation is not None:
            found["validate"] = Stage(f"{room}.validate:validate", ("training", "validation"))
        found["report"] = Stage(f"{room}.report:report", ("name",), on_ray=False)
        return found

    def inputs(self, config: Config, manifest: dict[str, Any]) -> dict[str, Any]:
        """See ``Experiment``: the text itself, so that an edited corpus is noticed, files that sections name, draws
        that solve reads of the chains, and by what rule weighted arms are trained.
        """
        found: dict[str, Any] = {}
        for section, key in (("training", "deepspeed"), ("retrain", "deepspeed"), ("sampling", "probe")):
            if (path := getattr(getattr(config, section), key, None)) is not None:
                found[section] = {key: file_sha256(path)}
        if config.solve is not None and (kept := config.solve.num_kept_draws):
            positions = [config.solve.checkpoint, config.solve.component, kept]  # that stage sample keeps
            found["sampling"] = found.get("sampling", {}) | {"positions": positions}
        if config.solve is not None:
            given = [c for c in config.solve.controls if isinstance(c, ScoresControlConfig) and c.path.exists()]
            if given:  # what is missing, the stage says
                found["solve"] = {c.name: file_sha256(c.path) for c in given}
        if config.retrain is not None:
            tables = {arm.name: arm.weights for arm in config.retrain.arm_list if isinstance(arm.weights, Path)}
            weights = {name: file_sha256(table) for name, table in tables.items() if table.exists()}
            found["retrain"] = found.get("retrain", {}) | weights | {"weighted_loss": WEIGHTED_LOSS}
        if config.validation is not None:
            found["validation"] = _given(config.validation)
        if isinstance(config.data, TextConfig):
            found["data"] = _corpus(config.data, manifest.get("inputs", {}).get("data"))
        return found

    def skeleton(self, config: Config) -> Any:
        """See ``Experiment``."""
        from patterning_dist.tasks.open import open_skeleton

        return open_skeleton(config)

    def preflight(self, config: Config, directory: Path) -> list[str]:
        """See ``Experiment``."""
        from patterning_dist.measure.preflight import preflight

        return [*window_remarks(config), *preflight(config, directory)]


def _given(validation: ValidationConfig) -> dict[str, Any]:
    """Hashes of scores and subsets that were made elsewhere; what is missing, the stage says."""
    files = {name: folder / "scores.bin" for name, folder in validation.scores.items()}
    files |= {} if validation.bank is None else {"bank": validation.bank / SUBSETS}
    return {name: file_sha256(file) for name, file in files.items() if file.exists()} | {"weighted_loss": WEIGHTED_LOSS}


def _corpus(data: TextConfig, stored: dict[str, Any] | None) -> dict[str, Any]:
    """Paths and hash of the text. Where it is gone, a run that was made from these very paths stands as it is."""
    from patterning_dist.data.corpus import corpus_files  # reads tables: a refusal of the file need not wait for that

    paths = [str(source.path) for source in data.sources]
    missing = [(i, source.path) for i, source in enumerate(data.sources) if not source.path.exists()]
    if missing:
        if stored and stored.get("paths") == paths:
            return stored
        raise PatterningError(f"data.sources.{missing[0][0]}.path: {missing[0][1]} is not there; correct the path")
    contents = []
    for source in data.sources:
        files = [source.path] if source.path.is_file() else corpus_files(source.path)
        hashes = {str(file.relative_to(source.path.parent)): file_sha256(file) for file in files}
        contents.append([source.domain, source.text_column, hashes])
    return {"paths": paths, "sha256": stage_fingerprint("corpus", {"sources": contents})} | _tokenizer(data.tokenizer)


def _tokenizer(path: str | None) -> dict[str, Any]:
    """Hashes of a tokenizer's files; of one on the hub its name."""
    if path is None:
        return {}
    files = sorted(Path(path).glob("**/tokenizer*"))
    return {"encoded_with": {str(f.relative_to(path)): file_sha256(f) for f in files if f.is_file()} or path}
