"""What people bring goes through the whole loop: prompts with completions in JSON lines, and a LoRA folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from matrix_kinds import SIZES, TRAINING, loop
from safetensors.torch import load_file
from small_adapter import make
from small_tokenizer import save_tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from typer.testing import CliRunner

from patterning_dist.cli import app

pytestmark = pytest.mark.usefixtures("local_ray")
STAGES = {"sample", "solve", "check", "predict", "retrain", "report"}


def write_prompts(path: Path, number: int, seed: int) -> None:
    """Questions of a few words, and answers."""
    rng = np.random.default_rng(seed)
    words = lambda n: " ".join(rng.choice(["what", "is", "it", "yes", "no", "maybe", "the", "answer"], n))  # noqa: E731
    rows = [{"prompt": words(3), "completion": f" {words(rng.integers(2, 5))}"} for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, component: str, **sections: Any) -> Path:
    """All stages; returns the run directory."""
    settings = loop("given", component, "domain:other", **sections)
    settings["response"] = {"direction": {"component": component, "hessian_sequences": 4}}
    settings["sampling"] |= {"components": [{"name": component}]}
    settings["solve"] |= {"component": component}
    settings["training"] = TRAINING | {"learning_rate": 1e-5}  # so low that linear response holds in an untrained model
    settings["check"] = {"strengths": [1]}
    settings["predict"] = {"curvature_sequences": 8, "segments": 2, "gradient_sequences": 8}
    settings["retrain"] |= {"start": "final", "arms": ["base", "plus"]}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    arguments = ["run", str(folder / "experiment.yaml"), "--run-dir", str(folder / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert {stage for stage, entry in manifest["stages"].items() if entry["status"] == "finished"} >= STAGES
    assert (folder / "run" / "report.html").stat().st_size > 5_000
    predicted = json.loads((folder / "run" / "predict" / "response.json").read_text())["arms"]["plus"]
    assert predicted["outside"] is None
    assert np.isfinite(predicted["observables"]["wanted"]["interval"]).all()
    return folder / "run"


def data_of(folder: Path) -> dict[str, Any]:
    for name, number in (("train", 30), ("held_out", 12)):
        write_prompts(folder / f"{name}.jsonl", number, number)
    return {"kind": "tokens", "train": "train.jsonl", "held_out": {"other": "held_out.jsonl"}, "context_length": 16}


def test_prompts_with_completions(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "model")
    torch.manual_seed(1)
    config = GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **SIZES)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    model = {"kind": "huggingface", "path": "model"}
    directory = run(tmp_path, "everything", data=data_of(tmp_path), model=model)
    weights = pq.read_table(directory / "weights" / "plus.parquet")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    of_samples = weights["sequence_id"].to_numpy()
    for number, row in enumerate(
        rows
    ):  # the tokens of a completion have weights, with its end, and those of the prompt none
        prompt, whole = (
            tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["completion"] + "</s>")
        )
        positions = weights["position"].to_numpy()[of_samples == number]
        np.testing.assert_array_equal(positions, np.arange(len(prompt), len(whole)))
    assert weights["weight"].to_numpy().std() > 0.1


def test_an_adapter_is_what_moves_and_what_is_retrained(tmp_path: Path) -> None:
    folder, _ = make(tmp_path, sizes={"vocab_size": 290, "max_position_embeddings": 16})
    save_tokenizer(folder)
    directory = run(tmp_path, "adapter", data=data_of(tmp_path), model={"kind": "huggingface", "path": "adapter"})
    given = load_file(folder / "adapter_model.safetensors")
    diagnostics = json.loads((directory / "response" / "diagnostics.json").read_text())["subjects"]
    num_coordinates = sum(weight.numel() for weight in given.values())
    assert [subject["num_coordinates"] for subject in diagnostics.values()] == [num_coordinates]
    trained = {
        arm: load_file(directory / f"retrain/{arm}/seed-0/adapter_model.safetensors") for arm in ("base", "plus")
    }
    for name, weight in given.items():  # all of the adapter was trained, by other weights in the other arm
        after = trained["plus"][name]
        assert after.shape == weight.shape
        assert not torch.equal(after, weight)
        assert not torch.equal(after, trained["base"][name])
    for arm in trained.values():  # and nothing else is stored
        assert arm.keys() == given.keys()
