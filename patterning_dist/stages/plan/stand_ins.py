"""Tables in the place of data that is not there yet, so that a plan needs a model's config.json and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from patterning_dist.config import Config, LabelledConfig, PairsConfig
from patterning_dist.config.data import TableConfig
from patterning_dist.storage.files import write_parquet
from patterning_dist.tasks.held_out import HELD_OUT_PARTS

_TRAIN = 10_000  # samples
_COLUMN = "input_ids"  # where the file names none
_IDS = 16  # token ids, of which any vocabulary has so many


def with_stand_ins(config: Config, folder: Path) -> tuple[Config, list[str]]:
    """The experiment with a table in ``folder`` for every one that is missing, and what is assumed by that."""
    data = config.data
    if not isinstance(data, TableConfig):
        return config, []
    each = [config.sampling.evaluation_sequences, config.training.evaluation_sequences if config.training else 0]
    wanted = {"train": (data.train, _TRAIN)}
    wanted |= {name: (path, len(HELD_OUT_PARTS) * max(each)) for name, path in data.held_out.items()}
    missing = {name: number for name, (path, number) in wanted.items() if not Path(path).exists()}
    made = {}
    for name, number in missing.items():
        made[name] = str(folder / f"{name}.parquet")
        write_parquet(Path(made[name]), pa.table(dict(_columns(data, number))), {}, compression="zstd")
    held_out = {name: made.get(name, path) for name, path in data.held_out.items()}
    changed = data.model_copy(update={"train": made.get("train", data.train), "held_out": held_out})
    notes = [
        f"{wanted[name][0]} (data, {name}) is not there: {number:,} samples of {data.context_length} tokens instead"
        for name, number in missing.items()
    ]
    return config.model_copy(update={"data": changed}), notes


def _columns(data: TableConfig, number: int) -> Iterator[tuple[str, pa.Array]]:
    """Columns of samples of full length."""
    rng = np.random.default_rng(0)
    names: list[str] = [data.chosen, data.rejected] if isinstance(data, PairsConfig) else [data.column or _COLUMN]
    length, prompt = data.context_length, None if isinstance(data, LabelledConfig) else data.prompt
    if prompt is not None:
        names, length = [prompt, *names], max(1, length // 2)
    for name in names:
        tokens = rng.integers(1, _IDS, number * length, dtype=np.int32)
        yield name, pa.ListArray.from_arrays(np.arange(number + 1, dtype=np.int32) * length, tokens)
    if isinstance(data, LabelledConfig):
        yield data.label, pa.array(np.arange(number) % 2)
