"""What several rules of the experiment file say in the same words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
