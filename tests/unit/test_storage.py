"""Durable files at a path and at URLs: the same behaviour, whole files or none, outages outlasted or named."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from s3_server import s3_server

import patterning_dist.storage.arrow_store
from patterning_dist.errors import PatterningError
from patterning_dist.storage.arrow_store import ArrowStorage
from patterning_dist.storage.store import LocalStorage, Storage, open_storage, path_or_url


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=["path", "file", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A path, a file system of pyarrow that must move, one that must not, and one of fsspec."""
    folder = tmp_path.name
    match request.param:
        case "path":
            return open_storage(tmp_path / "run")
        case "file":
            return open_storage(f"file://{tmp_path}/run")
        case "s3":
            return open_storage(request.getfixturevalue("s3").format(f"{folder}/run"))
        case "memory":
            return open_storage(f"memory://{folder}/run")


def test_files_come_back_on_every_storage(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("manifest.json")
    assert storage.names("") == storage.names("sampling/attention") == []
    storage.delete("manifest.json")
    contents = {"manifest.json": b"{}", "sampling/attention/b": b"", "sampling/attention/a": os.urandom(300_000)}
    for name, content in contents.items():
        storage.write(name, b"before")
        storage.write(name, content)
    storage.write("sampling/attention-2/c", b"c")
    for name, content in contents.items():
        assert storage.read(name) == content
    assert storage.names("sampling/attention") == ["a", "b"]
    assert storage.names("") == ["manifest.json"], "files only, and no leftovers"
    storage.delete("sampling/attention/a")
    assert storage.names("sampling/attention") == ["b"]
    with pytest.raises(FileNotFoundError):
        storage.read("sampling/attention/a")
    storage.write("sampling/attention/.c.0123.tmp", b"half")
    storage.clear("sampling/attention")
    storage.clear("absent")
    for name in ("b", ".c.0123.tmp"):
        with pytest.raises(FileNotFoundError):
            storage.read(f"sampling/attention/{name}")
    assert storage.names("sampling/attention-2") == ["c"]
    assert pickle.loads(pickle.dumps(storage)).read("manifest.json") == b"{}"


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_local_files_go_up_and_come_down(kind: str, s3: str, tmp_path: Path) -> None:
    storage = ArrowStorage(f"file://{tmp_path}/far" if kind == "file" else s3.format(tmp_path.name))
    file, back = tmp_path / "model", tmp_path / "deep" / "back"
    file.write_bytes(os.urandom(12 * 2**20))  # more than one part of an upload
    storage.upload(file, "baseline/model")
    storage.upload(file, "baseline-2/model")
    assert storage.sizes("baseline") == {"baseline/model": 12 * 2**20}
    assert set(storage.sizes("")) == {"baseline/model", "baseline-2/model"}
    assert storage.sizes("baseline/model", "absent") == {"baseline/model": 12 * 2**20}
    assert storage.sizes() == {}
    storage.download("baseline/model", back)
    assert back.read_bytes() == file.read_bytes()
    stamp = storage.stamp("baseline/model")
    assert storage.stamp("baseline/model") == stamp
    file.write_bytes(os.urandom(12 * 2**20))  # as long, and within the second that S3 counts in
    storage.upload(file, "baseline/model")
    assert storage.stamp("baseline/model") != stamp
    with pytest.raises(FileNotFoundError):
        storage.stamp("absent")
    assert [entry.name for entry in back.parent.iterdir()] == ["back"]


def test_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    storage = ArrowStorage(f"file://{tmp_path}")
    (tmp_path / "folder" / "in the way").mkdir(parents=True)
    with pytest.raises(
        PatterningError, match=rf"^file://{tmp_path}/folder: cannot be written \(.*run the same command"
    ):
        storage.write("folder", b"content")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_bucket_that_is_not_there_is_said_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(patterning_dist.storage.arrow_store.time, "sleep", sleep)
    storage = ArrowStorage(s3.format("run").replace("bucket", "no-bucket"))
    with pytest.raises(PatterningError, match=r"^s3://no-bucket/run/a: cannot be written \(.*NO_SUCH_BUCKET"):
        storage.write("a", b"a")


class _Busy(BaseHTTPRequestHandler):
    """Refuses `refusals` requests with 503, then answers that there is no such file."""

    def do_HEAD(self) -> None:
        self.server.num_requests += 1
        self.send_response(503 if self.server.num_requests <= self.server.refusals else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def busy(s3: str) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    server.num_requests, server.refusals = 0, 10**9
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_outage_is_outlasted_and_a_long_one_is_an_error(
    busy: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://id:secret@bucket/run?scheme=http&endpoint_override=127.0.0.1:{busy.server_address[1]}"
    storage = ArrowStorage(url)
    monkeypatch.setattr(patterning_dist.storage.arrow_store, "_WAITS", ())
    with pytest.raises(PatterningError, match=r"^s3://bucket/run/a: cannot be read \(") as caught:
        storage.read("a")
    assert "secret" not in f"{caught.value} {storage!r}"
    once = busy.num_requests
    busy.num_requests, busy.refusals = 0, once + 1  # more than pyarrow itself outlasts
    monkeypatch.setattr(patterning_dist.storage.arrow_store, "_WAITS", (0.1,))
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    assert busy.num_requests == once + 2


def test_url_that_nothing_opens(tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match=r"^nowhere://bucket/run: nothing is installed that opens nowhere://"):
        open_storage("nowhere://bucket/run").read("a")
    assert isinstance(open_storage(str(tmp_path)), LocalStorage)
    assert path_or_url("runs/a:b") == Path("runs/a:b")
    assert path_or_url("s3://b/run") == "s3://b/run"
