"""A client of a cluster's job server, with what keeps it from being one said in a line."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp

from patterning_dist.errors import PatterningError, last_line

if TYPE_CHECKING:  # see _use_token
    from ray.job_submission import JobSubmissionClient

LOST = (OSError, RuntimeError, aiohttp.ClientError)  # what Ray's client raises when the job server does not answer
_CONNECT_TIMEOUT = 10.0  # seconds


def connect(address: str) -> JobSubmissionClient:
    """Connect to a job server.

    Args:
        address: http://HOST:8265, whatever RAY_ADDRESS says.

    Raises:
        PatterningError: no answer, no job server, or it wants a token or another one.
    """
    url = urlsplit(address)
    try:
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError
        port = url.port or {"http": 80, "https": 443}[url.scheme]
    except ValueError:
        raise PatterningError(
            f"--address {address}: expected the URL of the cluster's dashboard, http://HOST:8265"
        ) from None
    try:  # requests of Ray's client would wait for minutes
        socket.create_connection((url.hostname, port), _CONNECT_TIMEOUT).close()
    except OSError as error:
        raise PatterningError(
            f"{address}: no answer ({error.strerror or error}); start the cluster, or a tunnel to it "
            "(ssh -L 8265:127.0.0.1:8265 HEAD), or give another --address"
        ) from None
    _use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in (JobSubmissionClient.__module__, "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(module).setLevel(logging.WARNING)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would overrule the address
        os.environ.pop(variable, None)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise PatterningError(
            f"{address}: {str(error).splitlines()[0].partition('. Ensure that')[0]}; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to the file of the cluster's token or RAY_AUTH_TOKEN to the token itself"
        ) from None
    except (*LOST, ValueError, LookupError) as error:
        raise PatterningError(
            f"{address}: does not answer like Ray's job server ({last_line(error)}); give the URL of the cluster's "
            "dashboard"
        ) from None


def _use_token() -> None:
    """Send the token if there is one, as Ray's own processes do; Ray reads the mode when it is imported."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if "RAY_AUTH_MODE" not in os.environ and (given or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"
