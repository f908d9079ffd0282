"""The experiment file: what it accepts, and that every refusal names the file, the key and the remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from patterning_dist.config import Config, config_schema, dump_config, load_config
from patterning_dist.errors import PatterningError
from patterning_dist.measure.subject import expand_components
from patterning_dist.response.solver import share_at_strength
from patterning_dist.tasks.open import open_skeleton

MINIMAL = {
    "name": "small",
    "seed": 3,
    "data": {"sources": [{"path": "corpus"}]},
    "training": {"num_steps": 100, "batch_size": 8},
    "sampling": {
        "components": [{"name": "attention"}, {"name": "layer.1.head.3", "num_draws": 200}],
        "observables": [
            {"kind": "split_loss", "name": "induction", "split": "induction_minus_rest"},
            {"kind": "split_loss", "name": "overall", "split": "overall"},
            {"kind": "function", "names": ["first", "second"], "path": "package.module:function"},
        ],
        "num_draws": 100,
        "burn_in": 10,
        "inverse_temperature": 30,
        "localization": 4,
        "step_size": 0.075,
    },
    "response": {"direction": {"component": "attention"}},
    "solve": {"component": "attention", "targets": {"induction": -1, "overall": 0}, "strength": 0.5},
    "retrain": {"seeds": [1, 2], "num_steps": 100},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(PatterningError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_dumped_config_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["sampling.step_size=1e-3", "sampling.components.0.localization=7"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert config.sampling.step_size == 0.001


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.num_steps=7", lambda config: config.training.num_steps == 7),
        ("retrain.seeds=[5, 6]", lambda config: config.retrain.seeds == [5, 6]),
        ("retrain.seeds.1=9", lambda config: config.retrain.seeds == [1, 9]),
        ("sampling.components.1.name=layer.0", lambda c: c.sampling.components[1].name == "layer.0"),
        ("sampling.inverse_temperature=1e3", lambda config: config.sampling.inverse_temperature == 1000),
        ("model.d_model=16", lambda config: config.model.d_model == 16),
        ("run_dir=null", lambda config: config.run_directory == Path("runs/small")),
    ],
)
def test_override(path: Path, override: str, read: object) -> None:
    assert read(load_config(path, [override]))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("sampling.num_chain=4", "sampling.num_chain is not a known key; did you mean sampling.num_chains?"),
        ("sampling.num_steps=4", "sampling.num_steps is not a known key; did you mean training.num_steps?"),
        ("sede=4", "sede is not a known key; did you mean seed?"),
        (
            "sampling.observables.0.spilt=rest",
            "sampling.observables.0.spilt is not a known key; did you mean sampling.observables.0.split?",
        ),
        ("training.zzz=1", "training.zzz is not a known key; known keys of training: num_steps, batch_size,"),
        ("training.num_steps=many", "training.num_steps: expected a valid integer, unable to parse string"),
        ("training.num_steps=many", "got 'many'"),
        ("training.num_steps=null", "training.num_steps: expected a valid integer, got nothing"),
        ("training.optimizer=lion", "training.optimizer: expected 'muon', 'adamw' or 'sgd', got 'lion'"),
        (
            "sampling.inverse_temperature=-3",
            "sampling.inverse_temperature: expected a number greater than 0, got -3",
        ),
        (
            "sampling.inverse_temperature=0",
            "sampling.inverse_temperature: expected a number greater than 0, got 0",
        ),
        ("sampling.localization=.inf", "sampling.localization: expected a finite number, got inf"),
        ("sampling.observables.0.kind=los", "sampling.observables.0.kind: expected one of 'component_loss',"),
        (
            "sampling.observables.0.name=two words",
            "sampling.observables.0.name: expected text like ^[A-Za-z]",
        ),
        ("name=../up", "name: expected text like ^[A-Za-z0-9]"),
        ("data=3", "data: expected a section of `key: value`, got 3"),
        ("sampling.components.1.name=attention", "sampling.components: 'attention' is listed twice"),
        ("response.direction.component=layer.0", "'layer.0' is not sampled; add it to sampling.components"),
        ("solve.component=layer.0", "solve.component: 'layer.0' is not sampled; add it"),
        ("solve.component=layer.1.head.3", "name the same component in both"),
        ("response.baseline=full", "response.baseline: full needs a component 'everything'"),
        ("sampling.observables.1.name=induction", "sampling.observables: 'induction' is named twice"),
        ("sampling.observables.1.name=loss", "'loss' is the name of a column of the traces; rename it"),
        ("sampling.observables.1.split=rest", "'overall' is what the mean loss of all held-out samples is called"),
        (
            "solve.targets={indction: 1}",
            "solve.targets.indction: no such observable; sampling.observables has",
        ),
        ("solve.targets={induction: 0}", "solve.targets: no change is asked for"),
        ("solve.strength=null", "expected exactly one of strength and effective_sample_share"),
        ("solve.effective_sample_share=0.6", "expected exactly one of strength and effective_sample_share"),
        ("solve.method=ridge", "solve.ridge: method ridge needs ridge"),
        ("solve.rank=2", "solve.rank: method minimum_norm takes no rank"),
        ("solve.weight_max=1", "solve.weight_max: expected a number greater than 1, got 1"),
        ("model.relative_position_bias=[2]", "model.relative_position_bias: no layer 2; expected 0 to 1"),
        ("training.num_workers=3", "training.num_workers: 3 ranks do not divide training.batch_size = 8"),
        ("retrain.num_workers=3", "retrain.num_workers: 3 ranks do not divide training.batch_size = 8"),
        ("sampling.min_chains=5", "sampling.num_chains: 4 is below sampling.min_chains = 5"),
        (
            "sampling.num_batches=51",
            "sampling.num_draws: 100 draws are too few for sampling.num_batches = 51",
        ),
        ("sampling.components.1.num_draws=15", "sampling.components.1.num_draws: 15 draws are too few"),
        ("sampling.step_size=1", "sampling.step_size: 1 diverges with localization 4; expected less than"),
        ("data.max_train_sequences=10", "sampling.probe_sequences: 64 is more than data.max_train_sequences"),
        ("retrain.seeds=[1, 1]", "retrain.seeds: 1 is listed twice; remove one"),
        ("retrain.arms=[base, base]", "retrain.arms: base is listed twice; remove one"),
        ("retrain.arms=[]", "retrain.arms: expected"),
        ("retrain.seeds=[-1]", "retrain.seeds: expected numbers from 0 up, got -1"),
        ("training.deepspeed=nowhere.json", "nowhere.json (No such file or directory); give the path of a"),
        ("sampling.probe=nowhere.parquet", "sampling.probe: cannot read"),
    ],
)
def test_refused(path: Path, override: str, text: str) -> None:
    message = refusal(path, override)
    assert text in message
    assert all(line.startswith(f"{path}: ") for line in message.splitlines())


@pytest.mark.parametrize("name", ["layer.2", "layer.0+layer.1.head.4", "mlp"])
def test_a_component_that_the_model_lacks_is_known_before_the_run(path: Path, name: str) -> None:
    config = load_config(path, [f"sampling.components.1.name={name}"])
    missing = name.rpartition("+")[2]
    with pytest.raises(PatterningError, match=f"component '{missing}' does not exist in this model; there are: every"):
        expand_components(config.sampling, open_skeleton(config))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "retrain.seeds.7=1",
            "--set retrain.seeds.7=1: retrain.seeds has 2 entries, numbered from 0; no '7'",
        ),
        ("seed.a=1", "--set seed.a=1: seed is 3, which has no keys"),
        ("seed", "--set seed: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("seed=[", "--set seed=[: line 1: not valid YAML"),
    ],
)
def test_malformed_override(path: Path, override: str, text: str) -> None:
    assert refusal(path, override).startswith(text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("name: a\nname: b\n", "line 2: not valid YAML: 'name' is given twice; remove one"),
        ("data:\n  sources: [\n", "not valid YAML"),
        ("- 1\n", "expected sections of `key: value`, got [1]"),
        ("", "expected sections of `key: value`, got nothing"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine a constructor"),
    ],
)
def test_malformed_file(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    message = refusal(file)
    assert message.startswith(str(file))
    assert text in message


def test_every_fault_is_named(tmp_path: Path) -> None:
    raw = copy.deepcopy(MINIMAL)
    del raw["seed"]
    raw["retrain"]["num_steps"] = 0
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert set(refusal(file).splitlines()) == {
        f"{file}: seed: is missing; add it",
        f"{file}: retrain.num_steps: expected a number greater than or equal to 1, got 0",
    }


def test_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "no.yaml"
    assert refusal(file) == f"{file}: cannot be read (No such file or directory); give an experiment file"


@pytest.mark.parametrize("section", ["training", "retrain"])
def test_muon_and_zero_stage(path: Path, section: str) -> None:
    (path.parent / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    override = f"{section}.deepspeed=zero.json"  # found beside the file
    message = refusal(path, override)
    assert f"{section}.deepspeed: " in message
    assert "asks for ZeRO stage 1" in message
    assert "set training.optimizer to adamw or zero_optimization.stage to 0" in message
    config = load_config(path, [override, "training.optimizer=adamw"])
    assert getattr(config, section).deepspeed == (path.parent / "zero.json").resolve()
    (path.parent / "zero.json").write_text("not json")
    assert "is not a DeepSpeed JSON file" in refusal(path, override)


def test_paths_are_found_beside_the_file_before_here(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "corpus").mkdir()
    assert load_config(path).data.sources[0].path == (here / "corpus").resolve()
    (tmp_path / "corpus").mkdir()
    assert load_config(path).data.sources[0].path == (tmp_path / "corpus").resolve()


def test_probe_must_fit_the_context(path: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.parquet"
    for length, problem in (
        (129, "has sequences of 129 tokens, longer than data.context_length = 128"),
        (128, ""),
    ):
        metadata = {b"patterning": json.dumps({"context_length": length}).encode()}
        pq.write_table(pa.table({"sequence_id": [0]}).replace_schema_metadata(metadata), probe)
        if problem:
            assert problem in refusal(path, f"sampling.probe={probe}")
        else:
            assert load_config(path, [f"sampling.probe={probe}"]).sampling.probe == probe.resolve()
    pq.write_table(pa.table({"sequence_id": [0]}), probe)
    assert "is not a token table" in refusal(path, f"sampling.probe={probe}")
    probe.write_bytes(b"not parquet")
    assert "is not a token table" in refusal(path, f"sampling.probe={probe}")


def test_domain_split_names_a_source(path: Path) -> None:
    split = "sampling.observables.0.split=domain:law"
    assert load_config(path, [split])  # the source's domain follows from its path: not known yet
    assert "the domains are code" in refusal(path, split, "data.sources.0.domain=code")
    assert load_config(path, [split, "data.sources.0.domain=law"])


def test_component_settings_are_its_own_or_the_sections(path: Path) -> None:
    sampling = load_config(path).sampling
    head, attention = sampling.resolve("layer.1.head.3"), sampling.resolve("attention")
    assert (head.num_draws, head.burn_in, head.num_chains) == (200, 10, 4)
    assert (attention.num_draws, attention.step_size) == (100, 0.075)
    assert None not in head.model_dump().values()
    assert sampling.observable_names == ["induction", "overall", "first", "second"]


def test_schema_describes_every_field() -> None:
    definitions = [config_schema(), *config_schema()["$defs"].values()]
    fields = [(name, field) for entry in definitions for name, field in entry["properties"].items()]
    assert len(fields) > 80
    assert [name for name, field in fields if not field.get("description")] == []
    assert all(entry["additionalProperties"] is False for entry in definitions)


def test_config_cannot_be_changed(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match="frozen"):
        config.training.num_steps = 5


def test_the_shipped_frontier_has_the_shares_that_its_arms_are_named_for() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "frontier.yaml")
    assert config.solve is not None and config.retrain is not None
    solved, rows = config.solve.effective_sample_share, {}
    for arm in config.retrain.arm_list[1:]:
        row, _, share = arm.name.partition("-")
        assert arm.weights == row
        assert share_at_strength(solved, arm.strength) == pytest.approx(float(share), abs=5e-4)
        rows.setdefault(row, []).append(float(share))
    assert rows == {row: [0.9, 0.8, 0.7] for row in ("plus", "ablation", "oracle")} | {
        row: [0.7] for row in ("permuted", "permuted_token")
    }
