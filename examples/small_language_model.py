"""Train a small GPT-NeoX on prose and code, so that there is something for `configs/study-small.yaml` to study.

    python examples/small_language_model.py          about a minute; writes runs/small-language-model
    patterning study configs/study-small.yaml

It is the model class of Pythia, on bytes instead of a tokenizer's tokens, with a checkpoint on the way. A model of
yours takes its place as a folder written by `save_pretrained`, or by its name on the hub.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils.logging import disable_progress_bar

from patterning_dist.models.passes import next_token_losses

ROOT = Path(__file__).parents[1]
SOURCES = {"prose": "austen", "code": "python_library"}  # domain -> file in corpora/quickstart
CONTEXT_LENGTH, NUM_STEPS, HELD_OUT = 64, 1500, 256


def blocks(name: str) -> np.ndarray:
    """The text of a corpus as bytes [block, position]."""
    text = "\n".join(pq.read_table(ROOT / "corpora" / "quickstart" / f"{name}.parquet")["text"].to_pylist())
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return tokens[: len(tokens) // CONTEXT_LENGTH * CONTEXT_LENGTH].reshape(-1, CONTEXT_LENGTH)


def write(path: Path, tokens: np.ndarray, domains: list[str]) -> None:
    """A table of token ids as any tokenizer may leave behind: one list a row."""
    pq.write_table(pa.table({"input_ids": list(tokens), "domain": domains}), path)


def main(folder: Path = ROOT / "runs" / "small-language-model", num_steps: int = NUM_STEPS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    corpora = {domain: generator.permutation(blocks(name)) for domain, name in SOURCES.items()}
    train = np.concatenate([tokens[HELD_OUT:] for tokens in corpora.values()])
    domains = [domain for domain, tokens in corpora.items() for _ in tokens[HELD_OUT:]]
    write(folder / "train.parquet", train, domains)
    for domain, tokens in corpora.items():
        write(folder / f"{domain}.parquet", tokens[:HELD_OUT], [domain] * HELD_OUT)

    disable_progress_bar()
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps, pct_start=0.1)
    for step in range(1, num_steps + 1):
        batch = torch.from_numpy(train[generator.integers(len(train), size=16)])
        loss = next_token_losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (num_steps // 4, num_steps):
            name = "early" if step < num_steps else "final"
            model.save_pretrained(folder / "model" / name)
            print(f"step {step}: loss {loss.item():.2f} nats a byte, saved as {folder / 'model' / name}", flush=True)


if __name__ == "__main__":
    main()
