"""The file of a study: which files are one, what it accepts, and that every refusal names the key and the remedy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from patterning_dist.config import (
    Config,
    HuggingFaceModelConfig,
    ModuleModelConfig,
    StudyConfig,
    config_schema,
    dump_config,
    load_config,
)
from patterning_dist.errors import PatterningError

STUDY = {
    "name": "heads",
    "seed": 3,
    "model": {"kind": "huggingface", "path": "owner/name", "checkpoints": ["step1000", "final"]},
    "data": {
        "kind": "tokens",
        "train": "train.parquet",
        "held_out": {"prose": "prose.parquet"},
        "context_length": 64,
    },
    "sampling": {
        "components": [{"name": "layer.0.head.1", "num_draws": 200}, {"name": "h.*.mlp.c_fc.weight[0:16,:]"}],
        "observables": [
            {"kind": "component_loss", "name": "component"},
            {"kind": "split_loss", "name": "prose", "split": "domain:prose"},
            {"kind": "llc", "name": "llc"},
            {"kind": "free_energy", "name": "free_energy"},
        ],
        "num_draws": 100,
        "burn_in": 10,
        "inverse_temperature": 30,
        "localization": 4,
        "step_size": 0.075,
    },
}
OWN = {
    "model": {"kind": "module", "build": "mine:build", "per_sample_loss": "mine:loss"},
    "data": {"kind": "function", "load": "mine:load"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(PatterningError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_study_is_told_by_its_model_and_by_what_it_lacks(path: Path, tmp_path: Path) -> None:
    assert isinstance(load_config(path), StudyConfig)
    raw = copy.deepcopy(STUDY)
    del raw["model"]["kind"]
    path.write_text(yaml.safe_dump(raw))
    assert refusal(path) == f"{path}: model.kind: expected one of 'huggingface', 'module', got nothing"
    # A run that lacks a section is still a run.
    run = {"name": "r", "seed": 1, "training": {"num_steps": 1, "batch_size": 1}}
    path.write_text(yaml.safe_dump(run))
    assert f"{path}: retrain: is missing; add it" in refusal(path).splitlines()


def test_dumped_study_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    overrides = [
        "sampling.sampler={kind: rmsprop_sgld, stability: 0.2}",
        "sampling.ranks_per_chain=2",
        "sampling.compute_dtype=bfloat16",
        "traces.thin=5",
        "calibration.step_sizes=[1e-3, 1e-2]",
    ]
    config = load_config(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert config.sampling.sampler.model_dump() == {
        "kind": "rmsprop_sgld",
        "decay": 0.99,
        "stability": 0.2,
        "correction": False,
    }
    assert config.calibration.step_sizes == [0.001, 0.01]


def test_the_users_own_model(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY | OWN))
    config = load_config(path)
    assert isinstance(config.model, ModuleModelConfig)
    assert config.model.checkpoints == ["final"]
    # Domains of samples that a function gives are known only once it has run.
    assert load_config(path, ["sampling.observables.1.split=domain:elsewhere"])


def test_names_that_are_paths_here_are_made_absolute(path: Path, tmp_path: Path) -> None:
    assert load_config(path).model.path == "owner/name"
    assert load_config(path).data.train == "train.parquet"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "train.parquet").touch()
    config = load_config(path)
    assert isinstance(config.model, HuggingFaceModelConfig)
    assert config.model.path == str((tmp_path / "owner" / "name").resolve())
    assert config.data.train == str((tmp_path / "train.parquet").resolve())


def test_what_is_measured_and_what_follows_from_all_draws(path: Path) -> None:
    sampling = load_config(path).sampling
    assert sampling.observable_names == ["component", "prose"]
    assert [(q.kind, q.name) for q in sampling.posterior_quantities] == [
        ("llc", "llc"),
        ("free_energy", "free_energy"),
    ]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.pth=a", "model.pth is not a known key; did you mean model.path?"),
        ("model.kind=hugging", "model.kind: expected one of 'huggingface', 'module', got 'hugging'"),
        ("model.checkpoints=[]", "model.checkpoints: expected list should have at least 1 item"),
        ("model.checkpoints=[a/b]", "model.checkpoints.0: expected text like ^[A-Za-z0-9]"),
        ("model.checkpoints=[a, a]", "model.checkpoints: 'a' is listed twice; remove one"),
        ("data.kind=text", "data.kind: expected one of 'function', 'tokens', got 'text'"),
        ("data.context_length=1", "data.context_length: expected a number greater than or equal to 2, got 1"),
        ("data={kind: function, load: mine}", "data.load: expected text like ^[A-Za-z_]"),
        ("training.num_steps=4", "training is not a known key"),
        ("sampling.sampler.kind=sgd", "sampling.sampler.kind: expected one of 'rmsprop_sgld', 'sgld', 'sgnht', got"),
        (
            "sampling.sampler={kind: sgld, decay: 0.5}",
            "sampling.sampler.decay is not a known key; known keys of sampling.sampler: kind",
        ),
        ("sampling.sampler={kind: sgnht, difusion: 1}", "did you mean sampling.sampler.diffusion?"),
        ("sampling.compute_dtype=float16", "sampling.compute_dtype: expected 'float32' or 'bfloat16', got 'float16'"),
        ("sampling.ranks_per_chain=0", "sampling.ranks_per_chain: expected a number greater than or equal to 1"),
        ("sampling.components.1.name=layer.0.head.1", "sampling.components: 'layer.0.head.1' is listed twice"),
        ("sampling.components.0.num_draws=15", "15 draws are too few for sampling.num_batches = 8"),
        ("sampling.step_size=1", "sampling.step_size: 1 diverges with localization 4"),
        ("sampling.min_chains=5", "sampling.num_chains: 4 is below sampling.min_chains = 5"),
        ("sampling.observables.2.name=prose", "sampling.observables: 'prose' is named twice; rename one"),
        ("sampling.observables.3.name=loss", "'loss' is the name of a column of the traces; rename it"),
        (
            "sampling.observables.0={kind: split_loss, name: all, split: overall}",
            "'llc' of kind llc follows from the loss on the probe; add {kind: component_loss, name: component}",
        ),
        (
            "sampling.observables.1.split=induction",
            "sampling.observables.1.split: 'induction' is for `patterning run`; a study has overall and domain:",
        ),
        ("sampling.observables.1.split=domain:law", "data.held_out has no 'law'; there are prose"),
        ("data.held_out={}", "sampling.observables.1.split: there is no held-out data; add data.held_out"),
        ("calibration.component=layer.1", "calibration.component: 'layer.1' is not sampled; there are layer.0.head.1,"),
        ("calibration.checkpoint=step2", "calibration.checkpoint: 'step2' is not in model.checkpoints; there are step"),
        ("calibration.step_sizes=[0]", "calibration.step_sizes.0: expected a number greater than 0, got 0"),
        ("calibration.step_sizes=[]", "calibration.step_sizes: expected list should have at least 1 item"),
        ("traces.thin=0", "traces.thin: expected a number greater than or equal to 1, got 0"),
    ],
)
def test_refused(path: Path, override: str, text: str) -> None:
    message = refusal(path, override)
    assert text in message
    assert all(line.startswith(f"{path}: ") for line in message.splitlines())


def test_a_table_of_tokens_cannot_be_the_probe_of_other_samples(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY | OWN))
    assert "sampling.probe: a table of tokens is for data of kind tokens" in refusal(path, "sampling.probe=a.parquet")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("sampling.ranks_per_chain=2", "sampling.ranks_per_chain: 2 is for `patterning study`; expected 1, remove the"),
        ("sampling.compute_dtype=bfloat16", "sampling.compute_dtype: bfloat16 is for `patterning study`; expected f"),
        ("sampling.micro_batch_size=4", "sampling.micro_batch_size: 4 is for `patterning study`; expected 16"),
        (
            "sampling.observables=[{kind: llc, name: lambda}]",
            "sampling.observables: 'lambda' of kind llc is for `patterning study`; remove it",
        ),
    ],
)
def test_what_a_run_refuses(override: str, text: str) -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert text in refusal(quickstart, override)
    config = load_config(quickstart, ["sampling.sampler={kind: sgnht}"])
    assert isinstance(config, Config) and config.sampling.sampler.diffusion > 0


def test_schema_describes_every_field() -> None:
    schema = config_schema("study")
    definitions = [schema, *schema["$defs"].values()]
    fields = [(name, field) for entry in definitions for name, field in entry["properties"].items()]
    assert {"model", "data", "sampling", "calibration", "traces"} <= {name for name, _ in fields}
    assert [name for name, field in fields if not field.get("description")] == []
    assert all(entry["additionalProperties"] is False for entry in definitions)
