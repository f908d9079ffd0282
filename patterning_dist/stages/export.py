"""Weights on their way out: a table for other trainers from the weights of an arm."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from patterning_dist.config import Config
from patterning_dist.config.training import ArmConfig
from patterning_dist.data.export import ROWS_AT_ONCE, Weighted, copies_of, source_table
from patterning_dist.data.megatron import write_megatron
from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.tokens import TokenDataset
from patterning_dist.data.weights import refuse_swaps
from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.storage.files import (
    atomic_path,
    explained,
    file_sha256,
    write_json,
    write_parquet,
    write_parquet_parts,
)
from patterning_dist.storage.run import RunDirectory, refuse_changed
from patterning_dist.tasks.open import open_task

Format = Literal["parquet", "jsonl", "megatron"]


def export(
    config: Config, run: RunDirectory, name: str, folder: Path, kind: Format, copies: float | None, seed: int
) -> None:
    """Write train.* , sources.parquet and export.json into a folder.

    Args:
        config: of the run.
        run: whose weights they are; it is only read.
        name: of an arm, or of a table in weights/.
        folder: to be made.
        kind: of the file of samples.
        copies: mean number of copies of a sample, for samples repeated instead of weighted; None: weighted.
        seed: of the numbers of copies.

    Raises:
        PatterningError: no such weights, a folder that has files, samples that no trainer knows, or a format that has
            no weights.
    """
    check_target(folder, kind, copies)
    run.location.fetch("data", "weights", "retrain")
    table, arm = weights_of(config, run.path, name)
    refuse_changed(run.location, run.manifest, "data", table.relative_to(run.path).as_posix())
    task = open_task(config, run.path, "cpu")
    samples = task.train
    if not isinstance(samples, TokenDataset | SequenceTable):
        raise PatterningError(
            f"{config.name}: its samples are those of a task of its own, which no trainer knows; {table} has their "
            f"numbers ({task.key}) and weights"
        )
    refuse_swaps(table)
    is_prepared = (run.path / "data/corpus.json").exists()
    if is_prepared and not (run.path / "data/sources.parquet").exists():
        raise PatterningError(
            f"{run.location}: its corpus was prepared by a version that kept no sources; run the experiment in "
            "another --run-dir"
        )
    weighted = Weighted.of(samples, task.read_weights(table, arm.strength), run.path / "data" if is_prepared else None)
    said = {
        "run": str(run.location),
        "weights": name,
        "strength": arm.strength,
        "weighted_share": arm.weighted_share,
        "weights_sha256": file_sha256(table),
    }
    write_weighted(folder, weighted, kind, copies, seed, said)


def check_target(folder: Path, kind: Format, copies: float | None) -> None:
    """Refuse a folder that has files, and a format without weights.

    Raises:
        PatterningError: either.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PatterningError(f"{folder}: is there already; give a folder that is new or empty")
    if kind == "megatron" and copies is None:
        raise PatterningError("--format megatron has no weights; give --copies 1 (or more) to repeat samples instead")


def write_weighted(
    folder: Path, weighted: Weighted, kind: Format, copies: float | None, seed: int, said: Mapping[str, Any]
) -> None:
    """Write samples with their weights: train.*, sources.parquet and export.json.

    Args:
        folder: to be made.
        weighted: samples and weights.
        kind: of the file of samples.
        copies: mean number of copies of a sample; None: weights.
        seed: of the numbers of copies.
        said: for export.json, beside what is counted here.

    Raises:
        PatterningError: samples of pairs or classes in Megatron's format, or a folder that cannot be written.
    """
    if kind == "megatron" and isinstance(weighted.samples, SequenceTable):
        raise PatterningError("--format megatron is for text that is predicted token by token; take parquet or jsonl")
    num_samples, per_sample = len(weighted.weights), weighted.sample_weights()
    number = None if copies is None else copies_of(per_sample, copies, seed)
    with Progress() as progress, _whole(folder) as partial:
        progress.start(f"writing {num_samples} samples", num_samples)
        num_rows, names = _write(partial, weighted, kind, number, progress)
        write_parquet(partial / "sources.parquet", source_table(weighted))
        counts = weighted.num_counted().astype(np.float64)
        found: dict[str, Any] = dict(said) | {
            "num_samples": num_samples,
            "num_rows": num_rows,
            "num_losses": int(counts.sum()),
            "effective_share": effective_share(weighted.weights, int(counts.sum())),
            "loss": "sum of weight times loss over a batch / number of its losses that count; weights have mean 1",
        }
        if number is not None:
            share = _share_between(weighted, per_sample, counts)
            found |= {"mean_copies": copies, "seed": seed, "variance_kept": share}
            progress.say(f"copies of whole samples keep {share:.0%} of the variance of the weights")
        write_json(partial / "export.json", found)
        progress.say(f"{num_rows} rows in {', '.join(str(folder / name) for name in names)}")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` when the block ends well, and is gone otherwise."""
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        with explained(folder):
            partial.chmod(0o755)
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weights_of(config: Config, directory: Path, name: str) -> tuple[Path, ArmConfig]:
    """The table, and the arm that takes it."""
    table = directory / "weights" / f"{name}.parquet"
    arms = {} if config.retrain is None else {arm.name: arm for arm in config.retrain.arm_list}
    if (arm := arms.get(name)) is not None:
        if arm.weights is None:
            raise PatterningError(f"{name}: an arm without weights; there is nothing to export")
        if arm.rounds > 1:
            raise PatterningError(
                f"{name}: an arm in {arm.rounds} rounds, each with weights of its own: retrain/{name}/seed-*/round-*/"
                "weights.parquet; export one phase as an arm of that table"
            )
        own = isinstance(arm.weights, Path)
        table = directory / ("retrain" if own else "weights") / (f"{name}/weights" if own else str(arm.weights))
        table = table.with_name(table.name + ".parquet")
    if not table.exists():
        there = sorted({*arms, *(file.stem for file in (directory / "weights").glob("*.parquet"))})
        raise PatterningError(f"{table}: no weights there; run the stages before, or name one of {', '.join(there)}")
    return table, arm or ArmConfig(name=name)


def _write(
    folder: Path, weighted: Weighted, kind: Format, copies: np.ndarray | None, progress: Progress
) -> tuple[int, list[str]]:
    """The number of rows, and the names of the files."""
    num_rows, num_samples = 0, len(weighted.weights)

    def rows() -> Iterator[pa.Table]:
        nonlocal num_rows
        for number, table in enumerate(weighted.rows(copies), 1):
            num_rows += len(table)
            yield table
            progress.update(min(num_samples, number * ROWS_AT_ONCE))

    if kind == "megatron":
        assert isinstance(weighted.samples, TokenDataset)
        vocabulary_size = weighted.samples.vocabulary_size or 1 + weighted.samples.max_token
        sequences = (ids.values.to_numpy() for table in rows() for ids in table["input_ids"])
        files = write_megatron(folder / "train", sequences, vocabulary_size)
        return num_rows, [file.name for file in files]
    file = folder / f"train.{kind}"
    if kind == "parquet":
        write_parquet_parts(file, rows())
    else:
        _write_jsonl(file, rows())
    return num_rows, [file.name]


def _write_jsonl(file: Path, tables: Iterator[pa.Table]) -> None:
    with atomic_path(file) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for table in tables:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def effective_share(weights: np.ndarray, number: int) -> float:
    """(sum rho)^2 / (n sum rho^2) over the losses that count."""
    total = weights.astype(np.float64)
    return float(total.sum() ** 2 / (number * np.square(total).sum()))


def _share_between(weighted: Weighted, per_sample: np.ndarray, counts: np.ndarray) -> float:
    """Variance of the weights over losses that lies between samples; what is within is lost where samples repeat."""
    mean_square = np.square(weighted.weights.astype(np.float64)).sum() / counts.sum()
    between = (counts * np.square(per_sample.astype(np.float64))).sum() / counts.sum()
    return float((between - 1) / (mean_square - 1)) if mean_square > 1 else 1.0
