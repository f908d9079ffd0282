"""The `patterning` command. torch and ray are imported by the stages, so that help and checks are quick."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from patterning_dist.command_options import (
    ConfigArgument,
    CopiesOption,
    CopiesSeedOption,
    FormatOption,
    RunDirOption,
    SetOption,
    ToOption,
    WeightsArgument,
)
from patterning_dist.config import Root, config_schema, load_config
from patterning_dist.config.kinds import DEFAULT
from patterning_dist.errors import PatterningError
from patterning_dist.preemption import Preempted, preemptible
from patterning_dist.runtime.local_token import guard_local_ray
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import read_manifest
from patterning_dist.storage.store import path_or_url
from patterning_dist.trackers.tracker import TrackerName

HELP = {
    "prepare": "Train the tokenizer and cut the corpus into sequences.",
    "train": "Train the baseline and anneal it to the checkpoint that is sampled around.",
    "sample": "Run the posterior chains of every checkpoint and component.",
    "solve": "Turn the susceptibilities into sample weights that reach the targets.",
    "check": "Measure the response under the weights by coupled chains.",
    "predict": "Predict what every arm will come to, before it is trained.",
    "retrain": "Train again on the weighted data, every arm with every seed.",
    "validate": "Measure attribution scores (LDS, QLD) by retrainings on random subsets.",
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


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        with preemptible():
            yield
    except PatterningError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    except Preempted as notice:
        typer.secho(f"stopped by {notice.signal.name}; run the same command to resume", err=True)
        raise typer.Exit(notice.exit_code) from None
    except KeyboardInterrupt:
        typer.secho("interrupted; run the same command to resume", err=True)
        raise typer.Exit(130) from None


def _open(config: Path | str, overrides: Sequence[str] | None, run_dir: Path | str | None) -> tuple[Root, Path | str]:
    """The experiment and its run directory; a run directory is its own unless another is asked for."""
    guard_local_ray()
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
    return Location.at(config).fetch("config.yaml"), run_dir or config


@app.command(help="Run every stage that the experiment asks for and that is not done yet.")
def run(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        from patterning_dist.driver import run_stages

        run_stages(loaded, None, directory)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
        with _reported():
            loaded, directory = _open(config, overrides, run_dir)
            from patterning_dist.driver import experiment_of, run_stages

            stages = list(experiment_of(loaded).stages(loaded))
            if stage not in stages:
                raise PatterningError(
                    f"{config}: this experiment does not ask for stage {stage}; it has {', '.join(stages)}"
                )
            done = read_manifest(directory).get("stages", {})
            for earlier in stages[: stages.index(stage)]:
                if done.get(earlier, {}).get("status") != "finished":
                    raise PatterningError(
                        f"{directory}: stage {stage} needs stage {earlier}, which is not done; "
                        f"run `patterning {earlier} {config}` first"
                    )
            run_stages(loaded, [stage], directory)

    return command


for _stage in HELP:
    app.command(name=_stage, help=HELP[_stage])(_stage_command(_stage))


@app.command(help="Chains and report only, of any experiment: what `run` does with stages up to sample, and report.")
def study(config: ConfigArgument, overrides: SetOption = None, run_dir: RunDirOption = None) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        from patterning_dist.driver import of_the_loop, run_stages

        later = dict.fromkeys(("solve", "check", "predict", "retrain", "validation"))
        run_stages(of_the_loop(loaded, "study").model_copy(update=later), None, directory)


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

        config, directory = _local(config, run_dir)
        raise typer.Exit(
            submit_run(config, overrides or (), None if directory is None else str(directory), address, follow)
        )


@app.command(
    help="Write training samples with the weights of an arm for other trainers: Parquet, JSON lines, Megatron."
)
def export(
    config: ConfigArgument,
    weights: WeightsArgument,
    to: ToOption,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    kind: FormatOption = "parquet",
    copies: CopiesOption = None,
    seed: CopiesSeedOption = 0,
) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        from patterning_dist.driver import of_the_loop
        from patterning_dist.stages.export import export as write
        from patterning_dist.storage.run import RunDirectory

        write(of_the_loop(loaded, "export"), RunDirectory(directory), weights, to, kind, copies, seed)


@app.command(help="Weigh a new corpus by what the weights of an arm have in common, and write it as `export` does.")
def score(
    config: ConfigArgument,
    weights: WeightsArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Text, or a table like the run's training data.")],
    to: ToOption,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    kind: FormatOption = "parquet",
    copies: CopiesOption = None,
    seed: CopiesSeedOption = 0,
) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        from patterning_dist.driver import of_the_loop
        from patterning_dist.stages.scorer import score as write
        from patterning_dist.storage.run import RunDirectory

        write(of_the_loop(loaded, "score"), RunDirectory(directory), weights, data, to, kind, copies, seed)


@app.command(
    help="Say what every stage will take, from a short probe of its real pieces, or for GPUs that need not be there "
    "(--gpus); writes nothing."
)
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", min=1, metavar="N", help="Plan for so many GPUs a node, by arithmetic, without weights."
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=1, metavar="GB", help="Memory of one of them.")] = 80,
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Nodes of them.")] = 1,
    flops: Annotated[
        float | None,
        typer.Option(
            "--flops", min=1, metavar="F", help="FLOP/s that a GPU reaches in passes of the model; default: measured."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, run_dir)
        from patterning_dist.driver import plan_experiment

        if gpus is None:
            plan_experiment(loaded, directory, as_json)
            return
        from patterning_dist.stages.plan.machine import Machine

        plan_experiment(loaded, directory, as_json, Machine(nodes, gpus, gpu_memory * 1e9, flops))


@app.command(help="Show what a run has done and is doing, from another terminal or machine.")
def status(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, a folder or a URL.", parser=path_or_url)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    with _reported():
        from patterning_dist.status import print_status

        print_status(run_dir, as_json)


@app.command(help="Show the same again and again until the run's command ends.")
def watch(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, a folder or a URL.", parser=path_or_url)
    ],
) -> None:
    with _reported():
        from patterning_dist.status import watch

        watch(run_dir)


@app.command(help="Send what a run measures to an experiment tracker until the run ends; nothing is sent twice.")
def track(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, a folder or a URL.", parser=path_or_url)
    ],
    to: Annotated[TrackerName, typer.Option("--to", help="The tracker.")],
    project: Annotated[
        str,
        typer.Option("--project", metavar="NAME", help="Of the tracker; for TensorBoard a folder."),
    ] = "patterning",
) -> None:
    with _reported():
        from patterning_dist.trackers.follow import track as follow

        follow(run_dir, to, project)


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
        if address is None:
            guard_local_ray()
        from patterning_dist.runtime.doctor import print_findings

        raise typer.Exit(print_findings(run_dir, address))


@app.command(help="Find published numbers again on this machine, without Ray: a line a number, ok or FAILED.")
def selftest() -> None:
    with _reported():
        from patterning_dist.selftest import print_checks

        raise typer.Exit(print_checks())


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
        from patterning_dist.driver import run_calibration

        run_calibration(loaded, directory)


@config_app.command(help="Print the JSON schema of the experiment file, for editors.")
def schema(kind: Annotated[str, typer.Option(help="Of which kind of experiment.")] = DEFAULT) -> None:
    with _reported():
        typer.echo(json.dumps(config_schema(kind), indent=2))


@config_app.command(help="Check an experiment file without running anything.")
def check(config: ConfigArgument, overrides: SetOption = None) -> None:
    with _reported():
        loaded, directory = _open(config, overrides, None)
        from patterning_dist.driver import experiment_of
        from patterning_dist.runtime.jobs.files import named_paths

        remarks = experiment_of(loaded).preflight(loaded, Location.at(directory).path)
        for key, path, _ in named_paths(loaded):
            if path.exists():
                typer.echo(f"{'.'.join(map(str, key))}: {path}")
        for remark in remarks:
            typer.echo(remark)
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
