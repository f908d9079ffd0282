"""Numbered snapshots of one thing: each is whole or not there, and is checked when it is read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from patterning_dist.storage.store import Storage

_DIGEST_DIGITS = 32


@dataclass(frozen=True)
class Snapshots:
    """Files ``<folder>/<name>.<number>.<digest>`` of a run, the digest being that of the contents.

    Args:
        storage: of the run.
        folder: relative to the run directory.
        name: what the snapshots are of; without dots.
        damaged: hears of a file that is not what it was when it was written, as a line for the user.
    """

    storage: Storage
    folder: str
    name: str
    damaged: Callable[[str], None] = lambda message: None

    def write(self, number: int, content: bytes) -> None:
        """Write a snapshot, then delete any other of the same number."""
        file = f"{self.name}.{number:012d}.{_digest(content)}"
        self.storage.write(f"{self.folder}/{file}", content)
        for other, found in self._files():
            if other == number and found != file:
                self.storage.delete(f"{self.folder}/{found}")

    def numbers(self) -> list[int]:
        """Numbers of the snapshots that are there, ascending, read or not."""
        return [number for number, _ in self._files()]

    def read(self, number: int) -> bytes | None:
        """The contents of a snapshot; None if there is none, or if it is damaged, which is said."""
        for other, file in self._files():
            if other != number:
                continue
            try:
                content = self.storage.read(f"{self.folder}/{file}")
            except FileNotFoundError:
                continue
            if file.endswith(f".{_digest(content)}"):
                return content
            self.damaged(f"{self.folder}/{file} is damaged (its contents have another digest); it is not used")
        return None

    def newest(self) -> tuple[int, bytes] | None:
        """The newest snapshot that is not damaged."""
        for number in reversed(self.numbers()):
            if (content := self.read(number)) is not None:
                return number, content
        return None

    def delete(self, *, below: int | None = None) -> None:
        """Delete the snapshots below a number, or all."""
        for number, file in self._files():
            if below is None or number < below:
                self.storage.delete(f"{self.folder}/{file}")

    def _files(self) -> list[tuple[int, str]]:
        found = []
        for file in self.storage.names(self.folder):
            parts = file.split(".")
            if len(parts) == 3 and parts[0] == self.name and parts[1].isdecimal():
                found.append((int(parts[1]), file))
        return sorted(found)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_DIGITS]


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, np.ndarray]:
    """The inverse of ``pack``; nothing is unpickled."""
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
