"""Reward models and classifiers: losses are those of the unpadded sequences, metrics those by hand."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from patterning_dist.config import load_config
from patterning_dist.data.sequences import SequenceTable
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import model_components
from patterning_dist.models.huggingface import language_model_skeleton, load_language_model
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.open import open_task

VOCABULARY, LENGTH = 64, 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "gpt_neox": lambda **more: transformers.GPTNeoXConfig(**SIZES, **more),
    "llama": lambda **more: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more),
    "gpt2": lambda **more: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **more),
    "bert": lambda **more: transformers.BertConfig(**SIZES, **(more | {"pad_token_id": 0})),
}
RNG = np.random.default_rng(3)


def texts(num: int, longest: int = LENGTH) -> list[list[int]]:
    return [RNG.integers(1, VOCABULARY, size=length).tolist() for length in RNG.integers(1, longest + 1, num)]


CHOSEN, REJECTED, DOMAINS = texts(20), texts(20), ["law", "code"] * 10


def save_model(folder: Path, kind: str, num_labels: int, **more: Any) -> nn.Module:
    torch.manual_seed(1)
    config = MODELS[kind](vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=num_labels, **more)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "model")
    return model


def task_of(folder: Path, data: dict, model: dict | None = None) -> Any:
    sampling = {
        "components": [{"name": "head"}],
        "observables": [{"kind": "component_loss", "name": "component"}],
        "num_chains": 2,
        "num_draws": 100,
        "burn_in": 0,
        "steps_between_draws": 1,
        "inverse_temperature": 100,
        "localization": 100,
        "step_size": 1e-4,
        "batch_size": 4,
        "probe_sequences": 4,
    }
    written = {
        "name": "t",
        "seed": 1,
        "device": "cpu",
        "model": {"kind": "huggingface"} | (model or {"path": str(folder / "model")}),
        "data": {"context_length": LENGTH} | data,
        "sampling": sampling,
    }
    if model:
        written["training"] = {"num_steps": 1, "batch_size": 4, "learning_rate": 0.001, "optimizer": "adamw"}
    (folder / "run.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    return open_task(load_config(folder / "run.yaml"), folder, "cpu")


def write(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def pairs(folder: Path) -> dict:
    return {
        "kind": "pairs",
        "train": write(folder / "t.parquet", chosen=CHOSEN, rejected=REJECTED),
        "held_out": {"h": write(folder / "h.parquet", chosen=CHOSEN, rejected=REJECTED, domain=DOMAINS)},
    }


def alone(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Scores [sample, class] of every sequence by itself, as transformers gives them."""
    return torch.cat([model(input_ids=torch.tensor([sequence])).logits for sequence in sequences])


@pytest.mark.parametrize("kind", MODELS)
def test_a_reward_model_scores_pairs_as_if_unpadded(tmp_path: Path, kind: str) -> None:
    given = save_model(tmp_path, kind, 1)
    task = task_of(tmp_path, pairs(tmp_path))
    model = task.load("final", Ranks())
    losses = task.losses(model, task.train[np.arange(20)])
    margin = (alone(given, CHOSEN) - alone(given, REJECTED)).squeeze(1)
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(margin), rtol=0, atol=3e-6)
    with torch.no_grad():
        found = task.evaluate(model, Ranks())
    assert found.keys() == task.metrics.keys()
    ids = held_out_ids(task, 1, 100, "realised")["h"]
    right, law = (margin > 0).numpy()[ids], ids % 2 == 0
    assert found["h_loss"] == found["validation_loss"] == pytest.approx(losses[ids].mean().item(), abs=1e-6)
    assert found["accuracy"] == right.mean()
    assert found["accuracy_law"] == right[law].mean()
    assert found["accuracy_code"] == right[~law].mean()
    assert task.num_positions is None
    assert task.index(task.train, np.array([1, 0]))["sample_id"].tolist() == [1, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_classifier_has_the_cross_entropy_of_unpadded_sequences(tmp_path: Path, kind: str) -> None:
    given, labels = save_model(tmp_path, kind, 3), RNG.integers(3, size=20).tolist()
    table = write(tmp_path / "t.parquet", input_ids=CHOSEN, label=labels, domain=DOMAINS)
    task = task_of(tmp_path, {"kind": "labelled", "train": table, "held_out": {"h": table}})
    model, scores = task.load("final", Ranks()), alone(given, CHOSEN)
    losses = task.losses(model, task.train[np.arange(20)])
    wanted = torch.nn.functional.cross_entropy(scores, torch.tensor(labels), reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=0, atol=3e-6)
    with torch.no_grad():
        found = task.evaluate(model, Ranks())
    ids = held_out_ids(task, 1, 100, "realised")["h"]
    right = (scores.argmax(dim=1).numpy() == labels)[ids]
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["accuracy_code"] == pytest.approx(right[ids % 2 == 1].mean())
    assert found.keys() == task.metrics.keys()


def test_sequences_padded_on_either_side_are_the_same_samples(tmp_path: Path) -> None:
    plain = SequenceTable(write(tmp_path / "p.parquet", input_ids=CHOSEN), LENGTH, {"tokens": "input_ids"})
    for left in (False, True):
        pads = [[7] * (LENGTH - len(text)) for text in CHOSEN]
        rows = [pad + text if left else text + pad for text, pad in zip(CHOSEN, pads, strict=True)]
        ones = [[1] * len(text) + [0] * len(pad) for text, pad in zip(CHOSEN, pads, strict=True)]
        ones = [mask[::-1] for mask in ones] if left else ones
        columns = {"input_ids_chosen": rows, "attention_mask_chosen": ones, "domain": ["p"] * 20}
        padded = SequenceTable(write(tmp_path / "q.parquet", **columns), LENGTH, {"tokens": "input_ids_chosen"})
        assert padded.sha256 == plain.sha256
    by_token = SequenceTable(
        write(tmp_path / "r.parquet", x=[[1, 2, 7, 7], [3, 7, 5, 6]], domain=["p"] * 2), 4, {"tokens": "x"}, pad=7
    )
    assert by_token[[0, 1]]["tokens_mask"].sum(dim=1).tolist() == [2, 4]


def test_a_common_prompt_stands_before_both(tmp_path: Path) -> None:
    prompts, ends = [[1, 2], [3]], [[[4], [5, 6]], [[7, 8, 9], [10]]]
    columns = {"chosen": [e[0] for e in ends], "rejected": [e[1] for e in ends]}
    names = {"chosen": "chosen", "rejected": "rejected"}
    apart = SequenceTable(write(tmp_path / "t.parquet", prompt=prompts, **columns), 5, names, prompt="prompt")
    whole = {name: [p + e for p, e in zip(prompts, column, strict=True)] for name, column in columns.items()}
    within = SequenceTable(write(tmp_path / "u.parquet", **whole), 5, names)
    assert {k: v.tolist() for k, v in apart[[0, 1]].items()} == {k: v.tolist() for k, v in within[[0, 1]].items()}
    assert apart[[1]]["chosen"].tolist() == [[3, 7, 8, 9, 0]]


def test_rows_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", chosen=[[1], [1, 2, 3, 4], [2], [3]], rejected=[[5], [6], [], [7, 8, 9]])
    names = {"chosen": "chosen", "rejected": "rejected"}
    table = SequenceTable(path, 3, names)
    assert len(table) == 2
    assert table[[0, 1]]["rejected"].tolist() == [[5, 0, 0], [7, 8, 9]]
    assert table.remarks == [f"{path}: 2 rows are left out, with a sequence of more than 3 tokens or of none"]
    assert pickle.loads(pickle.dumps(table)).sha256 == table.sha256
    with pytest.raises(PatterningError, match=r"t\.parquet row 3: token 9 in column 'rejected', and the model's vocab"):
        table.check_vocabulary(9)
    with pytest.raises(PatterningError, match=r"no sample 2; expected ids from 0 to 1"):
        table[[2]]
    with pytest.raises(PatterningError, match=r"4 rows, none with sequences of 1 to 0 tokens; raise"):
        SequenceTable(path, 0, names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -1], "row 1: label is negative; classes are numbered from 0"),
        ([0, None], "row 1: label is null; give a class"),
        (["a", "b"], "column 'label' holds string; expected whole numbers, the classes"),
    ],
)
def test_what_is_no_class_is_named(tmp_path: Path, labels: list, message: str) -> None:
    path = write(tmp_path / "t.parquet", input_ids=[[1], [2]], label=labels)
    with pytest.raises(PatterningError, match=rf"t\.parquet:? {message}"):
        SequenceTable(path, 2, {"tokens": "input_ids"}, label="label")
    with pytest.raises(PatterningError, match=r"no column 'kind', the class of a row; name it in data.label"):
        SequenceTable(path, 2, {"tokens": "input_ids"}, label="kind")


@pytest.mark.parametrize("pad", [None, 0])
def test_a_fresh_reward_model_is_built_trained_on_and_loaded_again(tmp_path: Path, pad: int | None) -> None:
    architecture = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    model = {"architecture": architecture | ({} if pad is None else {"pad_token_id": pad})}
    task = task_of(tmp_path, pairs(tmp_path), model)
    built, batch = task.build(5), task.train[np.arange(20)]
    assert torch.equal(task.losses(task.build(5), batch), task.losses(built, batch))
    assert not torch.equal(task.losses(task.build(6), batch), task.losses(built, batch))
    assert built.config.num_labels == 1
    loss = task.losses(built, batch).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.parameters())
    (tmp_path / "trained").mkdir()
    task.describe(tmp_path / "trained")
    from safetensors.torch import save_model as save

    save(built, tmp_path / "trained" / "model.safetensors")
    assert torch.equal(task.losses(task.load("trained", Ranks()), batch), task.losses(built, batch))
    names = model_components(task.skeleton())
    assert {"head", "embedding", "layer.1.head.3", "layer.0.kv.1"} <= names.keys()
    assert "unembedding" not in names


def test_a_folder_is_what_it_was_saved_as(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", 1)
    assert type(language_model_skeleton(str(tmp_path / "model"))).__name__ == "LlamaForSequenceClassification"
    with pytest.raises(PatterningError, match="a LlamaForSequenceClassification, which gives classes or scores and no"):
        load_language_model(str(tmp_path / "model"))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(MODELS["llama"](vocab_size=VOCABULARY)).save_pretrained(tmp_path / "causal")
    with pytest.raises(PatterningError, match=r"the weights lack score\.weight: the model was not saved as a sequence"):
        load_language_model(str(tmp_path / "causal"), head="classes")


def test_models_that_do_not_fit_the_data_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2", 2)
    with pytest.raises(PatterningError, match=r"model: gives 2 classes, and for data\.kind pairs it must give one"):
        task_of(tmp_path, pairs(tmp_path))
    table = write(tmp_path / "l.parquet", input_ids=[[1], [2]], label=[0, 2])
    with pytest.raises(PatterningError, match=r"data\.label: class 2 is there, and the model has 2 classes"):
        task_of(tmp_path, {"kind": "labelled", "train": table})


def test_a_model_without_a_pad_gets_one_that_no_sequence_ends_with(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2", 2)
    table = write(tmp_path / "l.parquet", input_ids=[[5, 0], [1], [9, 2, 4]], label=[0, 1, 1])
    assert task_of(tmp_path, {"kind": "labelled", "train": table}).pad == 2
    every = write(tmp_path / "e.parquet", input_ids=[[token] for token in range(VOCABULARY)], label=[0] * VOCABULARY)
    with pytest.raises(PatterningError, match=r"config\.json has no pad_token_id, and sequences end with every token"):
        task_of(tmp_path, {"kind": "labelled", "train": every})


def test_documents_keep_pairs_on_one_side_and_number_what_names_them(tmp_path: Path) -> None:
    names = {"chosen": "chosen", "rejected": "rejected"}
    (tmp_path / "both").mkdir()
    write(tmp_path / "both" / "a.parquet", chosen=CHOSEN, rejected=REJECTED, document=["x", "y"] * 10)
    write(tmp_path / "both" / "b.parquet", chosen=CHOSEN, rejected=REJECTED)
    found = SequenceTable(str(tmp_path / "both"), LENGTH, names).documents
    assert found is not None and len(set(found)) == 22  # two, and every row of the other file
    assert len(set(found[:20:2])) == len(set(found[1:20:2])) == 1
    pq.write_table(
        pa.table({"chosen": CHOSEN, "rejected": REJECTED, "document": [7, None] * 10}), tmp_path / "n.parquet"
    )
    with pytest.raises(PatterningError, match=r"n\.parquet row 1: document is null; name it or remove the column"):
        SequenceTable(str(tmp_path / "n.parquet"), LENGTH, names)
    save_model(tmp_path, "llama", 1)
    data = pairs(tmp_path)
    columns = {"chosen": CHOSEN, "rejected": REJECTED, "document": np.arange(20) // 4}
    data["held_out"] = {name: write(tmp_path / f"{name}.parquet", **columns) for name in ("h", "g")}  # two sets
    task = task_of(tmp_path, data)
    sides = [held_out_ids(task, 1, 100, part) for part in ("observed", "predicted", "realised")]
    seen = [set(ids["h"] // 4) for ids in sides]
    assert all(seen) and sum(map(len, seen)) == 5
    assert all(np.array_equal(ids["h"], ids["g"]) for ids in sides)
    assert task.index(task.held_out["h"], np.array([5, 3]))["document"].tolist() == [1, 0]
    assert "document" not in task.index(task.train, np.array([0]))


def test_outcomes_are_what_metrics_are_means_of(tmp_path: Path) -> None:
    given = save_model(tmp_path, "llama", 1)
    task = task_of(tmp_path, pairs(tmp_path))
    model, ids = task.load("final", Ranks()), {"h": np.arange(5, 15)}
    with torch.no_grad():
        found, margin = task.outcomes(model, ids, Ranks()), (alone(given, CHOSEN) - alone(given, REJECTED))[5:15, 0]
    assert found.keys() == task.metrics.keys()
    assert found["accuracy"].tolist() == (margin > 0).tolist()
    assert np.isnan(found["accuracy_law"]).tolist() == [True, False] * 5
    assert np.isnan(found["accuracy_code"]).tolist() == [False, True] * 5
    with torch.no_grad():
        metrics, all_of_it = task.evaluate(model, Ranks()), held_out_ids(task, 1, 100, "realised")
        outcomes = task.outcomes(model, all_of_it, Ranks())
    assert metrics == {name: pytest.approx(np.nanmean(values)) for name, values in outcomes.items()}


def test_swapped_pairs_prefer_what_was_rejected(tmp_path: Path) -> None:
    given = save_model(tmp_path, "llama", 1)
    task = task_of(tmp_path, pairs(tmp_path))
    swapped = np.arange(20) % 3 == 0
    write_sample_weights(tmp_path / "w.parquet", np.arange(20), None, np.full(20, 0.5), {}, "sample_id", swapped)
    samples, ids = task.weighted_samples(tmp_path / "w.parquet", 1.0), np.array([3, 4, 0, 7, 6])
    margin = (alone(given, CHOSEN) - alone(given, REJECTED)).squeeze(1)[ids]
    signed = torch.where(torch.from_numpy(swapped[ids]), -margin, margin)
    found = task.losses(task.load("final", Ranks()), samples[torch.from_numpy(ids)])
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(signed), rtol=0, atol=3e-6)
    assert task.weighted_samples(tmp_path / "w.parquet", 0.5) is task.train  # 1 - 0.5 * 1.5 is above 0
    table = write(tmp_path / "l.parquet", input_ids=CHOSEN, label=[0, 1] * 10)
    save_model(tmp_path, "llama", 2)
    classes = task_of(tmp_path, {"kind": "labelled", "train": table})
    with pytest.raises(PatterningError, match=r"w\.parquet swaps labels, and samples here have no two to be swapped"):
        classes.weighted_samples(tmp_path / "w.parquet", 1.0)
