"""The files of a run at a URL: S3, GCS, HDFS by pyarrow, what else there is by fsspec."""

from __future__ import annotations

import contextlib
import posixpath
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
from pyarrow import fs

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import atomic_path, explained

Result = TypeVar("Result")

# Between tries [s]. pyarrow itself tries three times, within seconds: what lasts longer is an outage.
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Trying again does not help.
_FINAL = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
# A put of these is whole or not there; elsewhere a file is written under another name and moved.
_ATOMIC_PUT = ("s3", "gcs", "abfs")
_CHUNK = 16 * 2**20  # [bytes]


@dataclass(frozen=True)
class ArrowStorage:
    """Files at a URL, whose query holds what pyarrow takes there; credentials come from the environment.

    ``s3://bucket/run?scheme=http&endpoint_override=127.0.0.1:5000`` is a server of one's own. What fails is tried
    again for some twenty seconds (and pyarrow's own timeouts), then it is an error.

    Raises:
        PatterningError: of every method: the URL cannot be reached, read or written.
    """

    url: str = field(repr=False)  # may hold a key

    def __str__(self) -> str:
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"

    def read(self, name: str) -> bytes:
        def action() -> bytes:
            with self._fs.open_input_stream(self._path(name)) as stream:
                return stream.read()

        return self._tried("read", name, action)

    def write(self, name: str, content: bytes) -> None:
        self._tried("written", name, lambda: self._put(self._path(name), content))

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried("deleted", name, lambda: self._fs.delete_file(self._path(name)))

    def names(self, folder: str) -> list[str]:
        return sorted(info.base_name for info in self._files(folder) if _is_whole_file(info))

    def clear(self, folder: str) -> None:
        for info in self._files(folder):
            self.delete(f"{folder}/{info.base_name}")

    def sizes(self, *prefixes: str) -> dict[str, int]:
        """Name -> size [bytes] of every file that is named, or lies under a folder that is named ("": all)."""
        if not prefixes:
            return {}
        named = self._tried("listed", prefixes[0], lambda: self._fs.get_file_info([*map(self._path, prefixes)]))
        files = [info for info in named if _is_whole_file(info)]
        for folder in (info for info in named if info.type == fs.FileType.Directory):
            selector = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
            found = self._tried("listed", prefixes[0], partial(self._fs.get_file_info, selector))
            files += [info for info in found if _is_whole_file(info)]
        return {posixpath.relpath(info.path, self._root): info.size for info in files}

    def stamp(self, name: str) -> str:
        """Changes with the contents: the store's own hash of them, or size and time where it has none.

        Raises:
            FileNotFoundError: no such file.
        """

        def action() -> str:
            with self._fs.open_input_stream(self._path(name)) as stream:
                etag = (stream.metadata() or {}).get("ETag", b"").decode()
            if etag:
                return etag
            info = self._fs.get_file_info(self._path(name))
            return f"{info.size}-{info.mtime_ns}"

        return self._tried("read", name, action)

    def upload(self, file: Path, name: str) -> None:
        """Put a local file there, over whatever is there."""
        content = pyarrow.memory_map(str(file)).read_buffer() if file.stat().st_size else b""
        self._tried("written", name, lambda: self._put(self._path(name), content))

    def download(self, name: str, file: Path) -> None:
        """Copy a file to a local one, which is then whole or as it was.

        Raises:
            FileNotFoundError: no such file.
        """

        def action(temporary: Path) -> None:
            with self._fs.open_input_stream(self._path(name)) as stream, open(temporary, "wb") as target:
                while chunk := stream.read(_CHUNK):
                    with explained(file):
                        target.write(chunk)

        with atomic_path(file) as temporary:
            self._tried("read", name, lambda: action(temporary))

    @property
    def _fs(self) -> fs.FileSystem:
        return _open(self.url)[0]

    @property
    def _root(self) -> str:
        return _open(self.url)[1]

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name).rstrip("/")

    def _files(self, folder: str) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        infos = self._tried("listed", folder, lambda: self._fs.get_file_info(selector))
        return [info for info in infos if info.type == fs.FileType.File]

    def _put(self, path: str, content: Any) -> None:
        # One call of write: what a stream has when it is closed becomes the file, however little that is.
        if self._fs.type_name in _ATOMIC_PUT:
            with self._fs.open_output_stream(path) as stream:
                stream.write(content)
            return
        folder, base = posixpath.split(path)
        temporary = posixpath.join(folder, f".{base}.{uuid.uuid4().hex[:12]}.tmp")
        self._fs.create_dir(folder, recursive=True)
        try:
            with self._fs.open_output_stream(temporary) as stream:
                stream.write(content)
            self._fs.move(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._fs.delete_file(temporary)
            raise

    def _tried(self, done: str, name: str, action: Callable[[], Result]) -> Result:
        for wait in (*_WAITS, None):
            try:
                return action()
            except FileNotFoundError:
                raise
            except (OSError, pyarrow.ArrowException) as error:
                # A number is what the operating system says of a local disk; a store far away has none.
                final = getattr(error, "errno", None) is not None or any(word in str(error) for word in _FINAL)
                if wait is None or final:
                    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
                    raise PatterningError(
                        f"{self}/{name}: cannot be {done} ({reason}); look at the address, the credentials and the "
                        "network, and run the same command again"
                    ) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _is_whole_file(info: fs.FileInfo) -> bool:
    return info.type == fs.FileType.File and not info.base_name.endswith(".tmp")


@lru_cache(maxsize=16)
def _open(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL, once a process, and the path of the run in it."""
    scheme = url.partition("://")[0]
    try:
        found, root = fs.FileSystem.from_uri(url)
    except (OSError, pyarrow.ArrowException, ImportError) as error:
        if "Unrecognized filesystem type" not in str(error):
            reason = " ".join(str(error).split())
            raise PatterningError(f"{ArrowStorage(url)}: cannot be opened ({reason}); correct the address") from error
        import fsspec

        try:
            other, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as missing:
            raise PatterningError(
                f"{ArrowStorage(url)}: nothing is installed that opens {scheme}:// ({missing}); install the package "
                "of fsspec for it on every node, or use s3://, gs://, hdfs:// or a path"
            ) from error
        found = fs.PyFileSystem(fs.FSSpecHandler(other))
    return found, root.rstrip("/")
