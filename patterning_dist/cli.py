"""The `patterning` command. torch and ray are imported by the stages, so that help and checks are quick."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from patterning_dist.config import AnyConfig, Config, ParenthesesConfig, StudyConfig, config_schema, load_config
from patterning_dist.errors import PatterningError
from patterning_dist.preemption import EXIT_CODE, Preempted, preemptible
from patterning_dist.storage.mirror import Place
from patterning_dist.storage.run import STAGES, read_manifest
from patterning_dist.storage.store import path_or_url

HELP = {
    "prepare": "Train the tokenizer and cut the corpus into sequences.",
    "train": "Train the baseline and anneal it to the checkpoint that is sampled around.",
    "sample": "Run the posterior chains of every component.",
    "solve": "Turn the susceptibilities into sample weights that reach the targets.",
    "retrain": "Train again on the weighted data, every arm with every seed.",
    "report": "Write report.html and summary.json.",
}

app = typer.Typer(
    help="Susceptibilities of a network to its training data, and data weights that steer its training.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="The experiment file.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

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


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        with preemptible():
            yield
    except PatterningError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except Preempted:
        typer.secho("told to leave (SIGTERM); run the same command to resume", err=True)
        raise typer.Exit(EXIT_CODE) from None
    except KeyboardInterrupt:
        typer.secho("interrupted; run the same command to resume", err=True)
        raise typer.Exit(130) from None


def _open(
    config: Path | str, overrides: Sequence[str] | None, run_dir: Path | str | None
) -> tuple[AnyConfig, Path | str]:
    """The experiment and its run directory; a run directory is its own unless another is asked for."""
    config, run_dir = _local(config, run_dir)
    if config.is_dir():
        if not (config / "config.yaml").is_file():
            raise PatterningError(f"{config}: not a run directory, there is no config.yaml; give an experiment file")
        loaded = load_config(config / "config.yaml", overrides or ())
        return loaded, run_dir or config
    loaded = load_config(config, overrides or ())
    return loaded, run_dir or loaded.run_directory


def _local(config: Path | str, run_dir: Path | str | None) -> tuple[Path, Path | str | None]:
    """A run at a URL is taken up again from the config.yaml there."""
    if isinstance(config, Path):
        return config, run_dir
    return Place.at(config).fetch("config.yaml"), run_dir or config


def _open_run(
    config: Path | str, overrides: Sequence[str] | None, run_dir: Path | str | None
) -> tuple[Config | ParenthesesConfig, Path | str]:
    loaded, directory = _open(config, overrides, run_dir)
    if isinstance(loaded, StudyConfig):
        raise PatterningError(f"{config}: is a study of a given model; run `patterning study {config}`")
    return loaded, directory


def _open_study(
    config: Path | str, overrides: Sequence[str] | None, run_dir: Path | str | None
) -> tuple[StudyConfig, Path | str]:
    loaded, directory = _open(config, overrides, run_dir)
    if not isinstance(loaded, StudyConfig):
        raise PatterningError(f"{config}: is the whole loop, with a training; run `patterning run {config}`")
    return loaded, directory


def _refuse_parentheses(config: Path | str, loaded: AnyConfig, command: str) -> None:
    if isinstance(loaded, ParenthesesConfig):
        raise PatterningError(
            f"{config}: is the parentheses experiment, which {command} is not for; run `patterning run {config}`"
        )


@app.command(help="Run every stage that is not done yet, from the corpus to the report.")
def run(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    with _reported():
        loaded, directory = _open_run(config, overrides, run_dir)
        _run_stages(loaded, list(STAGES), directory)


def _run_stages(config: Config | ParenthesesConfig, stages: list[str], directory: Path | str) -> None:
    from patterning_dist.driver import run_stages

    run_stages(config, stages, directory)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
        with _reported():
            loaded, directory = _open_run(config, overrides, run_dir)
            done = read_manifest(directory).get("stages", {})
            for earlier in STAGES[: STAGES.index(stage)]:
                if done.get(earlier, {}).get("status") != "finished":
                    raise PatterningError(
                        f"{directory}: stage {stage} needs stage {earlier}, which is not done; "
                        f"run `patterning {earlier} {config}` first"
                    )
            _run_stages(loaded, [stage], directory)

    return command


for _stage in STAGES:
    app.command(name=_stage, help=HELP[_stage])(_stage_command(_stage))


@app.command(help="Run posterior chains on a model that exists already: checkpoints x components x chains.")
def study(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    with _reported():
        loaded, directory = _open_study(config, overrides, run_dir)
        from patterning_dist.stages.study import run_study

        run_study(loaded, directory)


@app.command(help="Run an experiment as a job of a Ray cluster; where it runs already, attach to it.")
def submit(
    config: ConfigArgument,
    overrides: SetOption = None,
    run_dir: Annotated[
        str | None,
        typer.Option("--run-dir", metavar="DIR", help="Absolute path that all nodes share, or a URL."),
    ] = None,
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the log until the job has ended.")] = True,
) -> None:
    with _reported():
        from patterning_dist.runtime.jobs.submit import submit_run

        config, run_dir = _local(config, run_dir)
        raise typer.Exit(submit_run(config, overrides or (), run_dir, address, follow))


@app.command(help="Say what every stage will take, from a short probe of its real pieces; writes nothing.")
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        _refuse_parentheses(config, loaded, "plan")
        from patterning_dist.driver import plan_experiment

        plan_experiment(loaded, directory, as_json)


@app.command(help="Check this machine and the Ray cluster: a line a check, ok or what to do.")
def doctor(
    run_dir: Annotated[
        str, typer.Option("--run-dir", metavar="DIR", help="Where runs are to be kept, a folder or a URL.")
    ] = "runs",
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="Cluster; default: RAY_ADDRESS, else one is started."),
    ] = None,
) -> None:
    with _reported():
        from patterning_dist.runtime.doctor import print_findings

        raise typer.Exit(print_findings(run_dir, address))


@app.command(help="List the components of a model, which `sampling.components` can name, and their sizes.")
def components(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub name of a language model, or an experiment file.")
    ],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
    every: Annotated[bool, typer.Option("--all", help="One line for each component.")] = False,
) -> None:
    with _reported():
        from patterning_dist.listing import print_components

        print_components(model, revision, every)


@app.command(help="Try step sizes, temperatures and localizations on short chains; write a config with the best.")
def calibrate(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        _refuse_parentheses(config, loaded, "calibrate")
        if isinstance(loaded, StudyConfig):
            from patterning_dist.stages.calibrate import calibrate_study

            calibrate_study(loaded, directory)
            return
        if read_manifest(directory).get("stages", {}).get("train", {}).get("status") != "finished":
            raise PatterningError(
                f"{directory}: calibrate needs the baseline of stage train, which is not done; "
                f"run `patterning prepare {config}` and `patterning train {config}` first"
            )
        from patterning_dist.driver import run_calibration

        run_calibration(loaded, directory)


@config_app.command(help="Print the JSON schema of the experiment file, for editors.")
def schema(
    kind: Annotated[
        Literal["run", "study", "parentheses"], typer.Option(help="Of which kind of experiment; run: the whole loop.")
    ] = "run",
) -> None:
    typer.echo(json.dumps(config_schema(kind), indent=2))


@config_app.command(help="Check an experiment file without running anything.")
def check(config: ConfigArgument, overrides: SetOption = None) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, None)
        if isinstance(loaded, StudyConfig):
            from patterning_dist.stages.study import check_study_inputs

            check_study_inputs(loaded, directory)
            typer.echo(f"{config}: ok; the study is kept in {directory}")
            return
        for index, source in enumerate(loaded.data.sources if isinstance(loaded, Config) else ()):
            if not source.path.exists():
                raise PatterningError(f"{config}: data.sources.{index}.path: {source.path} is not there; correct it")
        typer.echo(f"{config}: ok; the run is kept in {directory}")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"patterning {version('patterning-dist')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def app_main() -> None:
    """Entry point of the `patterning` script."""
    app()
