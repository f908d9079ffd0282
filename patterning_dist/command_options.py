"""Arguments and options that several commands of `patterning` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from patterning_dist.storage.store import path_or_url

ConfigArgument = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="Experiment file, or a run directory to take up again.", parser=path_or_url),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: sampling.num_chains=8."),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Where the run is kept: a folder, or a URL (s3://bucket/run).",
        show_default=False,
        parser=path_or_url,
    ),
]
FormatOption = Annotated[
    Literal["parquet", "jsonl", "megatron"],
    typer.Option("--format", help="Parquet and JSON lines have weights, Megatron's .bin and .idx copies only."),
]
CopiesOption = Annotated[
    float | None,
    typer.Option(
        "--copies", min=0.001, metavar="N", help="Repeat samples instead of weighing them, N times on average."
    ),
]
WeightsArgument = Annotated[str, typer.Argument(metavar="WEIGHTS", help="An arm, or a table in weights/: plus.")]
ToOption = Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to; new or empty.")]
CopiesSeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the numbers of copies.")]
