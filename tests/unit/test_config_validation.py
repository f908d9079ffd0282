"""Section validation of the experiment file: what it refuses, and where its stage stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from patterning_dist.config import load_config
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.loop import Loop

FILE = {
    "name": "validation",
    "seed": 1,
    "data": {"kind": "function", "load": "mine:load"},
    "model": {"kind": "module", "initialise": "mine:fresh", "per_sample_loss": "mine:loss"},
    "training": {"num_steps": 9, "batch_size": 8, "optimizer": "adamw"},
    "sampling": {
        "components": [{"name": "everything"}],
        "observables": [{"kind": "component_loss", "name": "component"}],
        "num_draws": 100,
        "burn_in": 0,
        "inverse_temperature": 30,
        "localization": 30,
        "step_size": 1e-4,
    },
    "validation": {"num_steps": 10, "scores": {"magic": "scores"}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(FILE))
    (tmp_path / "scores").mkdir()
    return file


def test_the_stage_comes_after_the_trainings_and_paths_are_found(path: Path) -> None:
    config = load_config(path)
    assert list(Loop().stages(config)) == ["train", "sample", "validate", "report"]
    assert config.validation is not None and config.validation.scores == {"magic": path.parent / "scores"}
    before = Loop().inputs(config, {})
    (path.parent / "scores" / "scores.bin").write_bytes(b"other")
    assert Loop().inputs(config, {}) != before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("num_subsets=1", "num_subsets"),
        ("subset_share=1", "subset_share"),
        ("seeds=[]", "seeds"),
        ("seeds=[0,0]", r"validation.seeds: 0 is listed twice"),
        ("seeds=[-1]", r"validation.seeds: expected numbers from 0 up, got -1"),
        ("num_steps=null", r"validation.num_steps: is missing; add it, or a bank"),
        ("methods=[bm25]", r"bm25 is of tokens, and this experiment has none"),
        ("methods=[gradient,gradient]", r"gradient is listed twice"),
        ("methods=[magic]", "methods"),
        ("scores={random: x}", r"'random' is the name of a method or of a folder"),
        ("start=early", r"'early' is no checkpoint; expected one of baseline"),
        ("bank=x", r"validation.num_steps: is of retrainings of this run, and a bank is given"),
        ("removed_share=0", "removed_share"),
    ],
)
def test_what_cannot_be_measured_is_refused(path: Path, override: str, said: str) -> None:
    with pytest.raises(PatterningError, match=said):
        load_config(path, [f"validation.{override}"])


def test_a_checkpoint_is_named_where_there_are_several(path: Path) -> None:
    model = FILE["model"] | {"build": "mine:build", "checkpoints": ["a", "b"]}
    path.write_text(yaml.safe_dump(FILE | {"model": model}))
    with pytest.raises(PatterningError, match=r"validation.start: there are several checkpoints; name one of"):
        load_config(path)
    assert load_config(path, ["validation.start=b"]).validation is not None
