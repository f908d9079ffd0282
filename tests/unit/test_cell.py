"""The store of conditional writes is that of the URL, with the keys that pyarrow would take."""

from __future__ import annotations

from pathlib import Path

import pytest

from patterning_dist.storage.cell import ConditionalCell, PlainCell, open_cell
from patterning_dist.storage.store import open_storage

URL = "s3://bucket/runs/one"


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def config(url: str) -> dict[str, object]:
    cell = open_cell(url, open_storage("file:///nowhere"), ".lease", settle=0)
    assert isinstance(cell, ConditionalCell)
    assert cell._store.prefix == "runs/one"
    return dict(cell._store.config)


def test_a_server_of_ones_own() -> None:
    found = config(f"{URL}?scheme=http&endpoint_override=127.0.0.1:5000&region=eu-north-1")
    assert (found["endpoint"], found["region"], found["bucket"]) == ("http://127.0.0.1:5000", "eu-north-1", "bucket")
    assert config(f"{URL}?endpoint_override=store.example.org")["endpoint"] == "https://store.example.org"


def test_keys_of_the_url_before_those_of_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sections = {"default": "of-default", "study": "of%study"}
    text = "".join(f"[{s}]\naws_access_key_id = {k}\naws_secret_access_key = {k}\n" for s, k in sections.items())
    (tmp_path / "credentials").write_text(text)
    assert config(URL)["access_key_id"] == "of-default"
    monkeypatch.setenv("AWS_PROFILE", "study")
    assert config(URL)["secret_access_key"] == "of%study"
    assert config(URL.replace("//", "//me:a%2Fb@"))["secret_access_key"] == "a/b"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-environment")
    assert "access_key_id" not in config(URL), "the client reads the environment itself"


def test_other_stores_have_no_such_writes() -> None:
    assert isinstance(open_cell("hdfs://host/run", open_storage("file:///nowhere"), ".lease", settle=0), PlainCell)
