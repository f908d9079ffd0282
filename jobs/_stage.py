"""What the entry points of this folder share: a command of `patterning` under the name of the script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from patterning_dist.cli import app


def main(command: str) -> None:
    """Run a command of `patterning` with this process's arguments: same options, errors and exit codes.

    The experiment is CONFIG or, as in other jobs, --config CONFIG.
    """
    arguments = [argument.removeprefix("--config=") for argument in sys.argv[1:] if argument != "--config"]
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and not any(argument.startswith("--run-dir") for argument in arguments):
        typer.echo(
            "note: without --run-dir a submitted job may write into its uploaded copy of the working directory, which "
            "Ray deletes; give a folder on storage that all nodes share",
            err=True,
        )
    entry = typer.main.get_command(app).commands[command]
    entry.epilog = "CONFIG may be given as --config CONFIG."
    entry(arguments, prog_name=Path(sys.argv[0]).name)
