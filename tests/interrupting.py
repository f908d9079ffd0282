"""A command in this process that gets a signal while it runs, as from Ctrl-C or from a scheduler."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from click.testing import Result

_PATIENCE = 240.0  # seconds until it must be time for the signal


def interrupted(run: Callable[[], Result], when: Callable[[], object], sent: signal.Signals) -> Result:
    """What the command makes of the signal; sent as soon as ``when`` is true, which must be before its end."""
    over, arrived = threading.Event(), threading.Event()

    def send() -> None:
        deadline = time.monotonic() + _PATIENCE
        while not over.is_set() and time.monotonic() < deadline:
            if when():
                arrived.set()
                os.kill(os.getpid(), sent)
                return
            time.sleep(0.02)

    def keyboard(signum: int, frame: FrameType | None) -> None:
        if not over.is_set():
            raise KeyboardInterrupt

    # A signal that comes too late must not end the tests.
    before = {number: signal.signal(number, keyboard) for number in (signal.SIGINT, signal.SIGTERM)}
    sender = threading.Thread(target=send)
    sender.start()
    try:
        result = run()
        over.set()
        sender.join()
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert arrived.is_set(), f"the command was over before it was to be interrupted: {result.output}"
    return result
