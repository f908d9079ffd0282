"""What README.md says can be done is done: its program, its experiment, its commands and its links."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.main import get_command

import patterning_dist
from patterning_dist.cli import app
from patterning_dist.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, begins: str = "") -> str:
    (found,) = re.findall(rf"^```{language}\n({begins}.*?)^```", README, re.MULTILINE | re.DOTALL)
    return found


def test_the_program_runs_and_says_what_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(compile(block("python", "import numpy"), "README.md", "exec"), names)
    measured, solution, checked = names["measured"], names["solution"], names["checked"]
    # chi of a normal phi with variance 1 is known: -0.05 truth.
    errors = (measured.chi[0] + 0.05 * names["truth"]) / measured.standard_error[0]
    assert np.mean(np.abs(errors) < 1.96) > 0.8
    assert np.corrcoef(solution.weights, names["truth"])[0, 1] > 0.95  # those whose loss goes with phi get weight
    assert solution.weights.mean() == pytest.approx(1) and solution.weights.min() >= 0 and solution.weights.max() <= 4
    assert solution.predicted_response == pytest.approx([-1])
    assert checked.interval[0, 0] < -1 * 0.9 and checked.interval[0, 1] < 0
    assert "[" in capsys.readouterr().out
    assert len([line for line in block("python", "import numpy").splitlines() if line.strip()]) <= 14


def test_the_sources_are_a_valid_experiment(tmp_path: Path) -> None:
    experiment = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    experiment["data"] = yaml.safe_load(block("yaml", "data:\n"))["data"]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(experiment))
    sources = load_config(file).data.sources
    assert [source.path.name for source in sources] == ["my-texts", "articles.jsonl", "tables.parquet"]
    assert (sources[1].text_column, sources[1].domain) == ("body", "articles")


def test_the_commands_are_there() -> None:
    listed = re.findall(
        r"^    patterning ([a-z ]+?)(?: (?:CONFIG|MODEL|RUN|RUN ARM --to DIR|\[--\w+(?: \w+)?\]))?  ",
        README,
        re.MULTILINE,
    )
    command = get_command(app)
    there = {name for name in command.commands if name != "config"}
    there |= {f"config {name}" for name in command.commands["config"].commands}
    assert set(listed) == there
    targets = set(re.findall(r"^    make ([\w-]+)", README, re.MULTILINE))
    assert targets == {"quickstart", "test", "test-all"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "cluster/README.md", "benchmarks/README.md"])
def test_what_is_pointed_at_is_there(page: str) -> None:
    folder, text = (ROOT / page).parent, (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (folder / target).exists(), target
    for path in re.findall(r"`((?:patterning_dist|tests|configs|jobs|cluster|corpora)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_library_names_are_public() -> None:
    section = README.partition("## Ten lines")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert {"load_config", "run_stages", "cross_fitted_response"} <= named <= set(patterning_dist.__all__)
