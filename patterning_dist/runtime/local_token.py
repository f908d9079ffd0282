"""A token for a Ray of this machine alone, so that nobody else who reaches its ports can use it."""

from __future__ import annotations

import os
import secrets
import sys


def guard_local_ray() -> None:
    """Have the Ray that this process may start answer those only who have a token: this process and its children.

    Ray's ports listen on every interface, and whoever reaches them can run code. To be called before ``ray`` is
    imported, which reads these variables once. A cluster that is joined (RAY_ADDRESS), and a mode that was chosen
    (RAY_AUTH_MODE), stay as they are.
    """
    if "RAY_ADDRESS" in os.environ or "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
