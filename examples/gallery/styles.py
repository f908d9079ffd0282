"""Two ways to go on from the same words, mixed in training without a label; learn one and not the other.

    python examples/gallery/styles.py           writes runs/gallery-styles-data
    patterning run examples/gallery/styles.yaml
    python examples/gallery/styles.py --judge   how well the weights tell the two apart, which nothing was told

A sample is half a verse and the other half, either as it stands or with its words in the opposite order. Both ways have
the same words, so no list of tokens names one of them: what is wanted is what the model does with held-out verses.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
DATA, RUN = ROOT / "runs" / "gallery-styles-data", ROOT / "runs" / "gallery-styles"
NUM_TRAIN, NUM_HELD_OUT, WORDS = 3000, 240, (8, 20)


def prefers_straight(columns):  # the observable: loss of the straight continuation less that of the reversed one
    return np.where(columns["domain"] == "straight", 1, -1)


def verses():
    text = " ".join(pq.read_table(ROOT / "corpora" / "quickstart" / "bible.parquet")["text"].to_pylist())
    sentences = [sentence.split() for sentence in text.replace(":", ".").replace(";", ".").split(".")]
    found = dict.fromkeys(" ".join(words) for words in sentences if WORDS[0] <= len(words) <= WORDS[1])
    return [verse.split() for verse in np.random.default_rng(0).permutation(list(found))]


def sample(words, reverse):
    half = len(words) // 2
    rest = words[:half:-1] if reverse else words[half + 1 :]
    return {"prompt": " ".join(words[: half + 1]), "completion": " " + " ".join(rest)}


def write(name, rows):
    (DATA / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    DATA.mkdir(parents=True, exist_ok=True)
    found = verses()[: NUM_TRAIN + NUM_HELD_OUT]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        map(" ".join, found), trainers.BpeTrainer(vocab_size=1024, special_tokens=["[END]", "[UNK]"])
    )
    tokenizer.save(str(DATA / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[END]", "unk_token": "[UNK]"}
    (DATA / "tokenizer_config.json").write_text(json.dumps(settings))
    reverse = np.random.default_rng(1).random(NUM_TRAIN) < 0.5
    write("train.jsonl", [sample(words, r) for words, r in zip(found, reverse, strict=False)])
    for name, r in (("straight", False), ("reversed", True)):
        write(f"{name}.jsonl", [sample(words, r) for words in found[NUM_TRAIN:]])
    np.save(DATA / "reverse.npy", reverse)  # read by judge alone


def judge():
    table = pq.read_table(RUN / "weights" / "plus.parquet").to_pandas().groupby("sequence_id")["weight"].mean()
    reverse = np.load(DATA / "reverse.npy")[table.index]
    area = roc_auc_score(~reverse, table)
    print(f"weights tell straight from reversed samples with an area under the curve of {area:.3f}")


if __name__ == "__main__":
    judge() if "--judge" in sys.argv else main()
