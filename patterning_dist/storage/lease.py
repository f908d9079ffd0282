"""One driver at a time where there is no lock: an object that its holder keeps changing.

Whoever finds it watches by its own monotonic clock whether it changes; no two clocks are compared. Every change is made
over the version that was seen last (``Cell``), so of those who would take it at once the store lets one. A holder that
finds another's name was thought dead, and stops.
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
from patterning_dist.storage.cell import Cell, Seen, open_cell
from patterning_dist.storage.store import Storage

NAME = ".lease"
BEAT = 5.0  # between two changes [s]
FREE = b"free"
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
    """The lease of a run in a store, an object that its holder keeps changing.

    Args:
        cell: the object.
        location: of the run, for messages.
    """

    def __init__(self, cell: Cell, location: str) -> None:
        super().__init__()
        self._cell, self._location = cell, location
        self._owner, self._beats = uuid.uuid4().hex, 0
        self._seen: Seen | None = None
        self._one_at_a_time = threading.Lock()

    def take(self) -> None:
        """Wait until the lease is free or its holder has been still for long; then write over what was seen.

        Raises:
            PatterningError: it is held, or another took it at the same time.
        """
        found = self._cell.read()
        if _is_held(found):
            found = self._outwait(found)
        self._seen = self._cell.write(self._content(), found)
        if self._seen is None:
            raise in_use(self._location, _holder(self._cell.read()))
        self._thread.start()

    def confirm(self) -> None:
        """Look whether the lease is still this driver's; asked before anything durable is written.

        Raises:
            PatterningError: another driver has taken it over, or the store cannot be reached.
        """
        with self._one_at_a_time:
            self.refuse_if_lost()
            self._refuse(self._cell.read())

    def release(self) -> None:
        """Let others have it, if it is still this driver's.

        What says so stays there: after a deletion that comes late, two drivers could have the run.
        """
        self._stop()
        # A store that cannot be reached now: the next driver waits until the lease counts as dead.
        with contextlib.suppress(PatterningError):
            self._cell.write(FREE, self._seen)

    def _beat(self) -> float:
        return BEAT

    def _look(self) -> None:
        with self._one_at_a_time:
            self.refuse_if_lost()
            seen = self._cell.write(self._content(), self._seen)
            if seen is None:
                self._refuse(self._cell.read())
            self._seen = seen

    def _refuse(self, found: Seen | None) -> None:
        """Raises PatterningError if what was found is not this driver's."""
        if found is None:
            self._lost = f"{self._location}: was removed under the run that wrote there; run the same command again"
        elif _field(found, "owner") != self._owner:
            self._lost = (
                f"{self._location}: another driver ({_holder(found)}) has taken this run over, because this one "
                f"was silent for {PATIENCE * BEAT:g} s; let that one go on"
            )
        self.refuse_if_lost()

    def _outwait(self, found: Seen | None) -> Seen | None:
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
            now = self._cell.read()
            if not _is_held(now):
                return now
            if now != found:
                raise in_use(self._location, _holder(now))
        return found

    def _content(self) -> bytes:
        self._beats += 1
        content = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "beats": self._beats}
        return json.dumps(content).encode()


def lease_at(url: str, storage: Storage) -> Lease:
    """The lease of the run at a URL."""
    return Lease(open_cell(url, storage, NAME, settle=BEAT), str(storage))


def _is_held(found: Seen | None) -> bool:
    return found is not None and found.content != FREE


def _holder(found: Seen | None) -> str:
    return f"pid {_field(found, 'pid')} on {_field(found, 'host')}"


def _field(found: Seen | None, name: str) -> object:
    try:
        return json.loads(found.content if found else b"{}").get(name, "unknown")
    except (ValueError, AttributeError):
        return "unknown"
