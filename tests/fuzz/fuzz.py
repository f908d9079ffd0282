"""Thousands of broken inputs: each ends in success, or in lines that name the fault and exit code 2.

    python tests/fuzz/fuzz.py --number 2500             # of every kind
    python tests/fuzz/fuzz.py --kind config --seed 7 --number 1   # one again

A mutant is bad if an exception comes through, a command takes more than 30 seconds or more memory than it is given, a
refusal does not name what it is about, or something is written although the input was refused. Bad mutants are printed
with their seeds.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).parent))

import typer
import yaml

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from matrix_kinds import KINDS
from mutants import mutate_file, mutated_text, mutated_tree, write_yaml
from report_fixture import write_run
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.errors import PatterningError
from patterning_dist.live import Line, Live
from patterning_dist.report import build_report
from patterning_dist.storage.run import RunDirectory

ROOT = Path(__file__).parents[2]
# Experiments of configs/ that need nothing which is not in the repository.
SHIPPED = ("attribution", "frontier", "induction", "language-model", "parentheses", "quickstart", "study-own-model")
SECONDS = 30
GIGABYTES = 8


class TooLong(BaseException):
    """Not an Exception: nobody on the way may take it for an error of their own."""


class Bad(NamedTuple):
    """A mutant that was not answered as it should be."""

    kind: str
    seed: int
    what: str
    detail: str


Kind = Callable[[random.Random, Path], list[str]]  # makes a mutant in a folder; the command that meets it


def config(rng: random.Random, folder: Path) -> list[str]:
    """An experiment file, of those that ship or of a tiny one whose data are there."""
    file = folder / "configs/x.yaml"
    (folder / "corpora").symlink_to(ROOT / "corpora")
    shutil.copytree(ROOT / "configs", folder / "configs")
    if rng.random() < 0.5:
        text = (ROOT / f"configs/{rng.choice(SHIPPED)}.yaml").read_text(encoding="utf-8")
    else:
        text = yaml.safe_dump(KINDS[rng.choice(sorted(KINDS))](folder / "configs"), sort_keys=False)
    if rng.random() < 0.7:
        write_yaml(file, mutated_tree(rng, yaml.safe_load(text)))
    else:
        file.write_bytes(mutated_text(rng, text).encode("utf-8", "surrogatepass"))
    return ["config", "check", str(file)]


def data(rng: random.Random, folder: Path) -> list[str]:
    """A token table, a table of pairs, or a corpus."""
    kind = rng.choice(("llama", "reward_model"))
    write_yaml(folder / "x.yaml", KINDS[kind](folder))
    mutate_file(rng, rng.choice(sorted(folder.glob("*.parquet"))))
    return ["config", "check", str(folder / "x.yaml")]


def corpus(rng: random.Random, folder: Path) -> list[str]:
    """Text files, JSON lines."""
    settings = KINDS["attention_only"](folder)
    files = sorted(file for file in (folder / "corpus").rglob("*.txt"))
    if rng.random() < 0.5:
        import json

        lines = [json.dumps({"text": file.read_text(), "domain": file.parent.name}) for file in files]
        (folder / "x.jsonl").write_text("\n".join(lines) + "\n")
        settings["data"]["sources"] = [{"path": str(folder / "x.jsonl")}]
        files = [folder / "x.jsonl"]
    mutate_file(rng, rng.choice(files))
    write_yaml(folder / "x.yaml", settings)
    return ["prepare", str(folder / "x.yaml"), "--run-dir", str(folder / "run")]


def model(rng: random.Random, folder: Path) -> list[str]:
    """The folder of a language model."""
    KINDS["llama"](folder)
    files = sorted(file for file in (folder / "model").iterdir() if file.is_file())
    mutate_file(rng, rng.choice(files))
    return ["components", str(folder / "model")]


def page(rng: random.Random, folder: Path) -> list[str]:
    """A run directory, whose page is made again."""
    run = write_run(folder / "run")
    files = sorted(file for file in run.rglob("*") if file.is_file() and file.suffix in (".json", ".parquet", ".yaml"))
    mutate_file(rng, rng.choice(files))
    return ["page", str(run)]


def state(rng: random.Random, folder: Path) -> list[str]:
    """What a driver says of a run."""
    run = RunDirectory(folder / "run")
    finished = {"status": "finished", "seconds": 3.0, "outputs": {"a/b": 3}, "sha256": {"a/b": "0" * 64}}
    run.update_manifest(stages={"train": finished, "sample": {"status": "started", "sha256_before": {}}})
    lines = {f"head {n % 3} chain {n}": Line(n, 40, 0.1 * n) for n in range(9)}
    run.keep_state(Live("sample", "sampling", 3, 40, 2.0, 1.0, lines, {"head 0": {"rhat": 1.2}}).as_json())
    mutate_file(rng, folder / rng.choice(("run/manifest.json", "run/live.json")))
    return ["status", str(folder / "run")]


KIND: dict[str, Kind] = {kind.__name__: kind for kind in (config, data, corpus, model, page, state)}


def _page(run: Path) -> None:
    """The page of a run, made as stage report makes it, without the stages before."""
    try:
        build_report(run)
    except PatterningError as error:
        typer.echo(f"error: {error}")
        raise typer.Exit(2) from None


COMMANDS = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
COMMANDS.registered_commands, COMMANDS.registered_groups = list(app.registered_commands), list(app.registered_groups)
COMMANDS.command(name="page")(_page)


def answer(arguments: list[str]) -> tuple[str, str]:
    """How a command ends: done, refused, or what is bad about it; and its words."""

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        result = CliRunner().invoke(COMMANDS, arguments)
    except TooLong:
        return "takes too long", ""
    finally:
        signal.alarm(0)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        if isinstance(result.exception, TooLong):
            return "takes too long", ""
        return "an exception comes through", "".join(traceback.format_exception(result.exception))[-3000:]
    if result.exit_code == 0:
        return "done", result.output
    if result.exit_code != 2:
        return f"exit code {result.exit_code}", result.output
    return "refused", result.output


def judge(kind: str, seed: int, folder: Path) -> Bad | str:
    """Make a mutant, let the command meet it, and say what came of it."""
    rng = random.Random(f"{kind} {seed}")
    arguments = KIND[kind](rng, folder)
    how, output = answer(arguments)
    if how not in ("done", "refused"):
        return Bad(kind, seed, how, output)
    if how == "refused":
        lines = [line for line in output.splitlines() if line.strip()]
        if not lines or "error" not in output.lower():
            return Bad(kind, seed, "refused without a word", output)
        if any(re.search(r"Traceback|File \".*\", line \d", line) for line in lines):
            return Bad(kind, seed, "a traceback in its words", output)
        if max(map(len, lines)) > 2000:
            return Bad(kind, seed, "a line of more than 2,000 characters", output[:500])
    return how


def fuzz(kind: str, seeds: range, say: Callable[[str], None] = print) -> tuple[Counter[str], list[Bad]]:
    """Judge mutants of one kind."""
    found: Counter[str] = Counter()
    bad: list[Bad] = []
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        here = os.getcwd()
        try:
            os.chdir(folder)
            outcome = judge(kind, seed, folder)
        finally:
            os.chdir(here)
            shutil.rmtree(folder, ignore_errors=True)
        found[outcome if isinstance(outcome, str) else "bad"] += 1
        if isinstance(outcome, Bad):
            bad.append(outcome)
            say(f"bad: {kind} {seed}: {outcome.what}\n{outcome.detail}")
    return found, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KIND), action="append")
    parser.add_argument("--number", type=int, default=100, help="of mutants of every kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    num_bad = 0
    for kind in arguments.kind or sorted(KIND):
        found, bad = fuzz(kind, range(arguments.seed, arguments.seed + arguments.number))
        num_bad += len(bad)
        print(f"{kind}: " + ", ".join(f"{number} {how}" for how, number in sorted(found.items())), flush=True)
    return int(num_bad > 0)


if __name__ == "__main__":
    sys.exit(main())
