"""Score folders and retrain banks in the formats of bergson 2.5 (github.com/EleutherAI/bergson, MIT).

A score folder has ``scores.bin``, a record of (score_q, written_q) for every query q a row, and ``info.json``, which
says how it is laid out. A row is a training sample, or a token loss of one where ``offsets.npy`` says which rows a
sample has. Scores are signed as losses, what helps a query is below 0, but where ``config.yaml`` beside them has a
``score_cfg`` whose ``higher_is_better`` is not false.

A bank has ``subsets.json``, for every subset the samples left *out* of it, and ``retrained/base`` and
``retrained/subset_<i>``, folders of models.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from patterning_dist.errors import PatterningError, first_line
from patterning_dist.storage.files import atomic_path, write_bytes, write_json

_CELL = 8  # bytes of a float32 and its flag, aligned
SUBSETS = "subsets.json"


def write_scores(folder: Path, scores: np.ndarray, offsets: np.ndarray | None = None) -> list[Path]:
    """Write a score folder; returns its files.

    Args:
        folder: made if missing.
        scores: signed as losses [query, row].
        offsets: rows ``offsets[i]`` to ``offsets[i + 1]`` are those of sample i; None: row i is sample i.
    """
    num_queries, num_rows = scores.shape
    cells: dict[str, list[Any]] = {"names": [], "formats": [], "offsets": []}
    for query in range(num_queries):
        for name, kind, shift in (("score", "float32", 0), ("written", "bool", 4)):
            cells["names"].append(f"{name}_{query}")
            cells["formats"].append(kind)
            cells["offsets"].append(query * _CELL + shift)
    layout: Any = {**cells, "itemsize": num_queries * _CELL}
    rows = np.zeros(num_rows, np.dtype(layout))
    for query in range(num_queries):
        rows[f"score_{query}"], rows[f"written_{query}"] = scores[query], True
    write_bytes(folder / "scores.bin", rows.tobytes())
    info = {
        "attribute_tokens": offsets is not None,
        "num_items": num_rows if offsets is None else len(offsets) - 1,
        "num_rows": num_rows,
        "num_scores": num_queries,
        "dtype": layout,
    }
    write_json(folder / "info.json", info)
    if offsets is None:
        return [folder / "info.json", folder / "scores.bin"]
    with atomic_path(folder / "offsets.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.asarray(offsets, np.int64), allow_pickle=False)
    return [folder / "info.json", folder / "scores.bin", folder / "offsets.npy"]


def read_scores(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores signed as losses, float32 [query, row], and the offsets of samples among the rows, None where they are.

    Raises:
        PatterningError: a file is missing or of another shape, scores are of some candidates only, or not all are
            written.
    """
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        layout: Any = {key: info["dtype"][key] for key in ("names", "formats", "offsets", "itemsize")}
        rows = np.fromfile(folder / "scores.bin", np.dtype(layout))
        num_queries, tokens = int(info["num_scores"]), bool(info.get("attribute_tokens"))
        scores = np.stack([rows[f"score_{query}"].astype(np.float32) for query in range(num_queries)])
        written = all(rows[f"written_{query}"].all() for query in range(num_queries))
        offsets = np.load(folder / "offsets.npy", allow_pickle=False) if tokens else None
        complete = len(rows) == info["num_rows"] == (info["num_items"] if offsets is None else offsets[-1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatterningError(
            f"{folder}: no folder of scores ({first_line(error)}); expected info.json and scores.bin as "
            "`bergson score` writes them, in float32, float16 or float64"
        ) from None
    if (folder / "candidates.npy").exists():
        raise PatterningError(f"{folder}: scores of some candidates only; score every training sample")
    if not (written and complete and np.isfinite(scores).all()):
        raise PatterningError(f"{folder}: not all scores are there, or some are not finite; score again")
    return (-scores if _higher_is_better(folder) else scores), offsets


def sample_sums(scores: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """Scores of samples [query, sample], of samples or of their tokens [query, row]."""
    if offsets is None:
        return scores
    sums = np.concatenate([np.zeros((len(scores), 1)), np.cumsum(scores, axis=1, dtype=np.float64)], axis=1)
    return (sums[:, offsets[1:]] - sums[:, offsets[:-1]]).astype(np.float32)


def read_subsets(bank: Path, num_samples: int) -> list[np.ndarray]:
    """Samples that every subset of a bank leaves out.

    Raises:
        PatterningError: it is missing or damaged, has fewer than two subsets, or is of more samples than there are.
    """
    file = bank / SUBSETS
    try:
        found = [np.asarray(ids, np.int64).reshape(-1) for ids in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise PatterningError(
            f"{file}: cannot be read ({first_line(error)}); expected a bank written by `bergson validate` with "
            "save_models, or by this command"
        ) from None
    if len(found) < 2:
        raise PatterningError(f"{file}: {len(found)} subsets; a rank correlation over subsets takes two or more")
    for number, ids in enumerate(found):
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_samples:
            raise PatterningError(
                f"{file}: subset {number} leaves out sample {ids.max()}, and there are {num_samples} training samples; "
                "is this bank of other data?"
            )
    return found


def write_subsets(bank: Path, removed: list[np.ndarray]) -> Path:
    """Write subsets.json; returns it."""
    write_json(bank / SUBSETS, [ids.tolist() for ids in removed])
    return bank / SUBSETS


def write_validation(file: Path, measured: np.ndarray, predicted: np.ndarray) -> Path:
    """Write validation.csv, a row a subset and query.

    Args:
        file: to write.
        measured: loss after training on everything less that without the subset's samples [subset, query], nats.
        predicted: sums of scores over these samples [subset, query].
    """
    with atomic_path(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["subset", "query", "diff", "score_sum"])
        for subset, query in np.ndindex(measured.shape):
            table.writerow([subset, query, float(measured[subset, query]), float(predicted[subset, query])])
    return file


def _higher_is_better(folder: Path) -> bool:
    """Whether scores are signed as influence, see the module."""
    try:
        steps = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["steps"]
        commands = [command or {} for step in steps for command in step.values()]
        settings = [found for command in commands if (found := command.get("score_cfg")) is not None]
        return bool(settings) and settings[0].get("higher_is_better", True)
    except FileNotFoundError:
        return False
    except (OSError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise PatterningError(f"{folder / 'config.yaml'}: cannot be read ({first_line(error)})") from None
