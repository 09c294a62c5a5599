"""How messages travel between the server and its clients: the interface, and the clients of this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from lightning.pytorch.loggers import Logger

from fedlscl.client import Client
from fedlscl.federation.callback import FederationCallback
from fedlscl.federation.secure.party import Party
from fedlscl.federation.secure.terms import terms_of
from fedlscl.federation.secure.words import ADVERTISE
from fedlscl.federation.store import Store, client_name
from fedlscl.federation.template import Template
from fedlscl.federation.worker import Accuracy, Worker
from fedlscl.files import Damaged
from fedlscl.schedule import Round

log = logging.getLogger(__name__)

LEDGER = "clients"
"""The name under which a store holds what it knows of clients that are elsewhere."""


CLIENTS_FAULT = (FloatingPointError, ValueError)
"""What a client can be guilty of: training that diverged, data or a message that do not fit.

Anything else is the machine's trouble or a bug, which no client causes: it ends the run, which can go on later.
"""


def is_the_machines(error: BaseException) -> bool:
    """Whether an error comes from a machine's trouble: a full or broken disk, a damaged file, too little memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | MemoryError | torch.OutOfMemoryError | Damaged):
            return True
        if type(cause) is RuntimeError and "DefaultCPUAllocator" in str(cause):  # torch has no class of its own for it
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


class Fitted(NamedTuple):
    """How a client's fit ended."""

    client: int
    upload: bytes | None  # the serialised message, if it sent one
    problem: str | None  # why the client is left out of the round, if it is


Replied = tuple[int, bytes | None, str | None]
"""Likewise of any message to a client: who, its reply, and why there is none."""


class Transport(Protocol):
    """What a federation needs of whatever stands between it and its clients.

    Every client has its state on its own side. A round changes it in two steps, and in none if the server does not
    come to the end of the round.
    """

    def ask(self, step: str, round: Round, messages: Mapping[int, bytes]) -> Iterator[Replied]:
        """Send clients their messages of a step of a secure sum, see `secure.words`. In any order, each once."""

    def fit(
        self,
        round: Round,
        clients: Sequence[int],
        uploads: bool,
        callback: FederationCallback,
        masking: Mapping[int, bytes] | None = None,
    ) -> Iterator[Fitted]:
        """Let clients train; whether they upload anything is the server's to say. In any order, each once.

        Args:
            round: which one.
            clients: who.
            uploads: whether they send anything.
            callback: hears of each fit.
            masking: by client the message with which it puts its upload under masks; by default it sends it as it is.
        """

    def answer(self, round: Round, client: int, message: bytes | None, accepted: bool) -> None:
        """Tell a client the end of a round, whether it took part or not.

        Args:
            round: which one.
            client: who.
            message: the server's answer, if there is one for this client.
            accepted: whether what the client did in this round counts; if not, it goes on from the end of the last.
        """

    def evaluate(self, round: Round, client: int) -> None:
        """Let the client that was told the end of a round last be tested, where that is the server's to say."""

    def evaluations(self, round: Round) -> Mapping[int, Accuracy]:
        """The accuracies of all clients that were told the end of this round, by client; some may be missing."""

    def cost(self, client: int) -> dict[str, int]:
        """See `Worker.cost`; empty if the client does not say."""


class InProcess:
    """Clients of this process, one after another, their states in the federation's own store.

    Args:
        template: what they are like.
        store: the federation's.

    Raises:
        ValueError: if the store is that of a run whose clients are elsewhere.
    """

    def __init__(self, template: Template, store: Store) -> None:
        if LEDGER in store.files:
            raise ValueError(f"{store.folder} holds a run on Flower; go on with `flwr run`, or give another run_dir")
        self.worker, self.store = Worker(template), store
        self._accuracy: dict[int, Accuracy] = {}
        self._parties: dict[int, Party] = {}

    def ask(self, step: str, round: Round, messages: Mapping[int, bytes]) -> Iterator[Replied]:
        """Ask them in turn."""
        for client, message in messages.items():
            if step == ADVERTISE:
                self._parties[client] = Party(client, round)
            try:
                yield client, self._parties[client].reply(step, message), None
            except ValueError as error:  # such as a MessageError
                yield client, None, f"{type(error).__name__}: {error}"

    def fit(
        self,
        round: Round,
        clients: Sequence[int],
        uploads: bool,
        callback: FederationCallback,
        masking: Mapping[int, bytes] | None = None,
    ) -> Iterator[Fitted]:
        """Train them in turn."""
        for index in clients:
            logger = callback.on_fit_start(round.task, round.number, index)
            yield self._fit(index, round, uploads, logger, None if masking is None else masking[index])
            callback.on_fit_end()

    def _fit(self, index: int, round: Round, uploads: bool, logger: Logger | None, masking: bytes | None) -> Fitted:
        client = self._restore(index)
        try:
            state = self.worker.fit(client, round, logger)
            message = None
            if masking is not None:
                party = self._parties[index]
                message = party.mask(masking, terms_of(client, self.worker.template.server, party.threshold))
            elif uploads:
                message = client.protected_upload().to_bytes()
        except CLIENTS_FAULT as error:
            if is_the_machines(error):
                raise
            # One client must not stop the others; its state of the last round is still in the store
            problem = f"{type(error).__name__}: {error}"
            log.warning("client %d is left out of round %d: %s", index, round.number, problem)
            log.debug("why client %d is left out", index, exc_info=error)
            return Fitted(index, None, problem)
        except Exception as error:
            error.add_note(f"This happened to client {index} in round {round.number}.")
            raise
        self.store.write(_fitted(index), state)
        return Fitted(index, message, None)

    def answer(self, round: Round, client: int, message: bytes | None, accepted: bool) -> None:
        """Let the client take the answer over."""
        name = client_name(client)
        if accepted:
            self.store.rename(_fitted(client), name)
        else:
            self.store.forget(_fitted(client))
        self._answered = self._restore(client)
        if message is not None:
            self.worker.apply(self._answered, message)
            self.store.amend(name, self._answered.state())

    def evaluate(self, round: Round, client: int) -> None:
        """Test it at once."""
        self._accuracy[client] = self.worker.evaluate(self._answered, round.task)

    def evaluations(self, round: Round) -> Mapping[int, Accuracy]:
        """All of them."""
        found, self._accuracy = self._accuracy, {}
        return found

    def cost(self, client: int) -> dict[str, int]:
        """Count it here."""
        return self.worker.cost(self._restore(client))

    def _restore(self, index: int) -> Client:
        """The client in its last state.

        Raises:
            Damaged: if it has none, although it had a part in a round.
        """
        state = self.store.read(client_name(index))
        before = self.store.progress.get("history", [])
        if state is None and any(index in map(int, entry["bytes_down"]) for entry in before):
            raise Damaged(
                f"'{self.store.folder}' lacks the state of client {index}, which had a part in earlier rounds: put "
                "back a copy of the folder, or delete it to start anew"
            )
        return self.worker.restore(index, state, self.worker.template.start_message(index) if state is None else None)


def _fitted(index: int) -> str:
    """The name under which a client's state is kept until the server has accepted what it did."""
    return f"{client_name(index)}-fitted"
