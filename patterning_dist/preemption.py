"""SIGTERM, the notice that a machine is about to be taken away: what is under way is kept, and the process leaves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Preempted(KeyboardInterrupt):
    """SIGTERM has come; handled like Ctrl-C, on the way out checkpoints are written."""


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Turn the first SIGTERM into ``Preempted`` in the main thread; later ones do not disturb the leaving.

    Schedulers often send it twice, to the script and to all of its processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Preempted

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        # While Ray waits, whatever a handler raises arrives as a plain KeyboardInterrupt.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
            raise Preempted from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
