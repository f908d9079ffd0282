"""A small object that drivers change over each other, each only what it has seen: what a lease is made of."""

from __future__ import annotations

import configparser
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from patterning_dist.errors import PatterningError
from patterning_dist.storage.store import Storage

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import GCSStore, RetryConfig, S3Store

_RETRIES: RetryConfig = {"max_retries": 6, "retry_timeout": timedelta(seconds=20)}  # what lasts longer is an outage


class Seen(NamedTuple):
    """Contents, and what the store calls this version of them."""

    content: bytes
    version: Any


class Cell(Protocol):
    """See the module."""

    def read(self) -> Seen | None:
        """What is there; None: nothing."""
        ...

    def write(self, content: bytes, over: Seen | None) -> Seen | None:
        """Write over what was seen, or nothing; what is there now, or None where that was something else already."""
        ...


class ConditionalCell:
    """An object of S3 or Google Cloud Storage: the store itself refuses a write over another version.

    Args:
        store: with the run directory as its prefix.
        name: of the object in it.
        location: of the run, for messages.
    """

    def __init__(self, store: S3Store | GCSStore, name: str, location: str) -> None:
        self._store, self._name, self._location = store, name, location

    def read(self) -> Seen | None:
        import obstore
        from obstore.exceptions import NotFoundError

        try:
            found = self._asked(lambda: obstore.get(self._store, self._name))
        except (NotFoundError, FileNotFoundError):
            return None
        return Seen(bytes(found.bytes()), _version(found.meta))

    def write(self, content: bytes, over: Seen | None) -> Seen | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

        mode: Literal["create"] | UpdateVersion = "create" if over is None else over.version
        try:
            put = self._asked(lambda: obstore.put(self._store, self._name, content, mode=mode))
        except (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError):
            # Or an answer was lost, and the write was tried again over what it had written.
            found = self.read()
            return found if found is not None and found.content == content else None
        return Seen(content, _version(put))

    def _asked(self, action: Callable[[], Any]) -> Any:
        from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError

        try:
            return action()
        except (AlreadyExistsError, PreconditionError, NotFoundError, FileNotFoundError):
            raise
        except (BaseError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise PatterningError(
                f"{self._location}/{self._name}: cannot be reached ({reason}); look at the address, the credentials "
                "and the network, and run the same command again"
            ) from error


class PlainCell:
    """A file of a store without such writes: whoever takes it over looks again after a while, and the last one has it.

    Args:
        storage: of the run.
        name: of the file in it.
        settle: seconds within which others that saw the same have written.
    """

    def __init__(self, storage: Storage, name: str, settle: float) -> None:
        self._storage, self._name, self._settle = storage, name, settle
        self._own: Seen | None = None

    def read(self) -> Seen | None:
        try:
            return Seen(self._storage.read(self._name), None)
        except FileNotFoundError:
            return None

    def write(self, content: bytes, over: Seen | None) -> Seen | None:
        if self.read() != over:
            return None
        self._storage.write(self._name, content)
        wanted = Seen(content, None)
        if over is None or over != self._own:
            time.sleep(self._settle)
            if self.read() != wanted:
                return None
        self._own = wanted
        return wanted


def _version(found: Any) -> dict[str, str]:
    """As a conditional write takes it."""
    return {key: found[key] for key in ("e_tag", "version") if found.get(key)}


def open_cell(url: str, storage: Storage, name: str, settle: float) -> Cell:
    """The object of that name in a run directory at a URL.

    Raises:
        PatterningError: credentials or address are not such as the store's client takes.
    """
    scheme = urlsplit(url).scheme
    if scheme not in ("s3", "gs", "gcs"):
        return PlainCell(storage, name, settle)
    from obstore.exceptions import BaseError

    try:
        return ConditionalCell(_s3(url) if scheme == "s3" else _gcs(url), name, str(storage))
    except BaseError as error:
        reason = " ".join(str(error).split())[:300]
        raise PatterningError(f"{storage}: cannot be opened ({reason}); correct the address or the keys") from error


def _gcs(url: str) -> GCSStore:
    from obstore.store import GCSStore

    parts = urlsplit(url)
    return GCSStore(parts.netloc, prefix=parts.path.strip("/") or None, retry_config=_RETRIES)


def _s3(url: str) -> S3Store:
    """The bucket, with the keys that pyarrow would take: the URL's, the environment's, the profile's, the machine's."""
    from obstore.store import S3Store

    parts = urlsplit(url)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    options: dict[str, Any] = {}
    if region := query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    if endpoint := query.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL"):
        scheme = query.get("scheme", "https")
        options["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
        options["client_options"] = {"allow_http": options["endpoint"].startswith("http://")}
    bucket = parts.netloc.rpartition("@")[2]
    if parts.username and parts.password:
        options |= {"access_key_id": unquote(parts.username), "secret_access_key": unquote(parts.password)}
    elif "AWS_ACCESS_KEY_ID" not in os.environ:
        options |= _profile()
    return S3Store(bucket, prefix=parts.path.strip("/") or None, retry_config=_RETRIES, **options)


def _profile() -> dict[str, str]:
    """Keys of the user's profile in the file of shared credentials; none where it has none."""
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", Path.home() / ".aws" / "credentials"))
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(file)
    profile = os.environ.get("AWS_PROFILE", "default")
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    if not parser.has_section(profile):
        return {}
    return {ours: parser[profile][theirs] for theirs, ours in names.items() if theirs in parser[profile]}
