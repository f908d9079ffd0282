"""Where the durable files of a run are kept, addressed by names relative to the run directory."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import write_bytes

if TYPE_CHECKING:  # pyarrow is imported where a URL is opened: the command line stays quick
    from patterning_dist.storage.arrow_store import ArrowStorage

LOCK = ".lock"  # of a run directory, see ``lock.py``
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


class Storage(Protocol):
    """Files that are whole or not there; picklable, so that actors on any node write to the same place."""

    def read(self, name: str) -> bytes:
        """Contents of a file; FileNotFoundError if there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, over whatever is there; PatterningError where that is not possible."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, sorted; none if there is no such folder."""
        ...

    def clear(self, folder: str) -> None:
        """Delete the files directly in a folder, with what writers left half-written when they were killed."""
        ...


@dataclass(frozen=True)
class LocalStorage:
    """A folder that every process of the run sees under the same path."""

    root: Path
    holder: str | None = None  # word of the driver that writes there, in its lock; None: nobody looks

    def confirm(self) -> None:
        """Look whether the folder is still that of the driver that this is written for.

        Raises:
            PatterningError: it was removed, made again, or another driver has it.
        """
        if self.holder is None:
            return
        try:
            found = (self.root / LOCK).read_text(errors="replace").splitlines()
        except OSError as error:
            if error.errno not in _GONE:
                return  # an outage: what is written says so
            found = []
        if self.holder not in found:
            raise PatterningError(
                f"{self.root}: was removed, or made again, under the run that wrote there, which has stopped; run the "
                "same command again"
            )

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self.confirm()
        write_bytes(self.root / name, content)

    def delete(self, name: str) -> None:
        self.confirm()
        (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        directory = self.root / folder
        if not directory.is_dir():
            return []
        return sorted(p.name for p in directory.iterdir() if p.is_file() and not p.name.endswith(".tmp"))

    def clear(self, folder: str) -> None:
        self.confirm()
        directory = self.root / folder
        for file in directory.iterdir() if directory.is_dir() else ():
            if file.is_file():
                file.unlink(missing_ok=True)


def path_or_url(location: str | Path) -> Path | str:
    """A URL as it is (``s3://bucket/run``), anything else as a path."""
    return location if isinstance(location, str) and _URL.match(location) else Path(location)


def open_storage(location: str | Path) -> LocalStorage | ArrowStorage:
    """The storage at a path, or at a URL that pyarrow or fsspec knows."""
    found = path_or_url(location)
    if isinstance(found, Path):
        return LocalStorage(found)
    return open_url(found)


def open_url(url: str) -> ArrowStorage:
    """The storage at a URL."""
    from patterning_dist.storage.arrow_store import ArrowStorage

    return ArrowStorage(url)
