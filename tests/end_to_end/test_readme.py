"""What README.md and the pages in docs/ say can be done is done: their programs, experiments, commands and links."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.main import get_command

import patterning_dist
from patterning_dist.cli import app
from patterning_dist.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("cluster", "benchmarks", "corpora")]
FROM_PYTHON = ROOT / "docs/how_to/python.md"
GENERATED = {ROOT / "docs/reference" / name for name in ("configuration.md", "command.md", "python.md")}
COMMANDS = get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def of_pages(language: str) -> list[object]:
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, language))
    ]


def test_the_program_runs_and_says_what_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    (program,) = (text for text in blocks(FROM_PYTHON, "python") if text.startswith("import numpy"))
    exec(compile(program, str(FROM_PYTHON), "exec"), names)
    measured, solution, checked = names["measured"], names["solution"], names["checked"]
    # chi of a normal phi with variance 1 is known: -0.05 truth.
    errors = (measured.chi[0] + 0.05 * names["truth"]) / measured.standard_error[0]
    assert np.mean(np.abs(errors) < 1.96) > 0.8
    assert np.corrcoef(solution.weights, names["truth"])[0, 1] > 0.95  # those whose loss goes with phi get weight
    assert solution.weights.mean() == pytest.approx(1) and solution.weights.min() >= 0 and solution.weights.max() <= 4
    assert solution.predicted_response == pytest.approx([-1])
    assert checked.interval[0, 0] < -1 * 0.9 and checked.interval[0, 1] < 0
    assert "[" in capsys.readouterr().out
    assert len([line for line in program.splitlines() if line.strip()]) <= 14


@pytest.mark.parametrize("text", of_pages("yaml"))
def test_an_experiment_of_a_page_is_valid(tmp_path: Path, text: str) -> None:
    """A part of an experiment stands in the quickstart's place of it."""
    experiment = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(experiment | yaml.safe_load(text)))
    loaded = load_config(file)
    assert loaded.name == yaml.safe_load(text).get("name", "quickstart")


@pytest.mark.parametrize("text", of_pages("python"))
def test_what_a_program_imports_is_there(text: str) -> None:
    """Programs of a page are run where their own tests are; here, what they take from the package has not moved."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("patterning_dist"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"(?:^    (?:\.venv/bin/)?|`)patterning ([^`\n]*)", text, re.MULTILINE):
        command, words = COMMANDS, re.split(r"  +| #", line)[0].split()
        while words and words[0].isalpha() and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        options.add("--help")
        assert {word for word in words if word.startswith("--")} <= options, line
    targets = set(re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_pointed_at_is_there(page: Path) -> None:
    folder, text = page.parent, page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        path = (folder / target).resolve()
        assert "://" in target or path.exists() or path in GENERATED, target
    for path in re.findall(r"`((?:patterning_dist|tests|configs|jobs|cluster|corpora)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_library_names_are_public() -> None:
    section = FROM_PYTHON.read_text(encoding="utf-8").partition("## Draws of your own")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert {"load_config", "run_stages", "cross_fitted_response"} <= named <= set(patterning_dist.__all__)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors, navigation and docstrings; pages made from the schema, the command and the public names."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    text = {
        name: (tmp_path / "reference" / name / "index.html").read_text()
        for name in ("configuration", "command", "python")
    }
    assert "patterning config schema" in text["command"]
    assert 'id="solve"' in text["configuration"] and "effective_sample_share" in text["configuration"]
    assert all(f'.{name}"' in text["python"] for name in patterning_dist.__all__ if name != "__version__")
    assert text["python"].count('<span class="gp">') > len(
        patterning_dist.__all__
    )  # prompts of the docstrings' examples
