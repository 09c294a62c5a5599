"""Work that goes on side by side on one device: threads of which one runs at a time, each with a stream of its own.

A thread has its turn until it lets another have one, where it has given the device something to do that takes a while.
Since a thread stops at no other place, what all share needs no locks, and who comes when is always the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_own = threading.local()


class Stopped(BaseException):
    """Work is given up because other work has failed, or the user has had enough."""


class _Thread(threading.Thread):
    """One of several, whose turn begins at its `gate`."""

    def __init__(self, number: int, job: Callable[[], Any], ring: list[_Thread]) -> None:
        super().__init__(daemon=True)
        self.number, self.job, self.ring = number, job, ring
        self.gate = threading.Semaphore(0)
        self.stopped = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.event: torch.cuda.Event | None = None  # what the thread before has given the device, but for the last
        self.random, self.threads = _random(), torch.get_num_threads()

    def run(self) -> None:
        """Do the job, turn by turn."""
        _own.thread = self
        torch.set_num_threads(self.threads)  # every thread has a number of its own
        stream = _stream(self.number) if torch.cuda.is_available() else None
        try:
            with torch.cuda.stream(stream) if stream else nullcontext():
                self.wait()
                self.result = self.job()
                if stream:
                    stream.synchronize()
        except BaseException as error:
            self.error = error
            for other in self.ring:
                other.stopped = True
        finally:
            after = self.after()
            self.ring.remove(self)
            after.event = None  # all is done
            after.gate.release()

    def after(self) -> _Thread:
        """Whose turn is next."""
        return self.ring[(self.ring.index(self) + 1) % len(self.ring)]

    def wait(self) -> None:
        """Wait for the next turn, and begin it.

        Raises:
            Stopped: if it is to be the last.
        """
        self.gate.acquire()
        if self.stopped:
            raise Stopped
        torch.set_rng_state(self.random[0])
        for state in self.random[1:]:
            torch.cuda.set_rng_state(state)
        if self.event:
            # what the one before has changed for all, as the images on the device, was changed before its last step
            torch.cuda.current_stream().wait_event(self.event)


@cache
def _stream(number: int) -> torch.cuda.Stream:
    """The stream of a job: always the same, since memory that was used on a stream is kept for it."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _random() -> list[Tensor]:
    """The states of torch's own generators, which every thread has for itself."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


@contextmanager
def passed() -> Iterator[None]:
    """Let the others have their turns once the device has been given what is inside; nothing where there are none."""
    thread: _Thread | None = getattr(_own, "thread", None)
    if thread is None or len(thread.ring) == 1:
        yield
        return
    event = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
    yield
    thread.random, after = _random(), thread.after()
    after.event = event
    after.gate.release()
    thread.wait()


def pays() -> bool:
    """Whether there is a device that works on while a thread waits."""
    return torch.cuda.is_available()


def side_by_side(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of some jobs, done in turns.

    Raises:
        BaseException: that of the first job that failed, if one has; all others have been given up then.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ring: list[_Thread] = []
    random, threads = _random(), [_Thread(number, job, ring) for number, job in enumerate(jobs)]
    ring.extend(threads)
    for thread in threads:
        thread.start()
    try:
        threads[0].gate.release()
        for thread in threads:
            thread.join()
    finally:
        for thread in threads:  # where the user has interrupted the waiting
            thread.stopped = True
        for thread in threads:
            thread.join()
        torch.set_rng_state(random[0])
        for state in random[1:]:
            torch.cuda.set_rng_state(state)
    if errors := [t.error for t in threads if t.error is not None and not isinstance(t.error, Stopped)]:
        raise errors[0]
    return [thread.result for thread in threads]
