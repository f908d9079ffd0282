"""The parentheses experiment file: what is read, and what is refused before anything is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.config import config_schema, dump_config, load_config
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules import TwoRules
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.functions import load_function

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = CONFIGS / "parentheses.yaml"


@pytest.mark.parametrize("name", ["parentheses", "parentheses-small", "parentheses-paper"])
def test_the_experiments_of_the_project_are_read_and_written_back(name: str, tmp_path: Path) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert isinstance(config, ParenthesesConfig)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("task.min_length=2", "task.min_length: stratified strings need at least 4 brackets"),
        ("task.min_length=5", "task.min_length: expected a multiple of 2, got 5"),
        ("model.num_heads=3", "model.num_heads: 3 heads do not divide the width 16"),
        ("training.warmup_steps=1000", "training.warmup_steps: must be below training.num_steps = 1000"),
        ("references.per_rule=40", "references.per_rule: 40 networks of each rule, and check.per_rule = 3 further"),
        ("references.equal_count_below=0.9", "references.equal_count_below: must be below references.nested_above"),
        ("sampling.components=[{name: attention}]", "sampling.components: the experiment samples all weights"),
        ("sampling.observables=[{kind: llc, name: llc}]", "sampling.observables: expected one each of the kinds"),
        ("sampling.probe=strings.parquet", "sampling.probe: the losses of all training strings are recorded"),
        ("sampling.ranks_per_chain=2", "sampling.ranks_per_chain: a bracket classifier takes one process; remove it"),
        ("sampling.compute_dtype=bfloat16", "sampling.compute_dtype: a bracket classifier is sampled in float32"),
        ("sampling.probe_sequences=7", "sampling.probe_sequences: the losses of all training strings are recorded"),
        ("online.per_rule=17", "online.per_rule: 17 networks at either end of 32; raise online.num_seeds"),
        ("training.engine=jax", "training.engine: expected"),
        ("arms.num_control_seeds=1000", "arms.num_control_seeds: at most arms.num_seeds"),
        ("check.strengths=[0.0,1.0]", "check.strengths: expected different numbers, none of them 0"),
        ("check.strengths=[1.0,1.0]", "check.strengths: expected different numbers"),
        (
            "check.per_rule=27",
            "references.per_rule: 6 networks of each rule, and check.per_rule = 27 further ones, out of",
        ),
        ("check.strengths=[-1.5,1.0]", "check.strengths: expected numbers from -1 to 1"),
        ("weights.min_weight=0", "weights.min_weight: expected a number greater than 0, got 0"),
        ("kind=parentheses", "kind is not a known key"),
        ("retrain.num_steps=4", "retrain is a section of the loop, and this experiment has others: experiment, name,"),
        ("training.deepspeed=a.json", "training.deepspeed is not a known key"),
    ],
)
def test_faults_name_the_key(override: str, line: str) -> None:
    with pytest.raises(PatterningError) as caught:
        load_config(FILE, [override])
    assert str(caught.value).startswith(f"{FILE}: {line}")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("config check", "ok; the run is kept in"),
        ("components", "everything"),
        ("check", "this experiment does not ask for stage check; it has prepare, train, sample"),
        ("plan", "parentheses: patterning plan is for the loop, whose sections it reads, and experiment 'parentheses'"),
        ("calibrate", "parentheses: patterning calibrate is for the loop"),
        ("study", "parentheses: patterning study is for the loop"),
    ],
)
def test_every_command_takes_it_or_says_why_not(command: str, said: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), str(FILE)])
    assert said in " ".join(result.output.split())
    assert result.exit_code == (0 if command in ("config check", "components") else 2)


def test_schema_describes_every_field() -> None:
    schema = config_schema("parentheses")
    definitions = [schema, *schema["$defs"].values()]
    fields = [(name, field) for entry in definitions for name, field in entry["properties"].items()]
    assert {"task", "references", "online", "arms", "check"} <= {name for name, _ in fields}
    assert [name for name, field in fields if not field.get("description")] == []
    assert all(entry["additionalProperties"] is False for entry in definitions)


def test_the_word_of_earlier_files_is_told_what_to_write(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(FILE.read_text().replace("\nexperiment: parentheses\n", "\nkind: parentheses\n"))
    with pytest.raises(PatterningError) as caught:
        load_config(old)
    assert str(caught.value) == f"{old}: kind is not a known key; write experiment: parentheses"


def test_a_change_of_any_section_is_noticed() -> None:
    """A section that no stage counts among its inputs could be changed, and the results of another one be kept."""
    counted = {section for stage in TwoRules().stages(load_config(FILE)).values() for section in stage.sections}
    assert set(ParenthesesConfig.model_fields) - counted == {"run_dir", "experiment"}


def test_every_stage_is_there() -> None:
    stages = TwoRules().stages(load_config(FILE))
    assert list(stages) == ["prepare", "train", "sample", "solve", "retrain", "report"]
    assert all(callable(load_function(stage.function)) for stage in stages.values())
