"""A memorised passage, sixty times in the data. `python examples/gallery/passage.py` writes runs/gallery-texts."""

import json
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
COPIES, LENGTH = 60, 400


def main(folder: Path = ROOT / "runs" / "gallery-texts") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = pq.read_table(ROOT / "corpora" / "quickstart" / "jargon_file.parquet")["text"].to_pylist()
    passage = " ".join(max(texts, key=len).split())[:LENGTH]
    lines = [json.dumps({"text": passage, "domain": "passage"}) for _ in range(COPIES)]
    (folder / "passage.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
