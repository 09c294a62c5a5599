"""Runs that a sweep starts end with it, however it ends: each reads from a pipe that only the sweep holds open."""

from __future__ import annotations

import os
import signal
import sys
import threading

VARIABLE = "FEDLSCL_ENDS_WITH_INPUT"
"""Set in the environment of a process whose standard input is such a pipe."""


def follow() -> None:
    """If this process was started by a sweep, end it as SIGTERM would once the sweep is gone."""
    if os.environ.pop(VARIABLE, None):  # what this process starts has another input
        end_with(sys.stdin.fileno())


def end_with(pipe: int) -> None:
    """End this process as SIGTERM would once nobody holds the other end of a pipe that it reads from."""
    threading.Thread(target=_wait, args=(pipe,), daemon=True).start()


def _wait(pipe: int) -> None:
    while os.read(pipe, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
