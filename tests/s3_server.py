"""An S3 server on this machine, for tests."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs
from shared_ray import S3_ACCESS


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Yields a URL with an empty bucket, to format with the name of a folder; this process has its credentials."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or a failing test prints every request
    with pytest.MonkeyPatch.context() as patch:
        for name, value in S3_ACCESS.items():
            patch.setenv(name, value)
        endpoint = "{}:{}".format(*server.get_host_and_port())
        fs.S3FileSystem(scheme="http", endpoint_override=endpoint, allow_bucket_creation=True).create_dir("bucket")
        yield "s3://bucket/{}?scheme=http&endpoint_override=" + endpoint
    server.stop()
