"""What several rules of the experiment file say in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path


def repeated(values: Sequence[object]) -> list[object]:
    """What is there more than once."""
    return sorted({value for value in values if values.count(value) > 1}, key=str)


def listed(names: Sequence[object]) -> str:
    """Names for a message."""
    return ", ".join(map(str, names))


def divides(batch_key: str, batch: int, workers_key: str, workers: int) -> Iterator[str]:
    """A global batch that ranks cannot share alike."""
    if batch % workers:
        yield f"{workers_key}: {workers} ranks do not divide {batch_key} = {batch}; change one of the two"


def zero_stage(key: str, path: Path | None, optimizer: str) -> Iterator[str]:
    """A DeepSpeed file that cannot be read, or does not go with the optimizer."""
    if path is None:
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        stage = int(settings.get("zero_optimization", {}).get("stage", 0))
    except OSError as error:
        yield f"{key}: cannot read {path} ({error.strerror}); give the path of a DeepSpeed JSON file"
    except (ValueError, AttributeError, TypeError) as error:
        yield f"{key}: {path} is not a DeepSpeed JSON file ({error})"
    else:
        if optimizer == "muon" and stage >= 1:
            yield (
                f"{key}: {path} asks for ZeRO stage {stage}, which splits the matrices that muon needs; "
                "set training.optimizer to adamw or zero_optimization.stage to 0"
            )
