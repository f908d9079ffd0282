"""Where a run is kept, and the copy of it that a node works on: the same folder, or one filled from a URL."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import explained, write_json
from patterning_dist.storage.store import LocalStorage, Storage, open_url, path_or_url

if TYPE_CHECKING:  # as in store.py
    from patterning_dist.storage.arrow_store import ArrowStorage

_LOCK, _RECORD = ".sync.lock", ".sync.json"
_CONNECTIONS = 8
_PATIENCE = 3600.0  # for another process of this node that copies [s]

# Name -> [stamp at the URL, size and time of the local file] when the two were last the same.
Record = dict[str, list[str | int]]


@dataclass(frozen=True)
class Location:
    """The location of a run, for processes on any node.

    With a URL, what counts is what is published there; the working copy can be deleted at any time.

    Attributes:
        path: a local folder: the run directory itself, or this node's working copy (at the same path on every node).
        url: where the run is kept, if that is no folder.
        holder: word of the driver that has the folder; whoever writes there looks for it first.
    """

    path: Path
    url: str | None = None
    holder: str | None = field(default=None, compare=False)

    @staticmethod
    def at(location: str | Path) -> Location:
        """The location behind a path or a URL; working copies are in $PATTERNING_CACHE or ~/.cache/patterning."""
        found = path_or_url(location)
        if isinstance(found, Path):
            return Location(found.absolute())  # workers are started elsewhere
        cache = Path(os.environ.get("PATTERNING_CACHE") or Path.home() / ".cache" / "patterning")
        return Location(cache.absolute() / hashlib.sha256(found.encode()).hexdigest()[:16], found)

    def __str__(self) -> str:
        return str(self.path if self.url is None else self.storage)

    @property
    def storage(self) -> Storage:
        """The durable files, by name."""
        return LocalStorage(self.path, self.holder) if self.url is None else open_url(self.url)

    def confirm(self) -> None:
        """Before something is written in the folder: look whether it is still the driver's.

        Raises:
            PatterningError: it is not.
        """
        if self.url is None:
            LocalStorage(self.path, self.holder).confirm()

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            PatterningError: that is not possible.
        """
        try:
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        except PatterningError as error:
            if self.url is None:
                raise
            reason = getattr(error.__cause__, "strerror", None)
            raise PatterningError(
                f"{self.path}: the working copy of {self} cannot be made ({reason}); set "
                "PATTERNING_CACHE to a folder that can be written on every node"
            ) from None

    def fetch(self, *prefixes: str) -> Path:
        """Have the files of these names, and under folders of these names, in the working copy as they are published.

        Processes of one node do it one after another; what is there already is not copied again, and what was taken
        away at the URL is taken away here.

        Raises:
            PatterningError: the URL cannot be read, or the working copy not be written.
        """
        if self.url is not None:
            storage = open_url(self.url)
            with self._alone() as record:
                there = storage.sizes(*prefixes)
                for name in [name for name in record if name not in there and is_under(name, prefixes)]:
                    if _is_same(record, name, _stat(self.path / name)):
                        (self.path / name).unlink()
                        del record[name]
                self._download(storage, there, record)
        return self.path

    def gather(self, *names: str) -> None:
        """Fetch what other processes published, but nothing over a file that was written here since."""
        if self.url is not None:
            storage = open_url(self.url)
            with self._alone() as record:
                stats = {name: _stat(self.path / name) for name in names}
                old = [name for name, stat in stats.items() if stat is None or _is_same(record, name, stat)]
                self._download(storage, storage.sizes(*old), record)

    def publish(self, *paths: Path) -> None:
        """Put files of the working copy at the URL, if they are new or not there, and what is new in its folders.

        Hidden folders and half-written files stay behind.

        Raises:
            PatterningError: the URL cannot be written.
        """
        if self.url is None:
            self.confirm()
            return
        storage = open_url(self.url)
        published: Record = {}
        with self._alone() as record:
            stats = {name: _stat(self.path / name) for path in paths for name in self._names(path)}
            named = [path.relative_to(self.path).as_posix() for path in paths if path.is_file()]
            there = storage.sizes(*named)
            new = {
                name: stat
                for name, stat in stats.items()
                if stat is not None and (not _is_same(record, name, stat) or (name in named and name not in there))
            }

        def upload(name: str) -> None:
            storage.upload(self.path / name, name)
            published[name] = [storage.stamp(name), *new[name]]

        try:
            _in_parallel(upload, new)
        finally:
            if published:
                with self._alone() as record:
                    record.update(published)

    def forget_unpublished(self) -> None:
        """Delete what the working copy has that was never published: half a stage of a driver that died.

        Where the URL holds no run, all of it goes: that run was deleted.
        """
        if self.url is not None:
            with self._alone() as record:
                if "manifest.json" not in self.storage.names(""):
                    record.clear()
                for folder, _, files in os.walk(self.path):
                    for file in (Path(folder) / name for name in files if name not in (_LOCK, _RECORD)):
                        if not _is_same(record, file.relative_to(self.path).as_posix(), _stat(file)):
                            file.unlink(missing_ok=True)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes [bytes] of those of the named files that are there: at the URL, not in the working copy."""
        if self.url is not None:
            return open_url(self.url).sizes(*names)
        stats = {name: _stat(self.path / name) for name in names}
        return {name: stat[0] for name, stat in stats.items() if stat is not None}

    def _download(self, storage: ArrowStorage, names: Iterable[str], record: Record) -> None:
        def download(name: str) -> None:
            # Taken before the contents: if they change meanwhile, the file is fetched again next time.
            file, stamp = self.path / name, storage.stamp(name)
            if not _is_same(record, name, _stat(file)) or record[name][0] != stamp:
                storage.download(name, file)
                record[name] = [stamp, *(_stat(file) or ())]

        _in_parallel(download, names)

    def _names(self, path: Path) -> Iterator[str]:
        """Names of the files to publish at or under a path."""
        alone: list[tuple[str, list[str], list[str]]] = [(str(path.parent), [], [path.name])]
        for folder, folders, files in os.walk(path) if path.is_dir() else alone:
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                hidden = name.startswith(".") and (Path(folder) == self.path or name.endswith(".tmp"))
                if not hidden:  # zarr has hidden files of its own
                    yield (Path(folder) / name).relative_to(self.path).as_posix()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Record]:
        """The record of the working copy, while no other process of this node copies; written back at the end."""
        self.make()
        with explained(self.path):
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise PatterningError(
                            f"{self.path / _LOCK}: another process of this node has been copying files of {self} for "
                            f"{_PATIENCE:g} s; stop it, and run the same command again"
                        ) from None
                    time.sleep(0.1)
            try:
                record = json.loads((self.path / _RECORD).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                record = {}
            before = dict(record)
            try:
                yield record
            finally:
                if record != before:
                    write_json(self.path / _RECORD, record)
        finally:
            os.close(descriptor)


def _is_same(record: Record, name: str, stat: tuple[int, int] | None) -> bool:
    return stat is not None and record.get(name, [None])[1:] == [*stat]


def _stat(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a name is one of the prefixes, or lies in a folder that is one."""
    return any(name == prefix or name.startswith(f"{prefix}/") for prefix in prefixes)


def _in_parallel(action: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(action, names))
