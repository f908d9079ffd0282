"""Weights that leave a run: read by others' code, they give the loss of this project's own trainings."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from matrix_kinds import KINDS
from tiny_run import copy_run, quiet, tiny_config
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.config import Config, dump_config, load_config
from patterning_dist.data.export import copies_of
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.stages.prepare import prepare
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.open import open_task
from patterning_dist.training.batches import weighted_loss

DOCS = Path(__file__).parents[2] / "docs/how_to/trainers.md"


def export(run: Path, name: str, to: Path, *options: str) -> str:
    """What the command says."""
    result = CliRunner().invoke(app, ["export", str(run), name, "--to", str(to), *options])
    assert result.exit_code == 0, result.output
    return result.output


def refused(run: Path, name: str, to: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["export", str(run), name, "--to", str(to), *options])
    assert result.exit_code == 2, result.output
    return result.output


def run_of(kind: str, folder: Path) -> tuple[Config, Path]:
    """A run that has its data, and random weights ``plus``, of single losses where a sample has several."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(KINDS[kind](folder)))
    config, run = load_config(folder / "config.yaml"), RunDirectory(folder / "run")
    with run.locked():
        run.store_config(dump_config(config))
        if kind in ("attention_only", "gpt_neox"):
            prepare(config, run, quiet())
    write_random_weights(config, run.path)
    return config, run.path


def write_random_weights(config: Config, run: Path) -> None:
    task = open_task(config, run, "cpu")
    number, length = len(task.train), task.num_positions
    ids = np.repeat(np.arange(number), length or 1)
    position = None if length is None else np.tile(np.arange(1, length + 1), number)
    weights = np.random.default_rng(5).gamma(2, 1, len(ids))
    write_sample_weights(run / "weights/plus.parquet", ids, position, weights, {}, task.key)


def own_loss(config: Config, run: Path) -> float:
    """Of all training samples under the weights, with the weights that a seed gives the model."""
    task = open_task(config, run, "cpu")
    ids = np.arange(len(task.train))
    rho = task.read_weights(run / "weights/plus.parquet", 1.0)
    with torch.no_grad():
        losses = task.losses(task.build(0), task.train[torch.from_numpy(ids)])
    return weighted_loss(losses, torch.from_numpy(rho), float(rho.sum()), 1).item()


def documented() -> dict[str, Any]:
    """What the code in the docs defines."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), found)
    return found


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])  # a corpus, and a table whose rows are padded
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_trainer_of_transformers_has_our_weighted_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # of engines in this process before
        monkeypatch.delenv(name, raising=False)
    import datasets
    from transformers import TrainingArguments

    config, run = run_of(kind, tmp_path / "x")
    export(run, "plus", tmp_path / "out", "--format", form)
    reader = "json" if form == "jsonl" else form
    files = str(tmp_path / f"out/train.{form}")
    rows = datasets.load_dataset(reader, data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    docs, model = documented(), open_task(config, run, "cpu").build(0)
    arguments = TrainingArguments(str(tmp_path / "t"), remove_unused_columns=False, use_cpu=True, report_to=[])
    trainer = docs["WeightedTrainer"](model, arguments, data_collator=docs["collate"], train_dataset=rows)
    with torch.no_grad():
        theirs = trainer.compute_loss(model.eval(), docs["collate"](list(rows))).item()
    assert theirs == pytest.approx(own_loss(config, run), rel=2e-6)
    said = json.loads((tmp_path / "out/export.json").read_text())
    assert said["num_losses"] == sum(sum(label != -100 for label in row["labels"]) for row in rows)


def test_pairs_have_a_weight_each(tmp_path: Path) -> None:
    config, run = run_of("reward_model", tmp_path / "x")
    export(run, "plus", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    task = open_task(config, run, "cpu")
    rho = task.read_weights(run / "weights/plus.parquet", 1.0)
    np.testing.assert_allclose([row["weight"] for row in rows], rho / rho.mean(), rtol=1e-6)
    table = pq.read_table(tmp_path / "x/train.parquet").to_pylist()
    for row in rows:
        (source,) = row["source"]
        assert source["file"].endswith("x/train.parquet")
        original = table[source["row"]]
        assert [row["chosen_input_ids"], row["rejected_input_ids"]] == [original["chosen"], original["rejected"]]


def test_sources_are_those_of_the_text(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    write_random_weights(tiny_config(run.path), run.path)
    export(run.path, "plus", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    sums: dict[str, list[float]] = {}
    for row in rows:
        parts = [Path(s["file"]).read_text(encoding="utf-8")[s["start"] : s["end"]] for s in row["source"]]
        assert "".join(parts) == row["text"].replace("<|endoftext|>", "")
        if len(parts) == 1 and "<|endoftext|>" not in row["text"]:
            sums.setdefault(row["source"][0]["file"], []).extend(row["token_weights"][1:])
    found = {row["file"]: row for row in pq.read_table(tmp_path / "out/sources.parquet").to_pylist()}
    assert sum(row["num_losses"] for row in found.values()) == len(rows) * 15
    total = sum(row["num_losses"] * row["weight"] for row in found.values())
    assert total == pytest.approx(len(rows) * 15, rel=1e-6)  # mean 1
    # The losses that sequences of one document alone have are most of it, and the mean is near.
    for file, weights in sums.items():
        assert len(weights) <= found[file]["num_losses"]
        if len(weights) == found[file]["num_losses"]:
            assert np.mean(weights) == pytest.approx(found[file]["weight"], rel=1e-5)


def test_megatron_files_hold_the_copies(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    write_random_weights(tiny_config(run.path), run.path)
    said = export(run.path, "plus", tmp_path / "a", "--format", "megatron", "--copies", "1.5")
    export(run.path, "plus", tmp_path / "b", "--format", "jsonl", "--copies", "1.5")
    rows = [json.loads(line) for line in (tmp_path / "b/train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not {"weight", "token_weights"} & rows[0].keys()
    index = (tmp_path / "a/train.idx").read_bytes()  # read by offsets, as the format's own documentation has them
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, num, num_documents = struct.unpack("<QBQQ", index[9:34])
    assert (version, code, num, num_documents) == (1, 8, len(rows), len(rows) + 1)
    lengths, begins = np.frombuffer(index, "<i4", num, 34), np.frombuffer(index, "<i8", num, 34 + 4 * num)
    tokens = np.fromfile(tmp_path / "a/train.bin", np.uint16)
    for row, length, begin in zip(rows, lengths, begins, strict=True):
        assert tokens[begin // 2 : begin // 2 + length].tolist() == row["input_ids"]
    share = json.loads((tmp_path / "a/export.json").read_text())["variance_kept"]
    assert share < 0.3  # weights of tokens are independent here: of 15, a fifteenth of the variance is between samples
    assert f"keep {share:.0%} of the variance" in said


def test_copies_are_as_many_as_weights_say() -> None:
    weights = np.random.default_rng(0).gamma(0.5, 2, 400)
    weights /= weights.mean()
    counts = np.array([copies_of(weights, 1.7, seed) for seed in range(4000)])
    assert (np.abs(counts - 1.7 * weights) < 1).all()
    assert (np.abs(counts.sum(axis=1) - 1.7 * 400) <= 1).all()
    # A number of copies is one of two whole numbers: its variance is at most 1/4.
    assert np.abs(counts.mean(axis=0) - 1.7 * weights).max() < 5 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("gpt_neox", "base", (), "base: an arm without weights; there is nothing to export"),
        ("gpt_neox", "online", (), r"online: an arm in 2 rounds, each with weights of its own"),
        ("gpt_neox", "none", (), r"none\.parquet: no weights there; .* name one of base, online, permuted, plus"),
        ("gpt_neox", "plus", ("--format", "megatron"), r"--format megatron has no weights; give --copies 1"),
        ("reward_model", "plus", ("--format", "megatron", "--copies", "1"), r"--format megatron is for text"),
        ("digits", "plus", (), r"digits: its samples are those of a task of its own, .* \(sample_id\) and weights"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, kind: str, name: str, options: tuple[str, ...], message: str
) -> None:
    _, run = run_of(kind, tmp_path / "x")
    assert re.search(message, refused(run, name, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_what_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = run_of("reward_model", tmp_path / "x")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("patterning_dist.stages.export.write_json", stopped)
        result = CliRunner().invoke(app, ["export", str(run), "plus", "--to", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    export(run, "plus", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "export.json",
        "sources.parquet",
        "train.parquet",
    ]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    _, run = run_of("reward_model", tmp_path / "x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    assert "out: is there already; give a folder that is new or empty" in refused(run, "plus", tmp_path / "out")
