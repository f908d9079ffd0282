"""One driver at a time where there is no lock: an object that its holder keeps changing.

Whoever finds it watches by its own monotonic clock whether it changes; no two clocks are compared. A newcomer that
takes it writes its own name and looks again one beat later: the last writer wins, the others are refused. A holder
that finds another's name was thought dead, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator

from patterning_dist.errors import PatterningError
from patterning_dist.storage.store import Storage

NAME = ".lease"
BEAT = 5.0  # between two changes [s]
PATIENCE = 6  # beats without a change, after which the holder counts as dead


def in_use(location: str, holder: str) -> PatterningError:
    """The refusal of a second driver."""
    return PatterningError(
        f"{location}: in use by another driver ({holder}); wait for it or stop it, "
        "or choose another directory with --run-dir"
    )


class Exclusive(ABC):
    """The right of one driver to a run: `take`, `confirm` before anything durable is written, `release`.

    A thread looks after it meanwhile. Where it is lost, the thread interrupts the main one.
    """

    def __init__(self) -> None:
        self._lost: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._is_main = threading.current_thread() is threading.main_thread()

    @abstractmethod
    def take(self) -> None:
        """Have it, and start the thread.

        Raises:
            PatterningError: another driver has it.
        """

    @abstractmethod
    def confirm(self) -> None:
        """Look whether it is still this driver's.

        Raises:
            PatterningError: it is not, or that cannot be found out.
        """

    @abstractmethod
    def release(self) -> None:
        """Let others have it."""

    def refuse_if_lost(self) -> None:
        """Raises PatterningError if it has been found to be lost."""
        if self._lost is not None:
            raise PatterningError(self._lost)

    @abstractmethod
    def _beat(self) -> float:
        """Seconds between two looks."""

    def _look(self) -> None:
        """What the thread does at every beat."""
        self.confirm()

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._over.wait(self._beat()):
            try:
                self._look()
            except PatterningError:
                if self._lost is None:  # an outage of the store: what the driver writes there itself says so
                    continue
                main = threading.main_thread().ident
                # Whatever it waits for; where SIGINT is ignored, its next `confirm` stops it.
                if self._is_main and main is not None:
                    signal.pthread_kill(main, signal.SIGINT)
                return


@contextlib.contextmanager
def held(exclusive: Exclusive) -> Iterator[None]:
    """Hold a lock or lease; if it is lost, that is what ends the block, whatever it is that fails first.

    Raises:
        PatterningError: another driver holds it, or it was lost.
    """
    exclusive.take()
    try:
        yield
        exclusive.refuse_if_lost()
    except BaseException:
        exclusive.refuse_if_lost()
        raise
    finally:
        exclusive.release()


class Lease(Exclusive):
    """The lease of a run in a store, an object that its holder keeps changing."""

    def __init__(self, storage: Storage, location: str) -> None:
        super().__init__()
        self._storage, self._location = storage, location
        self._owner, self._beats = uuid.uuid4().hex, 0
        self._one_at_a_time = threading.Lock()

    def take(self) -> None:
        """Wait until the lease is free or its holder has been still for long; then write, wait a beat, look again.

        Raises:
            PatterningError: it is held, or another took it at the same time.
        """
        if (found := self._read()) is not None:
            self._outwait(found)
        self._write()
        time.sleep(BEAT)
        found = self._read()
        if _field(found, "owner") != self._owner:
            raise in_use(self._location, _holder(found))
        self._thread.start()

    def confirm(self) -> None:
        """Look whether the lease is still this driver's; asked before anything durable is written.

        Raises:
            PatterningError: another driver has taken it over, or the store cannot be reached.
        """
        with self._one_at_a_time:
            self.refuse_if_lost()
            found = self._read()
            if found is not None and _field(found, "owner") != self._owner:
                self._lost = (
                    f"{self._location}: another driver ({_holder(found)}) has taken this run over, because this one "
                    f"was silent for {PATIENCE * BEAT:g} s; let that one go on"
                )
                self.refuse_if_lost()

    def release(self) -> None:
        """Delete the lease, if it is still this driver's."""
        self._stop()
        # A store that cannot be reached now: the next driver waits until the lease counts as dead.
        with contextlib.suppress(PatterningError):
            if _field(self._read(), "owner") == self._owner:
                self._storage.delete(NAME)

    def _beat(self) -> float:
        return BEAT

    def _look(self) -> None:
        self.confirm()
        self._write()

    def _outwait(self, found: bytes) -> None:
        """Return when the lease is free or has not changed for PATIENCE beats; refuse as soon as it changes."""
        start, said = time.monotonic(), False
        while (waited := time.monotonic() - start) < PATIENCE * BEAT:
            if waited > 2 * BEAT and not said:
                said = True
                sys.stderr.write(
                    f"{self._location}: held by another driver ({_holder(found)}), which is silent; "
                    f"taken over in {PATIENCE * BEAT - waited:.0f} s unless it moves\n"
                )
            time.sleep(BEAT / 2)
            now = self._read()
            if now is None:
                return
            if now != found:
                raise in_use(self._location, _holder(now))

    def _write(self) -> None:
        self._beats += 1
        content = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "beats": self._beats}
        self._storage.write(NAME, json.dumps(content).encode())

    def _read(self) -> bytes | None:
        try:
            return self._storage.read(NAME)
        except FileNotFoundError:
            return None


def _holder(content: bytes | None) -> str:
    return f"pid {_field(content, 'pid')} on {_field(content, 'host')}"


def _field(content: bytes | None, name: str) -> object:
    try:
        return json.loads(content or b"{}").get(name, "unknown")
    except (ValueError, AttributeError):
        return "unknown"
