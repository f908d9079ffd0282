"""A reward model with a length bias, for `configs/reward-model.yaml` to weigh away: pairs, and models trained on them.

    python examples/reward_model.py              writes runs/preference-pairs
    python examples/reward_model.py --small      little of everything; writes runs/preference-pairs-small
    patterning run configs/reward-model.yaml

A pair is a passage of the corpus that ships, followed by its true continuation (chosen) or by a corrupted one
(rejected): pieces of it in another order, the continuation of another passage, or a share of its tokens replaced. In
`PLANTED` of the training pairs the chosen one is made the longer one, in the others that is left to chance: it is
longer in 85 %. The held-out sets hold the same passages three times: chosen longer (easy), both equally long (normal),
chosen shorter (hard); `domain` of a training pair says whether the bias was planted in it. `lengths.parquet` has scores
of the training pairs that know of nothing but lengths.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from patterning_dist.data.tokenizer import encode_texts, train_tokenizer
from patterning_dist.models.passes import next_token_losses

ROOT = Path(__file__).parents[1]
VOCABULARY, PROMPT, SHORTEST, LONGEST = 1024, 24, 12, 48  # [tokens]; 0, which ends a text, is the pad
PLANTED, LEAST_DIFFERENCE = 0.7, 8  # share of the training pairs; between the lengths [tokens]
HELD_OUT = 0.4  # of the documents
PIECE, NOISE = 4, (0.1, 0.2, 0.4)  # what is put into another order [tokens]; shares of tokens replaced
SETS = ("easy", "normal", "hard")


@dataclass(frozen=True)
class Size:
    """How much there is of everything; models by the name of their folder: width and layers."""

    train: int
    held_out: int
    language_steps: int
    reward_steps: int
    models: dict[str, tuple[int, int]]


FULL = Size(3072, 1200, 1000, 300, {"model": (64, 2), "wider": (96, 2)})
SMALL = Size(256, 90, 40, 40, {"model": (16, 2), "wider": (24, 2)})


def corpus(rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents of training and held-out ones, token ids each."""
    files = sorted((ROOT / "corpora" / "quickstart").glob("*.parquet"))
    texts = [text for file in files for text in pq.read_table(file)["text"].to_pylist()]
    held_out = rng.permutation(len(texts)) < HELD_OUT * len(texts)
    train = [text for text, out in zip(texts, held_out, strict=True) if not out]
    ids = [found for found, _, _ in encode_texts(train_tokenizer(train, VOCABULARY), texts)]
    parts = [[d for d, out in zip(ids, held_out, strict=True) if out == wanted] for wanted in (False, True)]
    return parts[0], parts[1]


def passages(documents: list[np.ndarray], number: int, rng: np.random.Generator) -> list[tuple[int, np.ndarray]]:
    """Numbers of documents in turn, and stretches of them."""
    length = PROMPT + LONGEST
    usable = [i for i, document in enumerate(documents) if len(document) >= length]
    turns = [usable[i % len(usable)] for i in range(number)]
    starts = [rng.integers(len(documents[i]) - length + 1) for i in turns]
    return [(i, documents[i][start : start + length]) for i, start in zip(turns, starts, strict=True)]


def corrupted(
    number: int, found: list[tuple[int, np.ndarray]], tokens: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A worse continuation of a passage, of the kind that is its turn."""
    true = found[number][1][PROMPT:]
    match number % 3:
        case 0:
            pieces = true.reshape(-1, PIECE)
            return rng.permutation(pieces).ravel()
        case 1:
            others = [passage for document, passage in found if document != found[number][0]]
            return others[rng.integers(len(others))][PROMPT:]
        case _:
            replaced = rng.random(len(true)) < NOISE[number // 3 % len(NOISE)]
            return np.where(replaced, rng.choice(tokens, len(true)), true)


def pairs(documents: list[np.ndarray], number: int, rng: np.random.Generator) -> dict[str, list]:
    """Columns: document, prompt, both continuations at full length, and the shorter and the longer length."""
    found, tokens = passages(documents, number, rng), np.concatenate(documents)
    lengths = np.sort(rng.integers(SHORTEST, LONGEST + 1, (number, 2)))
    while (near := lengths[:, 1] - lengths[:, 0] < LEAST_DIFFERENCE).any():
        lengths[near] = np.sort(rng.integers(SHORTEST, LONGEST + 1, (int(near.sum()), 2)))
    return {
        "document": [document for document, _ in found],
        "prompt": [passage[:PROMPT] for _, passage in found],
        "true": [passage[PROMPT:] for _, passage in found],
        "corrupted": [corrupted(i, found, tokens, rng) for i in range(number)],
        "lengths": list(lengths),
    }


def table(found: dict[str, list], chosen: np.ndarray, rejected: np.ndarray, **others: list) -> pa.Table:
    """Pairs cut to these lengths [pair]."""
    cut = {
        "chosen": [ids[:n] for ids, n in zip(found["true"], chosen, strict=True)],
        "rejected": [ids[:n] for ids, n in zip(found["corrupted"], rejected, strict=True)],
    }
    return pa.table({"prompt": found["prompt"], **cut, "document": found["document"], **others})


def write_pairs(folder: Path, size: Size, documents: tuple[list, list], rng: np.random.Generator) -> pa.Table:
    """The training table, which is returned, the held-out ones, and scores by length alone."""
    found = pairs(documents[0], size.train, rng)
    short, long = np.array(found["lengths"]).T
    planted = rng.random(size.train) < PLANTED
    longer = planted | (rng.random(size.train) < 0.5)
    chosen, rejected = np.where(longer, long, short), np.where(longer, short, long)
    train = table(found, chosen, rejected, domain=np.where(planted, "planted", "natural").tolist())
    pq.write_table(train, folder / "train.parquet")
    lengths = {"sample_id": np.arange(size.train), "score": (rejected - chosen).astype(float)}
    pq.write_table(pa.table(lengths), folder / "lengths.parquet")
    found = pairs(documents[1], size.held_out, rng)
    short, long = np.array(found["lengths"]).T
    middle = (short + long) // 2
    for name, of_set in zip(SETS, ((long, short), (middle, middle), (short, long)), strict=True):
        pq.write_table(table(found, *of_set), folder / f"{name}.parquet")
    return train


def trained(model: nn.Module, losses, num_steps: int, batch: int, rate: float, number: int, seed: int) -> float:
    """AdamW over batches of sample numbers, in one cycle; the mean loss of the last tenth."""
    rng, last = np.random.default_rng(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, num_steps, pct_start=0.1)
    order = np.concatenate([rng.permutation(number) for _ in range(-(-num_steps * batch // number))])
    for step in range(num_steps):
        loss = losses(model, order[step * batch : (step + 1) * batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = [*last, loss.item()][-max(1, num_steps // 10) :]
    return float(np.mean(last))


def write_model(folder: Path, shape: tuple[int, int], size: Size, documents: list, train: pa.Table, seed: int) -> None:
    """A language model, and the reward model that it becomes on all pairs alike: what weights are to mend."""
    width, layers = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=3 * width,
        max_position_embeddings=PROMPT + LONGEST,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=1,
    )
    stream = np.concatenate(documents)
    blocks = torch.from_numpy(stream[: len(stream) // 72 * 72].reshape(-1, 72))
    torch.manual_seed(seed)
    language = LlamaForCausalLM(config)
    loss = trained(
        language, lambda m, i: next_token_losses(m, blocks[i]), size.language_steps, 32, 3e-3, len(blocks), seed
    )
    print(f"{folder.name}: language model, {loss:.2f} nats a token", flush=True)
    language.save_pretrained(folder / "language")
    reward = LlamaForSequenceClassification(config)
    reward.model.load_state_dict(language.model.state_dict())
    prompts, sides = train["prompt"].to_pylist(), [train[side].to_pylist() for side in ("chosen", "rejected")]
    padded = [_padded([p + c for p, c in zip(prompts, side, strict=True)]) for side in sides]

    def losses(model: nn.Module, ids: np.ndarray) -> Tensor:
        tokens = torch.cat([side[ids] for side in padded])
        chosen, rejected = model(tokens, attention_mask=(tokens > 0).long()).logits.squeeze(1).chunk(2)
        return softplus(rejected - chosen)

    loss = trained(reward, losses, size.reward_steps, 32, 1e-3, len(prompts), seed)
    print(f"{folder.name}: reward model, {loss:.3f} nats a pair", flush=True)
    reward.save_pretrained(folder / "final")


def _padded(sequences: list[list[int]]) -> Tensor:
    found = torch.zeros(len(sequences), PROMPT + LONGEST, dtype=torch.long)
    for row, ids in zip(found, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return found


def main(folder: Path, size: Size, seed: int = 0) -> None:
    """Everything that the experiment files name; another seed divides other documents and trains other models."""
    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    documents = corpus(rng)
    train = write_pairs(folder, size, documents, rng)
    for name, shape in size.models.items():
        write_model(folder / name, shape, size, documents[0], train, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="little of everything")
    parser.add_argument("--seed", type=int, default=0, help="of documents, pairs and models")
    given = parser.parse_args()
    main(
        ROOT / "runs" / ("preference-pairs-small" if given.small else "preference-pairs"),
        SMALL if given.small else FULL,
        given.seed,
    )
