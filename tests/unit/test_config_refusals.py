"""Experiment files that look like attacks: refused in a line, in no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_run import copy_run, quiet, tiny_config
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.config import load_config
from patterning_dist.errors import PatterningError
from patterning_dist.measure.preflight import preflight
from patterning_dist.stages.train import train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: " + "9" * 5000, r"not valid YAML: a value that cannot be read \(ValueError: Exceeds the limit"),
        ("name: !!bool x", "not valid YAML: a value that cannot be read"),
        ("? [a]\n: b", "not valid YAML"),
        ("name: " + "[" * 3000, "not valid YAML"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 10)}]\n" for m, n in zip("abcdef", "bcdefg", strict=True)),
            "its aliases stand for more than 1,000,000 entries; write them out",
        ),
        ("name: &a [*a]", "its aliases stand for more than"),
    ],
)
def test_yaml_that_no_parser_likes_is_refused_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(PatterningError, match=message) as error:
        load_config(tmp_path / "x.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_a_value_of_no_kind_is_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/quickstart.yaml").read_text())
    config["retrain"]["arms"][2], config["data"]["sources"][0]["path"] = False, "x\0y"
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(PatterningError) as error:
        load_config(tmp_path / "x.yaml")
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == ["retrain.arms.2"] * 2
    config["retrain"]["arms"][2] = "plus"
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(PatterningError, match=r"'x\\x00y' is no path; correct it"):
        load_config(tmp_path / "x.yaml")


def test_a_model_larger_than_the_machine_is_refused(tmp_path: Path) -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/quickstart.yaml").read_text())
    config["data"]["sources"] = [{"path": str(tmp_path / "x.txt")}]
    (tmp_path / "x.txt").write_text("words")
    config["data"]["context_length"] = 10**6
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["config", "check", str(tmp_path / "x.yaml")])
    assert result.exit_code == 2
    assert "model: its weights and masks take 2" in result.output and "lower d_model, d_head" in result.output


def test_a_domain_that_the_text_does_not_have_is_known_before_anything_is_trained(
    tiny_run: Path, tmp_path: Path
) -> None:
    wanted = "sampling.observables=[{kind: split_loss, name: x, split: 'domain:nowhere'}]"
    config = tiny_config(tiny_run, wanted, "solve.targets={x: -1}")
    message = (
        r"sampling\.observables\.0\.split: no held-out data has the domain of 'domain:nowhere'; the domains are "
        "fables, logs, recipes"
    )
    with pytest.raises(PatterningError, match=message):
        preflight(config, tmp_path)
    with pytest.raises(PatterningError, match=message):  # of rows that say theirs, once they are read
        train(config, copy_run(tiny_run, tmp_path / "run"), quiet())
