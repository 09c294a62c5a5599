"""One client on a machine of its own, with its state on its own disk, at the other end of a network.

The server commits a round only when everybody has had the chance to end it, and it may be killed before. Its message
therefore says from which round on it goes on: `since`, the last one whose end it knows this client to have reached.
The client keeps the states that it may be sent back to, and is told all ends that it has missed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from fedlscl.client import Client
from fedlscl.federation.secure.party import Party
from fedlscl.federation.secure.terms import terms_of
from fedlscl.federation.secure.words import ADVERTISE
from fedlscl.federation.store import Store
from fedlscl.federation.worker import Accuracy, Worker
from fedlscl.messages import Download, MessageError, schema_of
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
        worker: what it trains with.
        index: which client it is.
        folder: where its states are; no other process may use it at the same time.
    """

    def __init__(self, worker: Worker, index: int, folder: Path) -> None:
        self.worker, self.index, self.store = worker, index, Store(folder)

    def secure(self, step: str, round: Round, message: bytes) -> bytes:
        """Take a step of a secure sum, see `secure.words`; it is on the disk as done before anybody hears of it.

        Raises:
            LookupError: if the disk knows nothing of the steps before.
            MessageError: if the message does not fit the step.
        """
        party = Party(self.index, round) if step == ADVERTISE else self._party(round)
        try:
            return party.reply(step, message)
        finally:
            self.store.write(_secure(round.number), party.state())
            self.store.commit({})

    def _party(self, round: Round) -> Party:
        return Party.restored(self.index, round, self._read(_secure(round.number)))

    def fit(
        self, round: Round, known: Known, uploads: bool, logger: Logger | None, masking: bytes | None = None
    ) -> bytes | None:
        """Train in a round.

        Args:
            round: which one.
            known: what the server knows of this client.
            uploads: whether it wants anything.
            logger: where the metrics of training go.
            masking: the message with which the upload is put under masks, if it is.

        Returns:
            The upload, if the server wants one.

        Raises:
            LookupError: if the disk does not hold the state from which the server goes on.
            FloatingPointError: if training diverged.
        """
        self._catch_up(known)
        client = self._restore(known, known.ends[-1].round if known.ends else known.since)
        state = self.worker.fit(client, round, logger)
        message = None
        if masking is not None:
            party = self._party(round)
            message = party.mask(masking, terms_of(client, self.worker.template.server, party.threshold))
            self.store.write(_secure(round.number), party.state())
        elif uploads:
            message = client.protected_upload().to_bytes()
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

    def cost(self, known: Known) -> dict[str, int]:
        """See `Worker.cost`."""
        return self.worker.cost(self._restore(known, known.since))

    def _catch_up(self, known: Known) -> Accuracy:
        """Go through all ends, and be tested at the last of them."""
        accuracy: Accuracy = {}
        before = known.since
        for end in known.ends:
            state = self._read(_fitted(end.round)) if end.accepted else None
            client = self._restore(known, before) if state is None else self.worker.restore(self.index, state, None)
            if end.message is not None:
                self.worker.apply(client, end.message)
            self.store.write(_end(end.round), client.state())
            if end is known.ends[-1]:
                accuracy = self.worker.evaluate(client, end.task)
            before = end.round
        for name in [*self.store.files]:
            kind, _, number = name.partition("-")
            if int(number) < known.since or (kind == FITTED and int(number) == known.since):
                self.store.forget(name)
        return accuracy

    def _restore(self, known: Known, round: int) -> Client:
        """The client as it was at the end of a round.

        Raises:
            MessageError: if the server's common start is not the one of the run's words.
        """
        if not round and known.start is not None:
            self._check(known.start)
        return self.worker.restore(self.index, self._read(_end(round)) if round else None, known.start)

    def _check(self, start: bytes) -> None:
        """Take no start that a server has chosen: with some a client's training goes where the server wants it."""
        expected = self.worker.template.start_message(self.index)
        if start == expected:
            return
        schema = schema_of(self.worker.template.common_start)
        found, own = (Download.from_bytes(message, schema).tensors for message in (start, expected))
        for name in schema:
            one, other = found[name].double(), own[name].double()
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):  # another machine may draw other last bits
                apart = float((one - other).abs().max())
                raise MessageError(
                    f"the server's '{name}' for all clients to start with is up to {apart:g} from what the run's words "
                    "and seed give"
                )

    def _read(self, name: str) -> dict[str, Tensor]:
        state = self.store.read(name)
        if state is None:
            there = ", ".join(sorted(self.store.files)) or "nothing"
            raise LookupError(f"client {self.index} lacks {name}, from which the server goes on; it has {there}")
        return state


FITTED = "fitted"


def _end(round: int) -> str:
    return f"end-{round}"


def _secure(round: int) -> str:
    return f"secure-{round}"


def _fitted(round: int) -> str:
    return f"{FITTED}-{round}"
