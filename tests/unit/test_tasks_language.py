"""A padded, labelled or packed table has the losses, means and gradients of its texts one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from small_tokenizer import save_tokenizer
from torch import Tensor, nn

from patterning_dist.config import Config, load_config
from patterning_dist.data.sampler import distinct_minibatch
from patterning_dist.errors import PatterningError
from patterning_dist.measure.plans import _indices
from patterning_dist.measure.preflight import preflight
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.models.components import select_component
from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.samples import Joined, Part
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.language import LanguageTask
from patterning_dist.tasks.open import open_task

VOCABULARY, LENGTH, PAD = 64, 16, 63
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "gpt_neox": lambda **more: transformers.GPTNeoXConfig(**SIZES, **more),
    "llama": lambda **more: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **more),
    "gpt2": lambda **more: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **more),
}
RNG = np.random.default_rng(7)
TEXTS = [RNG.integers(PAD, size=length).tolist() for length in RNG.integers(3, LENGTH + 1, 24)]


def save_model(folder: Path, kind: str, **more: object) -> Path:
    torch.manual_seed(1)
    config = MODELS[kind](
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, **more
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder / "model")
    return folder


def settings(folder: Path, **data: object) -> Config:
    import yaml

    tables = {"kind": "tokens", "train": str(folder / "t.parquet"), "context_length": LENGTH} | data
    sampling = {
        "components": [{"name": "everything"}],
        "num_chains": 2,
        "num_draws": 100,
        "burn_in": 0,
        "steps_between_draws": 1,
        "inverse_temperature": 100,
        "localization": 100,
        "step_size": 1e-4,
        "batch_size": 4,
        "probe_sequences": 4,
        "observables": [{"kind": "component_loss", "name": "component"}],
    }
    file = folder / "run.yaml"
    model = {"kind": "huggingface", "path": str(folder / "model")}
    written = {"name": "t", "seed": 1, "device": "cpu", "model": model, "data": tables, "sampling": sampling}
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    return load_config(file)


def task_of(folder: Path, rows: list, columns: dict | None = None, **data: object) -> LanguageTask:
    pq.write_table(pa.table({"input_ids": rows, **(columns or {})}), folder / "t.parquet")
    return open_task(settings(folder, **data), folder, "cpu")


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(tmp_path, request.param)


def one_by_one(model: nn.Module, texts: list[list[int]]) -> list[Tensor]:
    """Losses of every text by itself: no pads, no other document."""
    rows = [torch.tensor([text]) for text in texts]
    return [token_losses(model(input_ids=row[:, :-1]).logits, row)[0] for row in rows]


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("kind", ["short rows", "right", "left", "pad token"])
def test_padding_changes_nothing(folder: Path, kind: str) -> None:
    pads = [[PAD] * (LENGTH - len(text)) for text in TEXTS]
    rows = [pad + text if kind == "left" else text + pad for text, pad in zip(TEXTS, pads, strict=True)]
    ones = [[1] * len(text) + [0] * len(pad) for text, pad in zip(TEXTS, pads, strict=True)]
    ones = [mask[::-1] for mask in ones] if kind == "left" else ones
    if kind == "pad token":  # known from config.json
        save_model(folder, "llama", pad_token_id=PAD)
    masked = {} if kind == "pad token" else {"attention_mask": ones}
    task = task_of(folder, TEXTS, {}) if kind == "short rows" else task_of(folder, rows, masked)
    model = task.load("final", Ranks())
    alone = one_by_one(model, TEXTS)
    losses = task.losses(model, task.train[np.arange(len(TEXTS))])
    counted = task.counted(task.train, np.arange(len(TEXTS)))
    assert counted.sum(axis=1).tolist() == [len(text) - 1 for text in TEXTS]
    torch.testing.assert_close(losses[counted], torch.cat(alone), rtol=0, atol=2e-6)
    assert not losses[~counted].any()
    # The mean that the chains take, over the whole table and over minibatches.
    assert task.mean_counted == np.mean([len(text) - 1 for text in TEXTS])
    whole = losses.sum() / (len(TEXTS) * task.mean_counted)
    wanted = torch.cat(alone).mean()
    assert whole.item() == pytest.approx(wanted.item(), abs=1e-6)
    difference = gradient(whole, model) - gradient(wanted, model)
    assert difference.norm() < 1e-5 * gradient(torch.cat(one_by_one(model, TEXTS)).mean(), model).norm()


class Engine(nn.Module):
    """What DeepSpeed's is to a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, module.config

    def forward(self, **arguments: object) -> object:
        return self.module(**arguments)


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_head_its_columns_of_the_output_projection_are_zero(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind)
    task = task_of(tmp_path, TEXTS)
    model, tokens = task.load("final", Ranks()), torch.tensor([TEXTS[0]])
    head = select_component(model, "layer.1.head.2")
    output = next(name for name in head.parameters if name.endswith(("dense.weight", "o_proj.weight", "c_proj.weight")))
    with torch.no_grad():
        whole = task.model.token_losses(model, tokens)
        found = [task.model.without_head(1, 2)(one, tokens) for one in (model, Engine(model))]
        assert torch.equal(task.model.token_losses(model, tokens), whole)  # nothing is left behind
        [piece] = [piece for piece in head.pieces if piece.parameter == output]
        piece.view(model.get_parameter(output)).zero_()
        for losses in found:
            torch.testing.assert_close(losses, task.model.token_losses(model, tokens), rtol=1e-5, atol=1e-5)
    assert (found[0] - whole).abs().max() > 0.01
    assert task.model.without_head(2, 0) is None  # there is no such layer


def test_heads_that_are_not_known_are_not_ablated(tmp_path: Path) -> None:
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert task_of(tmp_path, TEXTS).model.without_head(0, 0) is None


def test_the_mean_of_minibatches_is_that_of_the_table(tmp_path: Path) -> None:
    """The number of entries in the denominator is that of the table: with the minibatch's own, texts of few tokens
    would weigh more. Deterministic: the draws are counter-based; the bound is four standard errors."""
    task = task_of(save_model(tmp_path, "llama"), TEXTS)
    model = task.load("final", Ranks())
    with torch.no_grad():
        losses = task.losses(model, task.train[np.arange(len(TEXTS))]).double().numpy()
    mean = losses.sum() / sum(len(text) - 1 for text in TEXTS)
    ids = [distinct_minibatch(3, 1, step, 4, len(TEXTS)) for step in range(20_000)]
    estimates = losses.sum(axis=1)[np.stack(ids)].sum(axis=1) / (4 * task.mean_counted)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - mean) < 4 * error
    assert error < 0.003 * mean


def test_packed_documents_are_as_if_alone(folder: Path) -> None:
    rows, segments, positions = [], [], []
    for first, second in zip(TEXTS[::2], TEXTS[1::2], strict=True):
        second = second[: LENGTH - len(first)]
        pads = LENGTH - len(first) - len(second)
        rows.append(first + second + [PAD] * pads)
        segments.append([1] * len(first) + [2] * len(second) + [0] * pads)
        positions.append([*range(len(first)), *range(len(second)), *[0] * pads])
    documents = [
        [t for t, s in zip(row, seg, strict=True) if s == n]
        for row, seg in zip(rows, segments, strict=True)
        for n in (1, 2)
    ]
    task = task_of(folder, rows, {"segment_ids": segments})
    model = task.load("final", Ranks())
    alone = torch.cat([one for text in documents if len(text) > 1 for one in one_by_one(model, [text])])
    losses = task.losses(model, task.train[np.arange(len(rows))])
    counted = task.counted(task.train, np.arange(len(rows)))
    torch.testing.assert_close(losses[counted], alone, rtol=0, atol=2e-6)
    mask = [[int(s > 0) for s in row] for row in segments]
    by_position = task_of(folder, rows, {"position_ids": positions, "attention_mask": mask})
    assert by_position.train.sha256 == task.train.sha256


def test_packed_documents_need_an_architecture_that_keeps_them_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bloom = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    transformers.BloomForCausalLM(bloom).save_pretrained(tmp_path / "model")
    task = task_of(tmp_path, [[1, 2, 3, 4]], {"segment_ids": [[1, 1, 2, 2]]})
    message = "the data is packed, several documents a row, and BloomForCausalLM lets them see each other; give rows of"
    with pytest.raises(PatterningError, match=message):
        task.losses(task.load("final", Ranks()), task.train[[0]])


def test_labels_leave_the_prompt_out(folder: Path) -> None:
    labels = [[-100] * (len(text) // 2) + text[len(text) // 2 :] for text in TEXTS]
    task = task_of(folder, TEXTS, {"labels": labels})
    model = task.load("final", Ranks())
    wanted = [one[max(len(text) // 2 - 1, 0) :] for text, one in zip(TEXTS, one_by_one(model, TEXTS), strict=True)]
    losses, counted = task.losses(model, task.train[np.arange(24)]), task.counted(task.train, np.arange(24))
    torch.testing.assert_close(losses[counted], torch.cat(wanted), rtol=0, atol=2e-6)
    assert task.mean_counted == sum(map(len, wanted)) / 24


def test_sets_with_and_without_masks_are_evaluated_together(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt_neox")
    held_out = {}
    for name, rows in (("whole", [[5] * LENGTH, [6] * LENGTH]), ("short", [[1, 2, 3], [4, 5]])):
        rows = [row for row in rows for _ in range(3)]  # one for each part of the held-out samples
        domains = [str(number // 3) for number in range(6)]
        pq.write_table(pa.table({"input_ids": rows, "domain": domains}), tmp_path / f"{name}.parquet")
        held_out[name] = str(tmp_path / f"{name}.parquet")
    task = task_of(tmp_path, [[1] * LENGTH], held_out=held_out)
    model = task.load("final", Ranks())
    batch = Joined([*task.held_out.values(), task.own_split("repeated_sequence", 1)[0]])[torch.tensor([1, 6, 12])]
    assert batch["counted"].sum(dim=1).tolist() == [15, 2, 15]
    with torch.no_grad():
        alone = torch.cat(one_by_one(model, [[5] * LENGTH, [6] * LENGTH, [1, 2, 3], [4, 5]]))
        assert task.evaluate(model, Ranks())["validation_loss"] == pytest.approx(alone.mean().item(), abs=1e-6)


@pytest.mark.parametrize(("vocabulary", "length"), [(4, 16), (7, 4), (64, 5), (64, 2)])
def test_small_vocabularies_and_few_positions_work(tmp_path: Path, vocabulary: int, length: int) -> None:
    torch.manual_seed(0)
    config = MODELS["gpt2"](vocab_size=vocabulary, max_position_embeddings=length, bos_token_id=None, eos_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    rows = [[token % vocabulary for token in range(length)]]
    pq.write_table(pa.table({"input_ids": rows * 3}), tmp_path / "h.parquet")
    task = task_of(tmp_path, rows, context_length=length, held_out={"h": str(tmp_path / "h.parquet")})
    found = task.evaluate(task.load("final", Ranks()), Ranks())
    assert all(np.isfinite(list(found.values())))
    assert "validation_loss" in found


def test_a_chain_on_padded_rows_sees_what_one_on_unpadded_rows_sees(tmp_path: Path) -> None:
    """Rows of 10 tokens, in blocks of 10 and, padded, of 16: gradients of minibatches, curvature, columns and means."""
    save_model(tmp_path, "llama")
    rows = [RNG.integers(PAD, size=10).tolist() for _ in range(12)]
    targets = []
    for length in (10, LENGTH):
        task = task_of(tmp_path, rows, context_length=length)
        model, probe = task.load("final", Ranks()), np.arange(5)
        component = select_component(model, "layer.1.head.2+layer.0.mlp")
        targets.append(
            Target(
                model,
                component,
                task.losses,
                task.train,
                Part(task.train, probe),
                num_component_losses=1,
                counted=task.counted(task.train, probe),
                mean_counted=task.mean_counted,
            )
        )
    plain, padded = targets
    for ids in (np.array([3, 3, 7]), np.arange(12)):
        (loss, gradient_of), (same, gradient_too) = plain.gradient(ids), padded.gradient(ids)
        assert same == pytest.approx(loss, abs=1e-6)
        for name, g in gradient_of.items():
            assert (g - gradient_too[name]).norm() <= 1e-5 * g.norm()
    one, other = plain.measure(), padded.measure()
    assert other.losses.shape == (5 * 9 + 5,)  # no column for a pad
    torch.testing.assert_close(other.losses, one.losses, rtol=0, atol=2e-6)
    assert other.mean_loss == pytest.approx(one.mean_loss, abs=1e-6)
    vector = {name: torch.ones_like(w) for name, w in plain.center.items()}
    products = [t.hessian_product(t.prepare(t.data), vector) for t in targets]
    for name, product in products[0].items():
        assert (product - products[1][name]).norm() <= 1e-3 * product.norm()


def test_prompts_and_completions_have_the_losses_of_the_completions(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "model")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=300, max_position_embeddings=LENGTH)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    rows = [("what is it", " yes"), ("no", " it is no"), ("is the answer", " maybe it is no")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    experiment = settings(tmp_path, train=str(tmp_path / "t.jsonl"))
    said = preflight(experiment.model_copy(update={"device": "cpu"}), tmp_path)
    assert said == [
        f"{tmp_path}/t.jsonl: prompt + completion encoded with the tokenizer of {tmp_path}/model; no loss on prompt"
    ]
    task = open_task(experiment, tmp_path, "cpu")
    model = task.load("final", Ranks())
    texts = [tokenizer(f"{p}{c}</s>").input_ids for p, c in rows]
    starts = [len(tokenizer(p).input_ids) - 1 for p, _ in rows]
    alone = [losses[start:] for losses, start in zip(one_by_one(model, texts), starts, strict=True)]
    losses, counted = task.losses(model, task.train[np.arange(3)]), task.counted(task.train, np.arange(3))
    assert counted.sum(axis=1).tolist() == [len(found) for found in alone]
    torch.testing.assert_close(losses[counted], torch.cat(alone), rtol=0, atol=2e-6)
    assert not losses[~counted].any()
    assert losses.sum().item() / (3 * task.mean_counted) == pytest.approx(torch.cat(alone).mean().item(), abs=1e-6)
    other = settings(tmp_path, train=str(tmp_path / "t.jsonl"), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(
        PatterningError, match=r"nowhere: its tokenizer cannot be read .*; name another in data\.tokenizer"
    ):
        open_task(other, tmp_path, "cpu")
    pq.write_table(pa.table({"input_ids": texts}), tmp_path / "t.parquet")
    other = settings(tmp_path, tokenizer=str(tmp_path / "nowhere"))
    assert preflight(other, tmp_path) == ["data.tokenizer: has no effect, since the tables hold token ids"]


def test_tables_are_of_the_losses_that_count_and_say_how_many_a_sample_has(tmp_path: Path) -> None:
    labels = [[-100] * 2 + text[2:] for text in TEXTS]
    task = task_of(save_model(tmp_path, "llama"), TEXTS, {"labels": labels})
    sampling = settings(tmp_path).sampling
    subjects = Subjects(task, sampling, 1, tmp_path, {"": Subject("final", "everything", stream="")})
    entries, samples = _indices(subjects)
    texts = [TEXTS[row] for row in np.flatnonzero([len(text) > 2 for text in TEXTS])[subjects.probe.ids]]
    assert samples["num_losses"].tolist() == [len(text) - 2 for text in texts]
    assert entries["token"].tolist() == [token for text in texts for token in text[2:]]
    assert entries["position"].tolist() == [position for text in texts for position in range(2, len(text))]
