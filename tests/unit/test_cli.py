"""The command: its errors are one line and exit code 2, it writes nothing on a refusal, and help is quick."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from patterning_dist import driver
from patterning_dist.cli import app
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.storage.run import RunDirectory

EXPERIMENT = """
name: small
seed: 3
data: {sources: [{path: corpus}]}
training: {num_steps: 100, batch_size: 8}
sampling:
  components: [{name: attention}]
  observables: [{kind: split_loss, name: induction, split: induction_minus_rest}]
  num_draws: 100
  burn_in: 10
  inverse_temperature: 30
  localization: 4
  step_size: 0.075
response: {direction: {component: attention}}
solve: {component: attention, targets: {induction: -1}, strength: 0.5}
retrain: {seeds: [1, 2], num_steps: 100}
"""
STAGES = ("prepare", "train", "sample", "solve", "retrain", "report")  # that it asks for


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(EXPERIMENT)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the driver is asked to run, instead of running it."""
    record: list[tuple] = []
    monkeypatch.setattr(driver, "run_stages", lambda *arguments: record.append(arguments))
    return record


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def finish(directory: Path, *stages: str) -> None:
    run = RunDirectory(directory)
    for stage in stages:
        with run.stage(stage, "f"):
            pass


def test_run_leaves_the_stages_to_the_experiment(calls: list[tuple]) -> None:
    assert invoke("run", "x.yaml", "--set", "seed=5", "--set", "retrain.seeds=[4]", "--run-dir", "there")[0] == 0
    config, stages, directory = calls[0]
    assert (config.seed, config.retrain.seeds) == (5, [4])
    assert (stages, directory) == (None, Path("there"))
    assert list(driver.experiment_of(config).stages(config)) == list(STAGES)
    assert invoke("run", "x.yaml")[0] == 0
    assert calls[1][2] == Path("runs/small")


def test_study_is_a_run_without_what_follows_the_chains(calls: list[tuple]) -> None:
    assert invoke("study", "x.yaml", "--set", "check={}")[0] == 0
    config, stages, _ = calls[0]
    assert stages is None
    assert list(driver.experiment_of(config).stages(config)) == ["prepare", "train", "sample", "report"]


def test_a_stage_that_is_not_asked_for_is_named(calls: list[tuple]) -> None:
    code, _, stderr = invoke("check", "x.yaml")
    assert (code, calls) == (2, [])
    assert stderr == (
        "error: x.yaml: this experiment does not ask for stage check; it has prepare, train, sample, solve, retrain, "
        "report\n"
    )


@pytest.mark.parametrize("command", ["plan", "calibrate", "study"])
def test_what_reads_sections_of_the_loop_refuses_another_kind(command: str, here: Path) -> None:
    shipped = Path(__file__).parents[2] / "configs" / "parentheses-small.yaml"
    code, _, stderr = invoke(command, str(shipped), "--run-dir", "there")
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert f": patterning {command} is for the loop, whose sections it reads, and experiment 'parentheses'" in stderr
    assert not (here / "there").exists()


def test_refusal_is_one_line_with_exit_code_2_and_writes_nothing(here: Path, calls: list[tuple]) -> None:
    before = sorted(here.rglob("*"))
    code, stdout, stderr = invoke("run", "x.yaml", "--set", "sampling.num_chain=4")
    expected = "error: x.yaml: sampling.num_chain is not a known key; did you mean sampling.num_chains?\n"
    assert (code, stdout, stderr) == (2, "", expected)
    assert (sorted(here.rglob("*")), calls) == (before, [])


@pytest.mark.parametrize("stage", STAGES)
def test_stage_needs_the_earlier_ones(stage: str, here: Path, calls: list[tuple]) -> None:
    directory, index = here / "runs" / "small", STAGES.index(stage)
    if index:
        finish(directory, *STAGES[: index - 1])
        code, _, stderr = invoke(stage, "x.yaml")
        missing = STAGES[index - 1]
        expected = (
            f"error: runs/small: stage {stage} needs stage {missing}, which is not done; "
            f"run `patterning {missing} x.yaml` first\n"
        )
        assert (code, stderr, calls) == (2, expected, [])
        finish(directory, missing)
    assert invoke(stage, "x.yaml")[0] == 0
    assert calls[0][1] == [stage]


def test_errors_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(driver, "run_stages", fail)
    error: BaseException = PatterningError("chain 3: all is lost; start again")
    assert invoke("run", "x.yaml") == (2, "", "error: chain 3: all is lost; start again\n")
    error = KeyboardInterrupt()
    assert invoke("run", "x.yaml") == (130, "", "interrupted; run the same command to resume\n")


def test_run_directory_replays_itself(here: Path, calls: list[tuple]) -> None:
    run = here / "elsewhere"
    run.mkdir()
    (run / "config.yaml").write_text(EXPERIMENT)
    assert invoke("run", "elsewhere", "--set", "seed=8")[0] == 0
    assert (calls[0][0].seed, calls[0][2]) == (8, Path("elsewhere"))
    (run / "config.yaml").unlink()
    code, _, stderr = invoke("run", "elsewhere")
    assert code == 2
    assert stderr.startswith("error: elsewhere: not a run directory, there is no config.yaml;")


def test_config_check(here: Path) -> None:
    code, _, stderr = invoke("config", "check", "x.yaml")
    assert (code, stderr) == (2, f"error: data.sources.0.path: {here.resolve() / 'corpus'} is not there; correct it\n")
    (here / "corpus").mkdir()
    assert "no readable files in this folder" in invoke("config", "check", "x.yaml")[2]
    (here / "corpus" / "a.txt").write_text("text")
    found = f"data.sources.0.path: {here.resolve() / 'corpus'}\n"
    assert invoke("config", "check", "x.yaml") == (0, f"{found}x.yaml: ok; the run is kept in runs/small\n", "")
    assert not (here / "runs").exists()


def test_config_schema_is_json() -> None:
    code, stdout, _ = invoke("config", "schema")
    assert code == 0
    assert set(json.loads(stdout)["properties"]) >= set(yaml.safe_load(EXPERIMENT))


def test_help_names_every_command() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    for command in ("run", *STAGES, "config"):
        assert f"\n  {command} " in stdout


def test_reading_an_experiment_imports_neither_torch_nor_ray(here: Path) -> None:
    """Help and refusals of the file are quick."""
    script = (
        "import sys; from patterning_dist.cli import app\n"
        "from patterning_dist.config import load_config; load_config('x.yaml')\n"
        "print(sorted({'torch', 'ray', 'deepspeed', 'pyarrow', 'pandas', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]"]


def test_progress_without_a_terminal_prints_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, output = [0.0], io.StringIO()
    monkeypatch.setattr("patterning_dist.progress.time.monotonic", lambda: clock[0])
    with Progress(Console(file=output, width=40)) as progress:
        progress.start("sampling [attention]", 100)
        for second in range(1, 26):
            clock[0] = second
            progress.update(second)
            progress.update_line("chain 1", done=second, total=50, loss=0.1, healthy=second < 15)
    lines = output.getvalue().splitlines()
    label = "sampling [attention]"
    assert [line.split(",")[0].split(";")[0] for line in lines] == [
        f"{label}: {done} of 100" for done in (0, 10, 20, 25)
    ]
    assert lines[-1].endswith("; failed: chain 1")


def test_progress_on_a_terminal_shows_a_line_for_each_chain() -> None:
    output = io.StringIO()
    with Progress(Console(file=output, force_terminal=True, width=100)) as progress:
        progress.start("sampling", 100)
        progress.update(40)
        progress.update_line("chain [1]", done=20, total=50, loss=0.12345)
        progress.update_line("chain [2]", done=20, total=50, healthy=False)
    shown = output.getvalue()
    for text in ("40/100", "chain [1]", "20/50", "0.1235", "chain [2]", "failed"):
        assert text in shown
