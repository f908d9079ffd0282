"""Notice to leave: SIGTERM and SIGHUP, as long as the process runs Python, and where it is stuck in a library."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from patterning_dist.preemption import Preempted, preemptible

NOTICES = (signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("sent", NOTICES)
def test_the_first_notice_is_raised_and_later_ones_do_not_disturb_the_leaving(sent: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in NOTICES]
    left = []
    with pytest.raises(Preempted) as caught, preemptible():
        try:
            os.kill(os.getpid(), sent)
            time.sleep(30)
        finally:
            for number in NOTICES:
                os.kill(os.getpid(), number)
            left.append("in order")
    assert left == ["in order"]
    assert caught.value.signal is sent and caught.value.exit_code == 128 + sent
    assert [signal.getsignal(number) for number in NOTICES] == before


def test_what_arrives_as_ctrl_c_is_what_was_sent() -> None:
    """As while Ray waits."""
    with pytest.raises(Preempted) as caught, preemptible():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(30)
        except Preempted:
            raise KeyboardInterrupt from None
    assert caught.value.signal is signal.SIGHUP


def test_ctrl_c_is_no_notice_and_under_nohup_a_closed_terminal_is_none() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt) as caught, preemptible():
            os.kill(os.getpid(), signal.SIGHUP)
            raise KeyboardInterrupt
        assert caught.type is KeyboardInterrupt
    finally:
        signal.signal(signal.SIGHUP, before)


STUCK = """
import contextlib, ctypes, subprocess
from patterning_dist import preemption
preemption.SECONDS = 2.0
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with preemption.preemptible():
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            libc.pthread_mutex_lock(mutex)
            print(child.pid, flush=True)
            libc.pthread_mutex_lock(mutex)  # for ever, without a look at signals
"""


def test_a_process_that_is_stuck_in_a_library_ends_in_time_and_its_children_with_it() -> None:
    stuck = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert stuck.stdout is not None
    child = int(stuck.stdout.readline())
    stuck.send_signal(signal.SIGTERM)
    _, said = stuck.communicate(timeout=60)
    assert stuck.returncode == 143
    assert said == "stopped by SIGTERM; something did not answer within 2 s; run the same command to resume\n"
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it was killed, and is still there"
            time.sleep(0.05)
