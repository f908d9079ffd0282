"""Signs of progress of this process: whatever computes beats, and whoever watches it sees where it was last.

A beat is a step taken, not an answer: a thread that still runs beside work that hangs changes nothing here. There is no
Ray and no thread in it; ``runtime/watch.py`` sends the count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_beats = 0
_places: list[str] = []


def beat() -> None:
    """A step was taken."""
    global _beats
    _beats += 1


@contextlib.contextmanager
def inside(place: str) -> Iterator[None]:
    """What is within this is done at a place, named for the user: ``draw 17``, and in it ``observable norm``.

    An exception that leaves it keeps the place that it was raised at, see ``raised_in``.
    """
    _places.append(place)
    beat()
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("_raised_in", where())
        raise
    finally:
        _places.pop()
        beat()


def where() -> str:
    """The places that this process is in, from the outermost in."""
    return ", ".join(_places)


def raised_in(error: BaseException) -> str:
    """The places that an exception was raised in; empty where it came through none."""
    return str(error.__dict__.get("_raised_in", ""))


def state() -> tuple[int, str]:
    """Beats so far, and ``where``."""
    return _beats, where()
