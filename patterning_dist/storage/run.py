"""The directory of one run: lock, atomic files, manifest, events, and which stages are done."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import (
    FileHashes,
    changed_files,
    digests_of,
    explained,
    file_sha256,
    plain,
    write_json,
    write_text,
)
from patterning_dist.storage.lease import Lease, held, lease_at
from patterning_dist.storage.lock import FolderLock
from patterning_dist.storage.mirror import Location, is_under

PACKAGES = ("patterning-dist", "torch", "ray", "deepspeed", "transformers", "numpy", "pyarrow", "xarray", "zarr")
VERSIONS_THAT_COUNT = ("patterning-dist", "torch", "transformers", "numpy", "deepspeed", "python")
_STATE = "live.json"
_EVENTS_EVERY = 5.0  # between two copies of the events, or of the state, to a URL, within a stage [s]


def stage_fingerprint(stage: str, config_sections: Mapping[str, Any], upstream: Sequence[str] = ()) -> str:
    """What a stage's outputs follow from: its name, its sections of the config (JSON), the stages before it.

    A change anywhere changes this fingerprint and, through `upstream`, those of all the later stages.
    """
    inputs = [stage, plain(config_sections), list(upstream)]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def read_manifest(location: str | Path) -> dict[str, Any]:
    """The manifest of the run at `location` (a path or a URL), which is empty before its first stage.

    Raises:
        PatterningError: it is spoilt, or the URL cannot be read.
    """
    remedy = "delete it to start the run again"
    manifest = _read_json(location, "manifest.json", remedy)
    for key in ("stages", "inputs", "hashes", "versions", "data"):
        if not isinstance(manifest.get(key, {}), dict):
            raise PatterningError(f"{Location.at(location)}/manifest.json: {key} holds no object; {remedy}")
    for name, entry in manifest.get("stages", {}).items():
        known = isinstance(entry, dict) and isinstance(entry.get("status"), str)
        if not known or not isinstance(entry.get("seconds", 0.0), int | float):
            raise PatterningError(f"{Location.at(location)}/manifest.json: stages.{name} is no stage; {remedy}")
        # They are deleted where they are damaged: nothing else of this machine may be.
        for key, kind in (("outputs", int), ("sha256", str), ("sha256_before", str)):
            files = entry.get(key, {})
            if not isinstance(files, dict) or not all(_is_below(f) and isinstance(v, kind) for f, v in files.items()):
                file = f"{Location.at(location)}/manifest.json"
                raise PatterningError(f"{file}: stages.{name}.{key} does not list files of the run; {remedy}")
    return manifest


def _is_below(name: str) -> bool:
    """Whether it names a file below the run directory, by no way out of it."""
    return not name.startswith("/") and "\0" not in name and ".." not in name.split("/") and name not in ("", ".")


def recorded_outputs(manifest: Mapping[str, Any], stage: str) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes [bytes] and SHA-256 of the outputs of a finished stage, by name; earlier versions kept no SHA-256."""
    entry = manifest.get("stages", {}).get(stage, {})
    return entry.get("outputs", {}), entry.get("sha256", {})


def refuse_changed(
    location: Location,
    manifest: Mapping[str, Any],
    *names: str,
    suffix: str = "",
    sha256: Callable[[Path], str] = file_sha256,
) -> None:
    """Check outputs of these names, and those in folders of these names with a suffix, that no stage is to read.

    Raises:
        PatterningError: one is gone, or has other contents than its stage wrote.
    """
    for stage in manifest.get("stages", {}):
        _, digests = recorded_outputs(manifest, stage)
        read = (file for file in digests if is_under(file, names) and file.endswith(suffix))
        mine = {file: digests[file] for file in read}
        if changed := changed_files(location.path, mine, sha256):
            raise PatterningError(
                f"{location}: {in_words(changed)}; `patterning run {location}` runs stage {stage} again"
            )


def in_words(changed: Sequence[str]) -> str:
    """What is wrong with outputs of a stage that are gone or damaged."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{', '.join(changed[:3])}{more} {'are' if changed[1:] else 'is'} gone, or damaged since written"


def read_state(location: str | Path) -> dict[str, Any]:
    """What `RunDirectory.keep_state` wrote last; empty before.

    Raises:
        PatterningError: it is spoilt, or the URL cannot be read.
    """
    return _read_json(location, _STATE, "delete it")


def _read_json(location: str | Path, name: str, remedy: str) -> dict[str, Any]:
    found = Location.at(location)
    try:
        content = json.loads(found.storage.read(name))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise PatterningError(f"{found}/{name}: cannot be read ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise PatterningError(f"{found}/{name}: holds no object; {remedy}")
    return content


class RunDirectory:
    """A run directory, made if it is not there. Whoever writes to it holds `locked()`.

    Args:
        location: a path, or a URL: then `path` is this node's working copy, and what is written through this class, and
            the outputs of the stages, are published at the URL.

    Attributes:
        location: for processes on other nodes, which `fetch` what they read and `publish` what they write.
        path: a local folder.
        storage: the durable files, which actors on all nodes read and write.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = Location.at(location)
        self.path, self.storage = self.location.path, self.location.storage
        self.location.make()
        self._lease: Lease | None = None
        self._events_published = self._state_published = -_EVENTS_EVERY
        self._sha256 = FileHashes({})  # of outputs, each read once; bits that rot leave size and time as they are

    @property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.location.url or self.path)

    def update_manifest(self, **fields: Any) -> None:
        """Set top-level fields of the manifest (`data={"train.parquet": sha256}`), keeping the others."""
        self.location.confirm()
        file = self.path / "manifest.json"
        write_json(file, self.manifest | fields)
        self.publish(file)

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunDirectory]:
        """Keep every other driver out, and begin with what the run has.

        The kernel lets go of a folder if this process dies, however it dies; at a URL it takes PATIENCE beats.

        Raises:
            PatterningError: another driver has the run, or takes it over; or it cannot be written.
        """
        if self.location.url is None:
            lock = FolderLock(self.path)
            with held(lock):
                self.location = replace(self.location, holder=lock.holder)
                self.storage = self.location.storage
                for leftover in self.path.rglob(".*.tmp"):  # of a driver that was killed while writing
                    leftover.unlink(missing_ok=True)
                yield self
            self.location = replace(self.location, holder=None)
            self.storage = self.location.storage
            return
        self._lease = lease_at(self.location.url, self.storage)
        with held(self._lease):
            self.location.forget_unpublished()
            self.location.fetch("manifest.json", "config.yaml", "events.jsonl")
            try:
                yield self
            except BaseException as error:
                # Its own error is the one to be seen; who gets SIGTERM has no time for large files.
                with contextlib.suppress(PatterningError):
                    self.publish(self.path if isinstance(error, Exception) else self.path / "events.jsonl")
                raise
            self.publish(self.path)

    def changed_versions(self) -> list[str]:
        """What numbers follow from besides the configuration, where it is not what the run went on with last."""
        before, now = self.manifest.get("versions", {}), _versions()
        return [
            f"{name} {now[name]} (was {before[name]})"
            for name in VERSIONS_THAT_COUNT
            if before.get(name) is not None and before[name] != now[name]
        ]

    def store_config(self, text: str) -> list[str]:
        """Write config.yaml (from `dump_config`), versions and git commit; return the sections that changed.

        Changed sections are said in an event; the fingerprints decide which stages run again.
        """
        file = f"{self.location}/config.yaml"
        try:
            before = yaml.safe_load(self.storage.read("config.yaml")) or {}
        except FileNotFoundError:
            before = None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise PatterningError(f"{file}: cannot be read ({error}); delete it and run again") from None
        after, changed = yaml.safe_load(text), []
        if before is not None:
            keys = dict.fromkeys([*after, *before])
            changed = [key for key in keys if after.get(key) != before.get(key)]
        write_text(self.path / "config.yaml", text)
        self.publish(self.path / "config.yaml")
        self.update_manifest(
            config_sha256=hashlib.sha256(text.encode()).hexdigest(),
            versions=_versions(),
            git_commit=_git_commit(),
        )
        if changed:
            self.event("config", "changed", sections=changed)
        return changed

    def event(self, stage: str, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: time (UTC), stage, kind and whatever else there is to say."""
        record = {"time": _now(), "stage": stage, "kind": kind, **plain(fields)}
        self.location.confirm()
        path = self.path / "events.jsonl"
        with explained(path), open(path, "ab+") as file:
            # A driver killed while writing leaves half a line: it must not spoil the next one.
            torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(b"\n" * torn + line.encode())
        if time.monotonic() - self._events_published >= _EVENTS_EVERY:
            self.publish(path)
            self._events_published = time.monotonic()

    def keep_state(self, state: Mapping[str, Any]) -> None:
        """Write live.json: what the driver is doing, for `patterning status` here or on another machine."""
        try:
            self.location.confirm()
        except PatterningError:
            return
        if not self.path.is_dir():
            return  # taken away under the run: it must not come back half
        path = self.path / _STATE
        write_json(path, {"time": _now(), "process": f"pid {os.getpid()} on {socket.gethostname()}", **state})
        if time.monotonic() - self._state_published >= _EVENTS_EVERY or state.get("ended"):
            self.publish(path)
            self._state_published = time.monotonic()

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage finished with these inputs and all its outputs are still what it wrote."""
        entry = self.manifest.get("stages", {}).get(stage, {})
        if entry.get("status") != "finished" or entry.get("fingerprint") != fingerprint:
            return False
        return "outputs" in entry and not self.changed_outputs(stage)

    def changed_outputs(self, stage: str) -> list[str]:
        """Names of the outputs of a finished stage that are gone, or are no longer what it wrote.

        Of a stage that an earlier version finished, without digests: that have another size.
        """
        sizes, digests = recorded_outputs(self.manifest, stage)
        there = self.location.sizes(sizes)
        resized = [name for name, size in sizes.items() if there.get(name) != size]
        self.location.fetch(*(name for name in sizes if name not in resized))  # the stages after read them here
        return resized + self.changed({name: digest for name, digest in digests.items() if name not in resized})

    def changed(self, digests: Mapping[str, str]) -> list[str]:
        """Those of the files, fetched if need be, that are gone or have another SHA-256 than this."""
        self.location.fetch(*digests)
        changed = changed_files(self.path, digests, self._sha256)
        if changed and self.location.url is not None:  # perhaps it is this node's copy alone
            for name in changed:
                (self.path / name).unlink(missing_ok=True)
            self.location.fetch(*changed)
            changed = changed_files(self.path, {name: digests[name] for name in changed}, self._sha256)
        return changed

    @contextlib.contextmanager
    def stage(self, stage: str, fingerprint: str, later: Sequence[str] = ()) -> Iterator[list[Path]]:
        """Mark a stage started and then finished, failed or interrupted.

        Where it ends with other bits than before, ``later`` stages count as not done: theirs are of the old ones.
        Outputs that are no longer what the stage wrote are deleted first: what it keeps of them it finds whole.

        Yields a list for the paths of the stage's outputs, files and folders under the run directory: while a file of
        them is missing or has other contents, the stage counts as not done.
        """
        before = self.manifest.get("stages", {}).get(stage)
        if before and before.get("fingerprint") != fingerprint:
            self.event(stage, "inputs_changed", reason="the config or an earlier stage changed: run again")
        _, old = recorded_outputs(self.manifest, stage)
        for name in self.changed_outputs(stage):
            self.storage.delete(name)
            if changed_files(self.path, {name: old.get(name, "")}, self._sha256):  # of a URL the copy may be whole
                (self.path / name).unlink(missing_ok=True)
        outputs: list[Path] = []
        clock, entry = time.monotonic(), dict[str, Any](fingerprint=fingerprint, started=_now())
        # Known until the stage finishes, however often it is begun.
        old = (before or {}).get("sha256_before") or old
        self._mark(stage, status="started", sha256_before=old, **entry)
        self.event(stage, "started")
        try:
            yield outputs
            names = [str(Path(path).resolve().relative_to(self.path.resolve())) for path in outputs]
            self.location.gather(*names)
            for name in names:
                if not (self.path / name).exists():
                    raise PatterningError(f"{self.path / name}: stage {stage} did not write it; run it again")
            names = [file for name in names for file in self._files(name)]
            self.publish(*(self.path / name for name in names), self.path)
            sizes, digests = self.location.sizes(names), digests_of(self.path, names, self._sha256)
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            seconds = time.monotonic() - clock
            # A full disk is what may have failed the stage: its own error is the one to be seen.
            with contextlib.suppress(PatterningError):
                self.event(stage, status, error=f"{type(error).__name__}: {error}", seconds=seconds)
                entry |= {"seconds": seconds, "error": str(error), "sha256_before": old}
                self._mark(stage, status=status, finished=_now(), **entry)
            raise
        seconds = time.monotonic() - clock
        is_same = all(digests.get(name, digest) == digest for name, digest in old.items())
        entry |= {"seconds": seconds, "outputs": sizes, "sha256": digests}
        self._mark(stage, () if is_same else later, status="finished", finished=_now(), **entry)
        self.event(stage, "finished", seconds=seconds)
        self.publish(self.path / "events.jsonl")

    def _files(self, name: str) -> list[str]:
        """The file, or those in the folder, of this name."""
        path = self.path / name
        if not path.is_dir():
            return [name]
        return sorted(file.relative_to(self.path).as_posix() for file in path.rglob("*") if file.is_file())

    def publish(self, *paths: Path) -> None:
        """As `Location.publish`: does nothing in a folder.

        Raises:
            PatterningError: another driver has taken the run over, or the URL cannot be written.
        """
        if self._lease is not None:
            self._lease.confirm()
        self.location.publish(*paths)

    def _mark(self, stage: str, forgotten: Sequence[str] = (), **entry: Any) -> None:
        stages = {key: known for key, known in self.manifest.get("stages", {}).items() if key not in forgotten}
        self.update_manifest(stages=stages | {stage: entry})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
