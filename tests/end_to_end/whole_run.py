"""The whole loop on the tiny run, by the command: in this process, or in one of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from patterning_dist.cli import app

OVERRIDES = [
    "training.anneal_steps=4",
    "response.baseline=full",
    "retrain.seeds=[0,1]",
    "retrain.concurrent_arms=2",
]


def arguments(stage: str, config: Path, directory: Path | str, *overrides: str) -> list[str]:
    options = [argument for override in (*OVERRIDES, *overrides) for argument in ("--set", override)]
    return [stage, str(config), "--run-dir", str(directory), *options]


def command(stage: str, config: Path, directory: Path | str, *overrides: str) -> list[str]:
    script = "from patterning_dist.cli import app_main; app_main()"
    return [sys.executable, "-c", script, *arguments(stage, config, directory, *overrides)]


def invoke(stage: str, config: Path, directory: Path | str, *overrides: str) -> Result:
    return CliRunner().invoke(app, arguments(stage, config, directory, *overrides), catch_exceptions=False)


def events(directory: Path) -> list[tuple[str, str]]:
    lines = (directory / "events.jsonl").read_text().splitlines() if (directory / "events.jsonl").exists() else []
    return [(event["stage"], event["kind"]) for event in map(json.loads, lines)]
