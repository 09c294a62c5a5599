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
        threading.Thread(target=_wait, args=(sys.stdin.fileno(),), daemon=True).start()


def _wait(pipe: int) -> None:
    while os.read(pipe, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
