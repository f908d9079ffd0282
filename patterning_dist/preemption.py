"""Notice to leave, SIGTERM or SIGHUP (the terminal is gone): what is under way is kept, and the process leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import psutil

SECONDS = 30.0  # that a machine which is taken away leaves; whatever hangs, this process and its children end by then
_RESERVE = 1.5  # of them, for the end by force


class Preempted(KeyboardInterrupt):
    """Notice has come; handled like Ctrl-C, on the way out checkpoints are written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it."""
        return 128 + self.signal


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Turn the first notice into ``Preempted`` in the main thread; later ones do not disturb the leaving.

    Schedulers often send it twice, to the script and to all of its processes. Where a notice is ignored (``nohup``) it
    stays so. A main thread that is stuck in a library never comes to raise anything: the signal's number also goes
    through a pipe to another thread, which ends the process and its children when time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream and stream.isatty()]
    arrived = list[int]()

    def leave(number: int, frame: FrameType | None) -> None:
        for notice in before:
            signal.signal(notice, signal.SIG_IGN)
        arrived.append(number)
        if number == signal.SIGHUP:  # to write to a terminal that is gone would be an error
            _silence(terminals)
        raise Preempted(number)

    notices = [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, leave) for number in notices if signal.getsignal(number) != signal.SIG_IGN}
    try:
        with _ended_in_time(set(before)):
            yield
    except KeyboardInterrupt:
        # While Ray waits, whatever a handler raises arrives as a plain KeyboardInterrupt.
        if arrived:
            raise Preempted(arrived[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silence(terminals: list[int]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for terminal in terminals:
        os.dup2(nowhere, terminal)
    os.close(nowhere)


@contextlib.contextmanager
def _ended_in_time(notices: set[signal.Signals]) -> Iterator[None]:
    """From the first notice on, the process has ``SECONDS`` to leave this."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] in notices and not over.wait(SECONDS - _RESERVE):
                _end(number[0])

    thread = threading.Thread(target=watch, name="patterning-notice", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(woken)
        os.close(write)
        thread.join()
        os.close(read)


def _end(number: int) -> None:
    """End this process and all that it started, now."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    name = signal.Signals(number).name
    text = f"stopped by {name}; something did not answer within {SECONDS:g} s; run the same command to resume\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(128 + number)
