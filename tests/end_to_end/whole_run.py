"""The whole loop on the tiny run, by the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

OVERRIDES = [
    "training.anneal_steps=4",
    "response.baseline=full",
    "retrain.seeds=[0,1]",
    "retrain.concurrent_arms=2",
]


def command(stage: str, config: Path, directory: Path | str, *overrides: str) -> list[str]:
    options = [argument for override in (*OVERRIDES, *overrides) for argument in ("--set", override)]
    script = "from patterning_dist.cli import app_main; app_main()"
    return [sys.executable, "-c", script, stage, str(config), "--run-dir", str(directory), *options]


def events(directory: Path) -> list[tuple[str, str]]:
    lines = (directory / "events.jsonl").read_text().splitlines() if (directory / "events.jsonl").exists() else []
    return [(event["stage"], event["kind"]) for event in map(json.loads, lines)]
