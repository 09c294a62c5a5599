"""A round whose sums are secure: the four steps of a session, over whatever leads to the clients."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedlscl.federation.callback import FederationCallback, RoundResult
from fedlscl.federation.secure.fixed_point import BITS, most_bits
from fedlscl.federation.secure.session import Session
from fedlscl.federation.secure.terms import shapes_of, total_of
from fedlscl.federation.secure.words import ADVERTISE, SHARE, UNMASK
from fedlscl.federation.template import Template
from fedlscl.federation.transport import Replied, Transport
from fedlscl.messages import MessageError, in_a_line
from fedlscl.schedule import Round, Schedule
from fedlscl.server import Total

log = logging.getLogger(__name__)

IMAGES = 2**10
"""How many images a client is taken to have where nobody knows: it decides about bits, and not about who takes part."""


class SecureSums:
    """Sums of what clients send, of which the server sees nothing else.

    Args:
        schedule: has threshold and bits.
        template: has the server, which knows what is added up.

    Raises:
        ValueError: if the server needs more than sums.
    """

    def __init__(self, schedule: Schedule, template: Template) -> None:
        server = template.server
        if problem := server.beyond_sums():
            raise ValueError(
                f"federation.secure is true, but server {type(server).__name__} {problem}; leave it out, or take a "
                "server that needs no more than sums, such as Sum, FedAvg or StatisticsServer"
            )
        self.schedule, self.server = schedule, server
        self.shapes = shapes_of(template.first.upload_schema(), server)

    def bits(self, clients: int, images: int | None) -> list[int]:
        """How many bits each tensor has behind the point: as the schedule says, or by what it is.

        Args:
            clients: how many take part.
            images: the most that any of them has, if that is known.
        """
        if self.schedule.fraction_bits is not None:
            return [self.schedule.fraction_bits] * len(self.shapes)
        factors = self.server.factors(IMAGES if images is None else max(images, 1))
        return [most_bits(clients, factors[name]) if name in factors else BITS for name in self.shapes]

    def total(
        self,
        transport: Transport,
        round: Round,
        clients: Sequence[int],
        images: int | None,
        result: RoundResult,
        callback: FederationCallback,
    ) -> Total:
        """Let clients train, and add up what they send.

        Who drops out on the way is in `result.skipped` with the reason, unless its values are in the sum already.

        Args:
            transport: leads to the clients.
            round: which one.
            clients: who takes part.
            images: the most that any of them has in this round, if that is known.
            result: of the round, to be completed.
            callback: hears of each fit.

        Raises:
            NoSum: if too few clients get to the end, or one has sent what spoils the sum; nothing is then known of it.
        """
        least = self.schedule.least(len(clients))
        session = Session(clients, round, least, self.bits(len(clients), images), self.shapes)
        sent = Counter[int]()

        def step(
            messages: Mapping[int, bytes],
            replies: Callable[[Mapping[int, bytes]], Iterator[Replied]],
            take: Callable[[int, bytes], None],
            skipped: dict[int, str],
        ) -> None:
            sent.update({client: len(message) for client, message in messages.items()})
            for client, message, problem in replies(messages):
                if message is not None and problem is None:
                    result.bytes_up[client] = result.bytes_up.get(client, 0) + len(message)
                    try:
                        take(client, message)
                    except MessageError as error:
                        problem = f"{type(error).__name__}: {error}"
                if problem is not None:
                    skipped[client] = in_a_line(problem)
                    log.warning("client %d, in the secure sum of round %d: %s", client, round.number, skipped[client])

        left_out, silent = result.skipped, dict[int, str]()
        step(session.invitations(), lambda m: transport.ask(ADVERTISE, round, m), session.advertised, left_out)
        step(session.rosters(), lambda m: transport.ask(SHARE, round, m), session.shared, left_out)
        step(session.deliveries(), lambda m: transport.fit(round, [*m], True, callback, m), session.masked, left_out)
        step(session.requests(), lambda m: transport.ask(UNMASK, round, m), session.revealed, silent)
        total = total_of(session.total(), session.survivors)
        result.bytes_down |= {client: sent[client] for client in total.clients}
        return total
