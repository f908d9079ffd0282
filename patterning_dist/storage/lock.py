"""One driver at a time in a folder: a lock of the kernel on a file, and a word in it by which all know whose it is.

The kernel's lock is on the file, and goes with it where the folder is removed and made again: another driver could have
the lock of the new one. So the holder keeps looking whether the file at that path still has its word, and whoever
writes for it, on any node, looks before (``LocalStorage``).
"""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from pathlib import Path

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import explained
from patterning_dist.storage.lease import Exclusive, in_use
from patterning_dist.storage.store import LOCK, LocalStorage

BEAT = 1.0  # between two looks [s]


class FolderLock(Exclusive):
    """The lock of a run directory; the kernel lets go of it if this process dies, however it dies.

    Attributes:
        holder: the word of this driver.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.holder = uuid.uuid4().hex
        self._folder, self._storage = folder, LocalStorage(folder, self.holder)

    def take(self) -> None:
        """Lock the file and write the word into it.

        Raises:
            PatterningError: another driver has the folder, or it cannot be written.
        """
        file = self._folder / LOCK
        with explained(file):
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found = os.read(self._descriptor, 200).decode(errors="replace").splitlines()
                raise in_use(str(self._folder), f"pid {found[0] if found else 'unknown'}") from None
            with explained(file):
                os.ftruncate(self._descriptor, 0)
                word = f"{os.getpid()} on {socket.gethostname()}\n{self.holder}\n"
                os.pwrite(self._descriptor, word.encode(), 0)
                os.fsync(self._descriptor)  # nodes that share the folder read it
        except BaseException:
            os.close(self._descriptor)
            raise
        self._thread.start()

    def confirm(self) -> None:
        """Look for the word.

        Raises:
            PatterningError: it is not there.
        """
        self.refuse_if_lost()

    def refuse_if_lost(self) -> None:
        """As ``confirm``, which costs next to nothing here."""
        try:
            self._storage.confirm()
        except PatterningError as error:
            self._lost = str(error)
        super().refuse_if_lost()

    def release(self) -> None:
        """Let another driver have the folder."""
        self._stop()
        os.close(self._descriptor)

    def _beat(self) -> float:
        return BEAT
