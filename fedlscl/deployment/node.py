"""One client on a machine of its own, with its state on its own disk, at the other end of a network.

The server commits a round only when everybody has had the chance to end it, and it may be killed before. Its message
therefore says from which round on it goes on: `since`, the last one whose end it knows this client to have reached.
The client keeps the states that it may be sent back to, and is told all ends that it has missed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.loggers import Logger
from torch import Tensor

from fedlscl.client import Client
from fedlscl.federation.site import Site
from fedlscl.federation.store import Store
from fedlscl.federation.transport import Accuracy
from fedlscl.schedule import Round


class End(NamedTuple):
    """The end of a round, as the server tells it to one client."""

    task: int
    round: int
    accepted: bool  # whether what the client did in the round counts; if not, it goes on from the end before
    message: bytes | None  # the server's answer, if there is one for this client


class Known(NamedTuple):
    """What the server knows of a client when it turns to it."""

    since: int  # the last round whose end the client has confirmed, 0 for none
    start: bytes | None  # the tensors with which all clients start, for a client that has confirmed none
    ends: tuple[End, ...]  # of the rounds after `since`, ascending


class Node:
    """One client and its disk.

    Args:
        site: what it trains with.
        index: which client it is.
        folder: where its states are; no other process may use it at the same time.
    """

    def __init__(self, site: Site, index: int, folder: Path) -> None:
        self.site, self.index, self.store = site, index, Store(folder)

    def fit(self, round: Round, known: Known, uploads: bool, logger: Logger | None) -> bytes | None:
        """Train in a round.

        Returns:
            The upload, if the server wants one.

        Raises:
            LookupError: if the disk does not hold the state from which the server goes on.
            FloatingPointError: if training diverged.
        """
        self._catch_up(known)
        body = self._enter(known, known.ends[-1].round if known.ends else known.since)
        state = self.site.fit(body, round, logger)
        message = body.upload().to_bytes() if uploads else None
        self.store.write(_fitted(round.number), state)
        self.store.commit({})
        return message

    def end(self, known: Known) -> Accuracy:
        """Hear the end of one round or several.

        Returns:
            The accuracies at the last of them.

        Raises:
            LookupError: if the disk does not hold the state from which the server goes on.
            MessageError: if an answer does not fit.
        """
        accuracy = self._catch_up(known)
        self.store.commit({})
        return accuracy

    def compute(self, known: Known) -> dict[str, int]:
        """See `Site.compute`."""
        return self.site.compute(self._enter(known, known.since))

    def _catch_up(self, known: Known) -> Accuracy:
        """Go through all ends, each with its test: a client may make up its mind about an answer there."""
        accuracy: Accuracy = {}
        before = known.since
        for end in known.ends:
            state = self._read(_fitted(end.round)) if end.accepted else None
            body = self._enter(known, before) if state is None else self.site.enter(self.index, state, None)
            if end.message is None:
                self.store.write(_end(end.round), body.state())
            accuracy = self.site.answer(body, end.task, end.message)
            if end.message is not None:
                self.store.write(_end(end.round), body.state())
            before = end.round
        for name in [*self.store.files]:
            kind, _, number = name.partition("-")
            if int(number) < known.since or (kind == FITTED and int(number) == known.since):
                self.store.forget(name)
        return accuracy

    def _enter(self, known: Known, round: int) -> Client:
        """The client as it was at the end of a round."""
        return self.site.enter(self.index, self._read(_end(round)) if round else None, known.start)

    def _read(self, name: str) -> dict[str, Tensor]:
        state = self.store.read(name)
        if state is None:
            there = ", ".join(sorted(self.store.files)) or "nothing"
            raise LookupError(f"client {self.index} lacks {name}, from which the server goes on; it has {there}")
        return state


FITTED = "fitted"


def _end(round: int) -> str:
    return f"end-{round}"


def _fitted(round: int) -> str:
    return f"{FITTED}-{round}"
